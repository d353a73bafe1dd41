"""The Sinkhorn divergence: a smooth stand-in for W₂² between torch tensors, for gradients and GPUs.

It is solved in its dual by Newton's method along a decreasing ε: Sinkhorn's own iteration needs 10⁵ steps and more
where ε is a tenth of the squared spacing of the points.
"""

from __future__ import annotations

import torch
from torch import Tensor

COOLING = 0.25  # ratio of one ε to the one before
WARMING = 5  # Sinkhorn steps at each ε, before Newton's
ROUGH = 1e-2  # marginal error at which an intermediate ε is left
HALVINGS = 40


def sinkhorn_divergence(x: Tensor, y: Tensor, reg: float, *, iterations: int = 200, tolerance: float = 1e-9) -> Tensor:
    """S_ε(x, y) = OT_ε(x, y) - ½ OT_ε(x, x) - ½ OT_ε(y, y) with cost |x - y|².

    Differentiable in the points (by the envelope theorem, without unrolling), on any device, in O((N + M)³) for each of
    some tens of Newton steps. It is not W₂²; it tends to it as reg → 0. Between samples use `wasserstein.distance`.

    Args:
        x: (N, d) floating tensor.
        y: (M, d), same dtype and device.
        reg: ε > 0, in squared units of the state.
        iterations: most Newton steps at one ε.
        tolerance: on the marginals' error, in total variation.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: points that are not finite, ε <= 0.
        RuntimeError: not converged.

    Source: Feydy, Séjourné, Vialard, Amari, Trouvé, Peyré (2019); Brauer, Clason, Lorenz, Wirth (2017) for Newton.

    """
    if not reg > 0:
        raise ValueError(f"sinkhorn_divergence: reg = {reg}; expected a positive ε in squared units of the state.")
    for name, z in (("x", x), ("y", y)):
        if z.ndim != 2 or not z.is_floating_point() or not bool(torch.isfinite(z).all()):
            raise ValueError(f"sinkhorn_divergence: {name} must be a finite floating tensor (N, d).")
    if x.shape[1] != y.shape[1] or not (len(x) and len(y)) or (x.dtype, x.device) != (y.dtype, y.device):
        raise ValueError(
            f"sinkhorn_divergence: x {tuple(x.shape)} {x.dtype} on {x.device} and y {tuple(y.shape)} {y.dtype} on "
            f"{y.device}; expected points of one dimension, dtype and device, one or more of each."
        )
    parts = [_entropic(u, v, reg, iterations, tolerance) for u, v in ((x, y), (x, x), (y, y))]
    return parts[0] - 0.5 * parts[1] - 0.5 * parts[2]


def _entropic(x: Tensor, y: Tensor, reg: float, iterations: int, tolerance: float) -> Tensor:
    """OT_ε = ⟨C, P⟩ + ε KL(P | p ⊗ q), the optimal plan held fixed: its gradient is right by the envelope theorem."""
    cost = (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)
    with torch.no_grad():
        # In float64 whatever the points are: float32 cannot tell marginals apart where the plan is nearly a matching.
        exact = _Dual(cost.detach().double()).solved(reg, iterations, tolerance)
        relative = torch.xlogy(exact, exact * exact.numel()).sum().to(cost.dtype)
        plan = exact.to(cost.dtype)
    value: Tensor = (plan * cost).sum() + reg * relative
    return value


class _Dual:
    """The potentials f, g of equal masses, and the plan P_ij = e^{(f_i + g_j - C_ij)/ε}/(NM) that they make."""

    def __init__(self, cost: Tensor) -> None:
        self.cost = cost
        n, m = cost.shape
        self.f, self.g = cost.new_zeros(n), cost.new_zeros(m)
        self.p, self.q = cost.new_full((n,), 1 / n), cost.new_full((m,), 1 / m)

    def solved(self, reg: float, iterations: int, tolerance: float) -> Tensor:
        """The optimal plan at ε = reg."""
        eps = max(reg, float(self.cost.max()))
        while eps > reg:
            self._newton(eps, iterations, ROUGH)
            eps = max(reg, COOLING * eps)
        return self._newton(reg, iterations, tolerance)

    def _newton(self, eps: float, iterations: int, tolerance: float) -> Tensor:
        for _ in range(WARMING):
            self.f = -eps * torch.logsumexp((self.g - self.cost) / eps + self.q.log(), dim=1)
            self.g = -eps * torch.logsumexp((self.f.unsqueeze(1) - self.cost) / eps + self.p.log().unsqueeze(1), dim=0)
        for _ in range(iterations):
            plan = self._plan(eps)
            rows, columns = plan.sum(1), plan.sum(0)
            if float((rows - self.p).abs().sum() + (columns - self.q).abs().sum()) < tolerance:
                return plan
            self._step(eps, plan, rows, columns)
        raise RuntimeError(
            f"sinkhorn_divergence between {len(self.p)} and {len(self.q)} points did not converge at ε = {eps:.3g}; "
            "raise reg, iterations or tolerance."
        )

    def _plan(self, eps: float, f: Tensor | None = None, g: Tensor | None = None) -> Tensor:
        f, g = (self.f if f is None else f), (self.g if g is None else g)
        return torch.exp((f.unsqueeze(1) + g - self.cost) / eps) * (self.p.unsqueeze(1) * self.q)

    def _step(self, eps: float, plan: Tensor, rows: Tensor, columns: Tensor) -> None:
        """A damped Newton step on the concave dual ⟨f, p⟩ + ⟨g, q⟩ - ε ΣP."""
        # f is eliminated. What is left is singular along constants, and nearly so between clusters without exchange.
        share = plan / rows.unsqueeze(1)
        schur = torch.diag(columns) - plan.mT @ share
        ridge = torch.finfo(plan.dtype).eps * columns.max()
        schur = schur + torch.outer(columns, columns) + ridge * torch.eye(len(columns)).to(schur)
        right = (self.q - columns) - share.mT @ (self.p - rows)
        dg = torch.linalg.solve(schur, right)
        df = (self.p - rows) / rows - share @ dg
        slope = float(df @ (self.p - rows) + dg @ (self.q - columns))
        length, now = 1.0, self._value(eps, self.f, self.g)
        for _ in range(HALVINGS):
            f, g = self.f + eps * length * df, self.g + eps * length * dg
            if float(self._value(eps, f, g) - now) >= 1e-4 * eps * length * slope - 1e-14 * abs(float(now)):
                break
            length /= 2
        self.f, self.g = f, g

    def _value(self, eps: float, f: Tensor, g: Tensor) -> Tensor:
        return f @ self.p + g @ self.q - eps * self._plan(eps, f, g).sum()
