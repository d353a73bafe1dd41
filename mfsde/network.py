"""Two-layer networks as energies: the risk of ∫ feature(θ, ·) m(dθ) on data.

The predictor f(z) = ∫ feature(θ, z) m(dθ) is linear in the measure, so every derivative of the risk is an integral of
features against the loss derivative at f: cost O(N·n), never O(N²). Data are visited in chunks; no graph survives one.
`Risk.minibatch_derivative` is the gradient on rows of the data that differ between replicas.
`Neuron` is the standard feature with a hand-written gradient; any callable works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .activation import ACTIVATIONS
from .energy import Energy, Sum, _gradient
from .measure import EmpiricalMeasure
from .tape import constant, is_recording, recording, values, variable

Feature = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

# Activations of one chunk of data: N·b floats that stay in the cache between forward and backward.
CHUNK_FLOATS = 1 << 20
# Below this many data points a chunk's matrix products lose their speed.
LEAST_CHUNK = 16


class Neuron:
    """feature(θ, z) = scale·β σ(α·z), θ = (α, β), α ∈ R^p, β ∈ R (or R^k for k outputs).

    A bias is a constant column of the inputs.

    Args:
        activation: "tanh", "sigmoid" or "relu".
        n_outputs: None for a scalar output, k for a vector of k.
        scale: factor in front of the neuron; a mean of bounded neurons is small where m spreads their signs.

    Raises:
        ValueError: unknown activation, n_outputs < 1.

    """

    def __init__(self, activation: str = "tanh", n_outputs: int | None = None, scale: float = 1.0) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"Neuron: unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
        if n_outputs is not None and n_outputs < 1:
            raise ValueError(f"Neuron: n_outputs = {n_outputs}; expected None (a scalar output) or a number >= 1.")
        self.activation = activation
        self.n_outputs = n_outputs
        self.scale = scale

    def dim(self, n_inputs: int) -> int:
        """Dimension d = p + k of a neuron's parameters."""
        return n_inputs + (self.n_outputs or 1)

    def __call__(self, theta: Tensor, z: Tensor) -> Tensor:
        """theta: (..., N, 1, d), z: (b, p) -> (..., N, b[, k]); differentiable."""
        alpha, beta = self._split(theta.squeeze(-2), z)
        hidden = self.scale * getattr(torch, self.activation)(alpha @ z.T)
        if self.n_outputs is None:
            return hidden * beta  # type: ignore[no-any-return]
        return hidden.unsqueeze(-1) * beta.unsqueeze(-2)  # type: ignore[no-any-return]

    def forward(self, theta: Tensor, z: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        """Writes σ(α·z) into out and returns ∫ scale·β σ(α·z) dm.

        theta: (R, N, d), z: (b, p), weights: (R, N, 1), out: (R, b, N); returns (R, b[, k]). Data before particles:
        every product then runs along contiguous rows.
        """
        alpha, beta = self._split(theta, z)
        torch.bmm(z.expand(len(theta), *z.shape), alpha.mT, out=out)
        f = ACTIVATIONS[self.activation].sum_(out, beta * weights * self.scale)
        return f.squeeze(-1) if self.n_outputs is None else f

    def activated(self, theta: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """σ(α·z), (R, N, b), for data of each replica's own, z: (R, b, p); and β."""
        alpha, beta = self._split(theta, z)
        return ACTIVATIONS[self.activation].sigma_(torch.bmm(alpha, z.mT)), beta

    def _split(self, theta: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        p = z.shape[-1]
        if theta.shape[-1] != self.dim(p):
            raise ValueError(
                f"Neuron: particles have dimension {theta.shape[-1]}; {p} inputs and {self.n_outputs or 1} output(s) "
                f"need {self.dim(p)}: θ = (α, β), a bias being a constant column of the inputs."
            )
        return theta[..., :p], theta[..., p:]


class PullBack:
    """Accumulates ∇_θ Σ_s r_s·feature(θ, z_s) over chunks of data.    theta: (R, N, d).

    Stored transposed, (R, d, N). With one output β multiplies once, at the end; the constant part of σ' is a sum over
    data alone.
    """

    def __init__(self, neuron: Neuron, theta: Tensor, n_inputs: int) -> None:
        self._neuron = neuron
        self._p = n_inputs
        self._beta = theta[..., n_inputs:]
        self._total = torch.zeros_like(theta).mT.contiguous()
        self._constant = theta.new_zeros((len(theta), n_inputs, 1))

    def add_(self, hidden: Tensor, z: Tensor, r: Tensor) -> None:
        """One chunk.    hidden: (R, b, N) as `Neuron.forward` wrote it, overwritten; z: (b, p); r: (R, b[, k])."""
        _, slope_, offset, scale, _ = ACTIVATIONS[self._neuron.activation]
        columns = (r.unsqueeze(-1) if self._neuron.n_outputs is None else r) * self._neuron.scale
        self._total[:, self._p :].baddbmm_(columns.mT, hidden)
        slope_(hidden)
        if self._neuron.n_outputs is None:
            weighted = columns * z
            self._total[:, : self._p].baddbmm_(weighted.mT, hidden, alpha=scale)
            self._constant += offset * weighted.sum(1).unsqueeze(-1)
        else:
            hidden.mul_(scale).add_(offset).mul_(torch.bmm(columns, self._beta.mT))
            self._total[:, : self._p].baddbmm_(z.mT.expand(len(hidden), *z.mT.shape), hidden)

    def result(self) -> Tensor:
        """(R, N, d)."""
        if self._neuron.n_outputs is None:
            self._total[:, : self._p].add_(self._constant).mul_(self._beta.mT)
        return self._total.mT


def squared_loss(f: Tensor, y: Tensor) -> Tensor:
    """½|f - y|², (..., b[, k]) -> (..., b)."""
    half = 0.5 * (f - y).square()
    return half if y.ndim == 1 else half.sum(-1)


def logistic_loss(f: Tensor, y: Tensor) -> Tensor:
    """log(1 + exp(-y f)), y = ±1, (..., b[, k]) -> (..., b)."""
    each = functional.softplus(-y * f)
    return each if y.ndim == 1 else each.sum(-1)


LOSSES: dict[str, Loss] = {"squared": squared_loss, "logistic": logistic_loss}


class Risk(Energy):
    """F(m) = (1/n) Σ_s loss(∫ feature(θ, z_s) m(dθ), y_s)."""

    def __init__(self, feature: Feature, loss: str | Loss, inputs: Any, targets: Any) -> None:
        super().__init__(self._risk)
        self._feature = feature
        self._loss = _loss(loss)
        self._data = _data(loss, inputs, targets)
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def n_data(self) -> int:
        """Number n of data."""
        return len(self._data[0])

    def data(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (n, p) and targets (n[, k]) on a tensor's device, in its dtype."""
        key = (like.device, like.dtype)
        if key not in self._moved:
            z, y = self._data
            self._moved[key] = (z.to(*key), y.to(*key))
        return self._moved[key]

    def predict(self, mu: EmpiricalMeasure, inputs: Tensor) -> Tensor:
        """f(z) = ∫ feature(θ, z) m(dθ), (..., n[, k]), without a graph."""
        z = inputs.to(mu.points)
        with values():
            parts = [self._output(mu, z[rows]) for rows in self._rows(mu, len(z))]
        return torch.cat(parts, dim=mu.points.ndim - 2)

    def functional_derivative(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """(1/n) Σ_s ∂loss_s · (feature(x, z_s) - f(z_s))."""
        self._check(mu)
        x = constant(mu.beside(x))
        total = x.new_zeros(x.shape[:-1])
        for z, y in self._chunks(mu):
            with values():
                f = self._output(mu, z)
                r = self._residual(f, y)
                centred = self._feature(x.unsqueeze(-2), z) - _particle_axis(f, mu)
                total += (centred * _particle_axis(r, mu)).flatten(x.ndim - 1).sum(-1)
        return total

    def intrinsic_derivative(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """(1/n) Σ_s ∂loss_s · ∇_θ feature(x, z_s)."""
        self._check(mu)
        x = mu.beside(x)
        if is_recording():
            return self._recorded_gradient(mu, x)
        if isinstance(self._feature, Neuron):
            return self._neuron_gradient(self._feature, mu, x)
        total = torch.zeros_like(x)
        for z, y in self._chunks(mu):
            self._add_gradient(mu, x, z, y, total)
        return total

    def minibatch_derivative(self, mu: EmpiricalMeasure, x: Tensor, rows: Tensor, factor: float = 1.0) -> Tensor:
        """(c/b) Σ_s ∂loss_s · ∇_θ feature(x, z_s), s in the replica's own rows, c = factor, detached.

        x: (R, N, d), rows: (R, b). O(N b d) for a Neuron, whose gradient is written out; other features are
        differentiated, mapped over replicas.
        """
        self._check(mu)
        inputs, targets = self.data(x)
        z, y = inputs[rows], targets[rows]
        scale = factor * self.n_data / rows.shape[-1]
        if isinstance(self._feature, Neuron):
            with torch.no_grad():
                return self._neuron_minibatch(self._feature, mu, x, z, y, scale)
        feature = torch.vmap(self._feature)
        with torch.enable_grad():
            theta = x.detach().requires_grad_()
            values = feature(theta.unsqueeze(-2), z)
            with torch.no_grad():
                f = mu.integrate(lambda points: values if x is mu.points else feature(points.unsqueeze(-2), z))
                r = self._residuals(f, y).mul_(scale).unsqueeze(1)
            return _gradient((values * r).sum(), [theta])[0]

    def second_derivative(self, mu: EmpiricalMeasure, x: Tensor, y: Tensor) -> Tensor:
        """(1/n) Σ_s (φ_s(x) - f_s)ᵀ ∂²loss_s (φ_s(y) - f_s), φ_s = feature(·, z_s)."""
        self._check(mu)
        x, y = constant(mu.beside(x)), constant(mu.beside(y))
        total = x.new_zeros((*x.shape[:-1], y.shape[-2]))
        for z, targets in self._chunks(mu):
            with values():
                f = self._output(mu, z)
                left = self._feature(x.unsqueeze(-2), z) - _particle_axis(f, mu)
                right = self._feature(y.unsqueeze(-2), z) - _particle_axis(f, mu)
                curved = _curvature_product(self._loss, f, targets, left) / len(self._data[0])
            total += curved.flatten(x.ndim - 1) @ right.flatten(x.ndim - 1).mT
        return total

    def _risk(self, mu: EmpiricalMeasure) -> Tensor:
        total = mu.points.new_zeros(mu.points.shape[:-2])
        for z, y in self._chunks(mu):
            f = mu.integrate(lambda theta, z=z: self._feature(theta.unsqueeze(-2), z))  # type: ignore[misc]
            total = total + self._loss(f, y).sum(-1)
        return total / len(self._data[0])

    def _check(self, mu: EmpiricalMeasure) -> None:
        # The measure enters through ∫ feature dm only, so there are no weights to forget: the shape is what can be
        # wrong.
        if self._checked:
            return
        z, y = next(self._chunks(mu))
        few = mu.points.detach()[..., :2, :]
        with torch.no_grad():
            values = self._feature(few.unsqueeze(-2), z[:3])
        expected = (*few.shape[:-1], len(z[:3]), *y.shape[1:])
        if tuple(values.shape) != expected:
            raise ValueError(
                f"risk: feature returned shape {tuple(values.shape)} for θ {tuple(few.unsqueeze(-2).shape)} and z "
                f"{tuple(z[:3].shape)}; expected {expected}: particle axis, data axis, then the shape of a target."
            )
        f = values.mean(few.ndim - 2).detach()
        losses = self._loss(f, y[:3])
        if not isinstance(losses, Tensor) or losses.shape != f.shape[: few.ndim - 1]:
            raise ValueError(
                f"risk: loss returned shape {tuple(getattr(losses, 'shape', ()))} for predictions {tuple(f.shape)} and "
                f"targets {tuple(y[:3].shape)}; expected {tuple(f.shape[: few.ndim - 1])}, one loss per data point."
            )
        self._checked = True

    def _output(self, mu: EmpiricalMeasure, z: Tensor) -> Tensor:
        if isinstance(self._feature, Neuron) and not is_recording():
            theta = _batch(mu.points)
            hidden = theta.new_empty((len(theta), len(z), theta.shape[1]))
            f = self._feature.forward(theta, z, _batch(mu.weights.unsqueeze(-1)), hidden)
            return f.reshape(*mu.points.shape[:-2], *f.shape[1:])
        return mu.integrate(lambda theta: self._feature(theta.unsqueeze(-2), z))

    def _residual(self, f: Tensor, y: Tensor) -> Tensor:
        """∂loss/∂f divided by n."""
        n = len(self._data[0])
        if self._loss is squared_loss:
            return (f - y) / n
        if self._loss is logistic_loss:
            return -y * torch.sigmoid(-y * f) / n
        with torch.enable_grad():
            at = variable(f)
            return _gradient(self._loss(at, y).sum(), [at])[0] / n

    def _neuron_gradient(self, neuron: Neuron, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        with torch.no_grad():
            theta, at = _batch(mu.points), _batch(x)
            weights = _batch(mu.weights.unsqueeze(-1))
            pulled = PullBack(neuron, at, self._data[0].shape[1])
            hidden = own = theta.new_empty(0)
            for z, y in self._chunks(mu):
                # One buffer serves all chunks but the last: fresh ones would spend their time in page faults.
                hidden = _reuse(hidden, (len(theta), len(z), theta.shape[1]))
                f = neuron.forward(theta, z, weights, hidden)
                r = self._residual(f.reshape(*mu.points.shape[:-2], *f.shape[1:]), y).reshape(f.shape)
                if x is not mu.points:
                    own = _reuse(own, (len(at), len(z), at.shape[1]))
                    neuron.forward(at, z, at.new_ones(1), own)
                pulled.add_(hidden if x is mu.points else own, z, r)
            return pulled.result().reshape(x.shape)

    def _neuron_minibatch(
        self, neuron: Neuron, mu: EmpiricalMeasure, x: Tensor, z: Tensor, y: Tensor, scale: float
    ) -> Tensor:
        """∇_α = Σ_s (β·r_s) σ'(α·z_s) z_s and ∇_β = Σ_s r_s σ(α·z_s), r_s scaled.    z: (R, b, p), y: (R, b[, k])."""
        _, slope_, offset, factor, _ = ACTIVATIONS[neuron.activation]
        hidden, beta = neuron.activated(x, z)
        inner, outer = (hidden, beta) if x is mu.points else neuron.activated(mu.points, z)
        f = torch.bmm(inner.mT, outer / mu.n_particles if mu.is_uniform else outer * mu.weights.unsqueeze(-1))
        r = self._residuals(f.mul_(neuron.scale).view(y.shape), y).view(f.shape) * (scale * neuron.scale)
        total, p = torch.empty_like(x), z.shape[-1]
        torch.bmm(hidden, r, out=total[..., p:])
        slope_(hidden)
        if (offset, factor) != (0.0, 1.0):
            hidden.mul_(factor).add_(offset)
        hidden.mul_(torch.bmm(beta, r.mT))
        # A matrix product of rank one takes twice as long as the outer product.
        torch.mul(hidden, z, out=total[..., :p]) if z.shape[1] == 1 else torch.bmm(hidden, z, out=total[..., :p])
        return total

    def _residuals(self, f: Tensor, y: Tensor) -> Tensor:
        """∂loss/∂f divided by n, for data that differ between replicas.    (R, b[, k])."""
        if self._loss in (squared_loss, logistic_loss):
            return self._residual(f, y)
        # A callable loss was promised targets without a replica axis.
        with torch.enable_grad():
            at = f.detach().requires_grad_()
            return _gradient(torch.vmap(self._loss)(at, y).sum(), [at])[0] / self.n_data

    def _add_gradient(self, mu: EmpiricalMeasure, x: Tensor, z: Tensor, y: Tensor, total: Tensor) -> None:
        with torch.enable_grad():
            theta = x.detach().requires_grad_()
            values = self._feature(theta.unsqueeze(-2), z)
            if x is mu.points:
                f = mu.integrate(lambda _: values.detach())
            else:
                with torch.no_grad():
                    f = self._output(mu, z)
            r = _particle_axis(self._residual(f, y), mu)
            total += _gradient((values * r).sum(), [theta])[0]

    def _recorded_gradient(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """The same with its graph: each chunk of data is evaluated once more in the backward pass."""
        from torch.utils.checkpoint import checkpoint

        def part(points: Tensor, weights: Tensor, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
            # Backward passes may run in a thread that does not know of the tape.
            with recording():
                f = EmpiricalMeasure.signed(points, weights).integrate(lambda t: self._feature(t.unsqueeze(-2), z))
                theta = variable(x)
                features = self._feature(theta.unsqueeze(-2), z)
                return _gradient((features * _particle_axis(self._residual(f, y), mu)).sum(), [theta])[0]

        total = torch.zeros_like(x)
        for z, y in self._chunks(mu):
            total = total + checkpoint(part, mu.points, mu.weights, x, z, y, use_reentrant=False)
        return total

    def _chunks(self, mu: EmpiricalMeasure) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.data(mu.points)
        for rows in self._rows(mu, len(inputs)):
            yield inputs[rows], targets[rows]

    def _rows(self, mu: EmpiricalMeasure, n: int) -> Iterator[slice]:
        batch = max(LEAST_CHUNK, CHUNK_FLOATS // max(1, mu.points.numel() // mu.dim))
        for start in range(0, n, batch):
            yield slice(start, start + batch)


def risk(feature: Feature, loss: str | Loss, inputs: Any, targets: Any) -> Risk:
    """F(m) = (1/n) Σ_s loss(∫ feature(θ, z_s) m(dθ), y_s): the risk of an infinitely wide two-layer network.

    Args:
        feature: feature(theta (..., N, 1, d), z (b, p)) -> (..., N, b[, k]); `Neuron` has a hand-written gradient.
        loss: "squared" = ½|f - y|²; "logistic" = log(1 + e^{-yf}) with targets ±1; or loss(f, y) -> (..., b), smooth
            in f.
        inputs: (n, p).
        targets: (n,) or (n, k).

    Raises:
        ValueError: shapes that do not fit, data that are not finite, an unknown loss, logistic targets other than ±1.

    """
    return Risk(feature, loss, inputs, targets)


def risks(energy: Energy) -> list[Risk]:
    """The terms of an energy that are risks."""
    return [term for _, term in _terms(energy) if isinstance(term, Risk)]


def minibatch_derivative(energy: Energy, mu: EmpiricalMeasure, x: Tensor, rows: Tensor, factor: float = 1.0) -> Tensor:
    """The gradient c D_mF(mu, x), c = factor, with the risks of F on rows of the data and all other terms as they are.

    x: (R, N, d), rows: (R, b) -> (R, N, d).
    """
    total: Tensor | None = None
    for weight, term in _terms(energy):
        if isinstance(term, Risk):
            slope = term.minibatch_derivative(mu, x, rows, factor * weight)
        else:
            slope = term.intrinsic_derivative(mu, x) * (factor * weight)
        total = slope if total is None else total.add_(slope)
    assert total is not None
    return total


def _terms(energy: Energy) -> list[tuple[Any, Energy]]:
    return energy.terms if isinstance(energy, Sum) else [(1.0, energy)]


def _loss(loss: str | Loss) -> Loss:
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"risk: unknown loss {loss!r}; expected one of {', '.join(LOSSES)} or a callable loss(f, y).")
    return LOSSES[loss]


def _data(loss: str | Loss, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    z, y = torch.as_tensor(inputs), torch.as_tensor(targets)
    z, y = (a if a.is_floating_point() else a.double() for a in (z, y))
    if z.ndim != 2 or y.ndim not in (1, 2) or len(z) != len(y) or len(z) == 0:
        raise ValueError(
            f"risk: inputs have shape {tuple(z.shape)} and targets {tuple(y.shape)}; expected (n, p) and (n,) or "
            "(n, k) with n >= 1."
        )
    if not (bool(torch.isfinite(z).all()) and bool(torch.isfinite(y).all())):
        raise ValueError("risk: inputs and targets must be finite; drop or impute the missing values first.")
    if loss == "logistic" and not bool((y.abs() == 1).all()):
        raise ValueError("risk: the logistic loss takes targets ±1; labels 0 and 1 become 2*y - 1.")
    return z, y


def _batch(x: Tensor) -> Tensor:
    """(..., N, d) -> (R, N, d)."""
    return x.detach().reshape(-1, *x.shape[-2:])


def _reuse(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    return buffer if buffer.shape == shape else buffer.new_empty(shape)


def _particle_axis(f: Tensor, mu: EmpiricalMeasure) -> Tensor:
    """(..., b[, k]) -> (..., 1, b[, k])."""
    return f.unsqueeze(mu.points.ndim - 2)


def _curvature_product(loss: Loss, f: Tensor, y: Tensor, direction: Tensor) -> Tensor:
    """∂²loss/∂f² applied to each particle's direction.    (..., b[, k]), (..., M, b[, k]) -> the same."""
    axis = f.ndim - y.ndim
    with torch.enable_grad():
        at = variable(f.unsqueeze(axis).expand_as(direction))
        (slope,) = _gradient(loss(at, y).sum(), [at], create_graph=True)
        return _gradient((slope * direction).sum(), [at])[0]
