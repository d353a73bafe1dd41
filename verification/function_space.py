"""Networks as functions: what the mean over neurons learns, how it fluctuates, and what finitely many miss (003)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.integrate import simpson
from scipy.linalg import expm
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Gaussian, Observable
from mfsde.analysis import rates, theory
from mfsde.analysis.check import identity, inequality
from mfsde.gradient_flow import GradientFlow
from mfsde.scenarios import SphericalSpin, StudentTeacher

from .item import Finding, claim, item, misprint, outside

DOUBLE = torch.float64
Array = np.ndarray


# The two targets ------------------------------------------------------------------------------------------------------


@item(
    source="003, (11)–(14), student and teacher",
    statement="½E(f − f_n)² = C_f + ∫F dμ + ½∬K dμdμ with F = −E[f φ], C_f = ½E f², and "
    "E[a·x]₊[b·x]₊ = |a||b|(sin φ + (π − φ)cos φ)/2π on S^{d−1}(√d)",
    hypotheses=("x uniform on the sphere of radius √d (of any radius r, times r²/d)",),
    misprints=(
        "(24) prints C_f − ∫F dμ + ½∬K with the F = −E[yφ] of (12): the sign of ∫F is wrong",
        "(14) prints ℓ = ΣF + (1/2n)ΣK: that is n(ℓ − C_f), with C_f = ½E f², which (24) does not say",
    ),
    fault="the sampled teacher's sum is divided by n_T − 1",
)
def student_teacher(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Means over sampled inputs against sums over pairs of neurons."""
    n_samples, n = (20, 5_000) if quick else (40, 100_000)
    case, five = StudentTeacher(data_dim=5), StudentTeacher(data_dim=5, radius=1.0)
    settings: dict[str, Any] = {"horizon": 20.0, "dt": 0.1, "seed": 0, "save_every": 200, "dtype": DOUBLE}
    run = mfsde.simulate(case, n_particles=40, **settings)
    mu = EmpiricalMeasure(torch.as_tensor(run.position.values[-1, 0]))
    a = torch.arange(1, 6, dtype=DOUBLE)[None] / 3
    b = torch.tensor([[1, -1, 0.5, 0, 0.2]], dtype=DOUBLE)

    pairs, on_unit, losses, squares = (np.empty(n_samples) for _ in range(4))
    for k in range(n_samples):
        x = case.inputs(n, torch.Generator().manual_seed(100 + k))
        f = case.predict(case.teacher, x) * (case.n_teacher / (case.n_teacher - 1) if faulty else 1.0)
        pairs[k] = (torch.relu(x @ a.T) * torch.relu(x @ b.T)).mean()
        unit = five.inputs(n, torch.Generator().manual_seed(200 + k))
        on_unit[k] = (torch.relu(unit @ a.T) * torch.relu(unit @ b.T)).mean()
        losses[k] = 0.5 * (f - case.predict(mu, x)).square().mean()
        squares[k] = 0.5 * f.square().mean()

    known = product_of_units(a[0].numpy(), b[0].numpy())
    yield claim(identity("E ρ(a·x)ρ(b·x), sampled; by quadrature", pairs, known))
    yield claim(identity("the same by the arc-cosine formula", float(case.kernel(a, b)), known))
    yield claim(identity("the same on the unit sphere: 1/d of it", on_unit, float(five.kernel(a, b))))
    yield claim(identity("C_f = ½E f², sampled", squares, case.loss_of_none))
    nothing = EmpiricalMeasure.signed(mu.points, torch.zeros(mu.n_particles, dtype=DOUBLE))
    linear = float(mu.integrate(lambda x: case.potential(nothing, x)))
    c, z = mu.points[:, 0], mu.points[:, 1:]
    double = float(c @ case.kernel(z, z) @ c) / mu.n_particles**2
    n_neurons = mu.n_particles
    # (14) from its own sums over neurons: n(ℓ - C_f).
    sums = n_neurons * (linear + 0.5 * double)
    expanded = case.loss_of_none + sums / n_neurons
    yield claim(identity("loss of a half-trained student, sampled", losses, expanded))
    yield misprint(identity("(24) as printed: C_f − ∫F + ½∬K", losses, expanded - 2 * linear))
    yield misprint(identity("(14) as printed: ℓ = ΣF + (1/2n)ΣK", losses, sums))


def product_of_units(a: Array, b: Array) -> float:
    """E [a·x]_+[b·x]_+ for x uniform on S^{d-1}(√d), by quadrature over the angle of x in the plane of a and b.

    The projection on that plane has a uniform angle and E|Px|² = 2, whatever d.
    """
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    apart = math.acos(float(a @ b) / lengths)
    # Where both units are active: the integrand is smooth.
    nodes, weights = np.polynomial.legendre.leggauss(40)
    half = (math.pi - apart) / 2
    angle = apart / 2 + half * nodes
    return 2 * lengths * float(weights @ (np.cos(angle) * np.cos(angle - apart))) * half / (2 * math.pi)


@item(
    source="003, spherical 3-spin",
    statement="f(x) = d⁻¹ Σ a_pqr x_p x_q x_r on S^{d−1}(√d): E_a E_x f² = d, and a network of bounded units with "
    "biases learns it from fresh samples, beyond its linear part",
    hypotheses=("a_pqr independent N(0, 1)", "units that are not odd-linear: ReLU without bias has a linear odd part"),
    fault="the inputs are N(0, I_d) instead of uniform on the sphere",
)
def three_spin(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Sixth moments of the sphere, and stochastic gradient descent."""
    case = SphericalSpin()
    d = case.data_dim
    couplings = [replace(case, coupling_seed=k) for k in range(100 if quick else 400)]

    def inputs(seed: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, d, generator=generator, dtype=DOUBLE) if faulty else case.inputs(n, generator)

    # Other numbers than those of the couplings, which their seed has drawn.
    over_couplings = np.array([float(k.target(inputs(9000 + k.coupling_seed, 500)).square().mean()) for k in couplings])
    yield claim(identity(f"E_a E_x f², d = {d}, over {len(couplings)} couplings", over_couplings, float(d)))
    exact = np.array([k.mean_square for k in couplings])
    yield claim(identity("the same with E_x f² exact for each coupling", exact, float(d)))
    samples = np.array([float(case.target(inputs(1000 + k, 5_000)).square().mean()) for k in range(20)])
    yield claim(identity("E_x f² of one coupling, sampled; 6th moments", samples, case.mean_square))

    settings: dict[str, Any] = {
        "n_particles": 128,
        "n_replicas": 8,
        "seed": 0,
        "horizon": 4.0 if quick else 20.0,
        "dt": 0.01,
    }
    run = mfsde.simulate(case, method="sgd", save_every=400, **settings)
    trained = run.loss.isel(time=-1).values
    linear = 0.5 * (case.mean_square - float(linear_part(case).square().sum()))
    yield claim(inequality(f"loss at t = {settings['horizon']:g} of SGD ≤ that of the linear fit", trained, linear))

    # On inputs ±x the odd part of a fit by ReLU units without bias is a linear fit, and its even part is of no use.
    half = case.inputs(300, torch.Generator().manual_seed(5))
    z = case.inputs(75, torch.Generator().manual_seed(6))
    both, units = torch.cat([half, -half]), torch.cat([z, -z])
    stuck, fitted = (least_loss(features, case.target(both)) for features in (torch.relu(both @ units.T), both))
    yield claim(identity("least loss of 150 ReLU units without bias; linear", stuck, fitted))


def linear_part(case: SphericalSpin) -> Tensor:
    """The b that minimises E (f - b·x)²: E f x = 3 Σ_q s_pqq/(d + 2), s the symmetrised couplings."""
    a = case.couplings
    traces = torch.einsum("pqq->p", a) + torch.einsum("qpq->p", a) + torch.einsum("qqp->p", a)
    return traces / (case.data_dim + 2)


def least_loss(features: Tensor, y: Tensor) -> float:
    """min_c ½ mean (y - features c)²."""
    # The features are linearly dependent: by an orthonormal basis of their span.
    u, size, _ = torch.linalg.svd(features, full_matrices=False)
    basis = u[:, size > 1e-10 * size[0]]
    return 0.5 * float((y - basis @ (basis.T @ y)).square().mean())


# Features drawn, weights learnt ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights(GradientFlow):
    """c' = -(1/P) Σ_s (f_t(x_s) - f(x_s)) [x_s·z]_+ - decay c and z' = 0: the features stay.

    P inputs on the sphere of a student and its teacher stand for ν.
    """

    of: StudentTeacher
    decay: float = 0.0
    n_data: int = 30

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs (P, d) and targets (P,)."""
        x = self.of.inputs(self.n_data, torch.Generator().manual_seed(1))
        return x, self.of.predict(self.of.teacher, x)

    def smooth_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-∂V/∂c, and the decay."""
        inputs, y = self.data
        hidden = torch.relu(x[..., 1:] @ inputs.T)
        residual = (self.of.predict(mu, inputs) - y) / len(y)
        of_weights = hidden @ residual.unsqueeze(-1) + self.decay * x[..., :1]
        return torch.cat([-of_weights, torch.zeros_like(x[..., 1:])], dim=-1)

    def initial(self) -> mfsde.Law:
        """The student's."""
        return self.of.initial()


@item(
    source="003, (6)–(7), random features",
    statement="training c only: f_t − f = e^{−Kt}(f_0 − f), K(x, x') = ∫φ̂(x, z)φ̂(x', z) dτ; with n features "
    "n E|K_n − K|² = Var φ̂φ̂, K the arc-cosine kernel for ReLU and Gaussian z",
    hypotheses=(
        "z_i independent with law τ, and fixed; f an element of the space or any function of L²(ν)",
        "squared loss, the mean over ν (30 inputs here)",
        "∫φ̂² dτ < ∞ for K, ∫φ̂⁴ dτ < ∞ for the variance",
    ),
    misprints=("(6) prints |γ|_TV ≤ ∞, which is no condition: < ∞ is meant",),
    fault="the weights have a decay of 0.02 that the exponential does not know",
)
def random_features(quick: bool, faulty: bool) -> Iterator[Finding]:
    """The kernel of a drawn network, its exponential, and the kernel's own Monte Carlo error."""
    student = StudentTeacher(data_dim=5)
    case = Weights(student, decay=0.02 if faulty else 0.0)
    inputs, y = case.data
    settings: dict[str, Any] = {
        "n_particles": 40,
        "n_replicas": 8,
        "horizon": 20.0,
        "dt": 0.5,
        "seed": 0,
        "save_every": 10,
    }
    run = mfsde.simulate(case, method="dopri5", dtype=DOUBLE, **settings)
    x = torch.as_tensor(run.position.values)
    f = student.predict(EmpiricalMeasure(x), inputs) - y
    features = torch.relu(x[0, ..., 1:] @ inputs.T)
    kernel = (features.mT @ features).numpy() / (settings["n_particles"] * case.n_data)
    for frame in (1, -1):
        t = float(run.time[frame])
        stated = np.stack([expm(-t * k) @ g for k, g in zip(kernel, f[0].numpy(), strict=True)])
        # By the first principal direction too, which decays at the largest eigenvalue of K.
        yield claim(
            identity(
                f"½‖f_t − f‖² at t = {t:g}, n = 40, trained; e^(−Kt)",
                0.5 * f[frame].square().mean(-1).numpy(),
                0.5 * np.square(stated).mean(-1),
                discretisation=1e-8 * float(f[0].square().mean()),
            )
        )
        worst = np.abs(stated - f[frame].numpy()).max() / float(f[0].abs().max())
        yield claim(identity(f"largest |f_t − f − e^(−Kt)(f_0 − f)|, t = {t:g}", worst, 0.0, discretisation=1e-7))

    # K of n features against the arc-cosine kernel, with its exact variance.
    pair, scale = inputs[:2], student.data_dim
    cosine = float(pair[0] @ pair[1]) / scale
    mean, variance = moments_of_pairs(cosine)
    sizes, r = [25, 50, 100, 200, 400, 800], 200 if quick else 2000
    errors = np.empty((len(sizes), r))
    for row, n in zip(errors, sizes, strict=True):
        z = torch.randn(r, n, student.data_dim, generator=torch.Generator().manual_seed(n), dtype=DOUBLE) / scale**0.5
        row[:] = (torch.relu(z @ pair[0]) * torch.relu(z @ pair[1])).mean(-1).numpy() - mean
    yield claim(identity("K_n(x, x') of 800 features; arc-cosine", errors[-1] + mean, mean))
    yield claim(identity("n E|K_n − K|², n = 800; Var φ̂φ̂ exact", 800 * np.square(errors[-1]), variance))
    table = xr.DataArray(
        np.square(errors), dims=("n_particles", "replica"), coords={"n_particles": sizes, "replica": np.arange(r)}
    )
    slope = rates.power(table)
    yield claim(identity("slope of the RMS error of K_n in n", slope.value / 2, -0.5, stderr=slope.stderr / 2))


def moments_of_pairs(cosine: float) -> tuple[float, float]:
    """Mean and variance of [u]_+[v]_+, u and v standard normal of this correlation: arc-cosine, orders 1 and 2."""
    angle = math.acos(cosine)
    sine, rest = math.sin(angle), math.pi - angle
    mean = (sine + rest * cosine) / (2 * math.pi)
    square = (3 * sine * cosine + rest * (1 + 2 * cosine**2)) / (2 * math.pi)
    return mean, square - mean**2


# Energy along the flow ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Descent(GradientFlow):
    """θ' = -(∇F + share ∫∇K dμ) - decay θ of a student; share 1 and decay 0 is the gradient flow."""

    of: StudentTeacher
    share: float = 1.0
    decay: float = 0.0

    def smooth_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """By parts: ∇F is the slope under a student that is 0."""
        whole = self.of.smooth_drift(t, x, mu)
        if self.share != 1:
            nothing = EmpiricalMeasure.signed(mu.points, torch.zeros_like(mu.points[..., 0]))
            alone = self.of.smooth_drift(t, x, nothing)
            whole = alone + self.share * (whole - alone)
        return whole - self.decay * x

    def initial(self) -> mfsde.Law:
        """The student's."""
        return self.of.initial()


@item(
    source="003, (21)–(24), (28)",
    statement="dE/dt = −∫|∇V|² dμ, d/dt ∫χ dμ = −∫∇χ·∇V dμ, and E is convex along mixtures of measures",
    hypotheses=("V = F + ∫K dμ is the first variation of E", "K symmetric and positive semi-definite"),
    misprints=(
        "the weak form before (21) prints ∫χ ∂_tμ = +∫∇χ·(∇F + ∫∇K dμ) dμ: along it E grows; a minus is missing",
        "(19) prints ∇·∇(ρ∇V): the divergence is applied once, ∇·(ρ∇V) + β⁻¹Δρ",
    ),
    fault="the drift counts the interaction with the ½ of the energy: −(∇F + ½∫∇K dμ)",
)
def energy_decrease(quick: bool, faulty: bool) -> Iterator[Finding]:
    """A student's energy against its dissipation, by Simpson's rule over the saved frames and over every other."""
    # |z| > |c| at the start, and so for ever: no neuron comes to z = 0, where the flow is not smooth.
    student = StudentTeacher(initial_deviation=0.2)
    flow = Descent(student, share=0.5 if faulty else 1.0)
    settings: dict[str, Any] = {
        "n_particles": 30 if quick else 100,
        "n_replicas": 8,
        "horizon": 8.0,
        "dt": 0.1,
        "seed": 0,
    }
    run = mfsde.simulate(flow, method="dopri5", dtype=DOUBLE, save_every=1, **settings)
    x = torch.as_tensor(run.position.values)
    mu = EmpiricalMeasure(x)
    slope = -student.smooth_drift(0.0, x, mu)
    energy = student.energy(mu).numpy()

    for last in (len(x) - 1, 40):
        told = f"t = 0 to {float(run.time[last]):g}, n = {settings['n_particles']}"
        lost = energy[0] - energy[last]
        dissipated, error = over_time(slope[: last + 1].square().sum(-1).mean(-1).numpy(), settings["dt"])
        yield claim(identity(f"E(0) − E(t); ∫∫|∇V|² dμ dt, {told}", lost, dissipated, discretisation=error))

    # χ(c, z) = tanh²(c) (1 + ½ sin(√d z_1)).
    root = student.data_dim**0.5
    c, z = torch.tanh(x[..., 0]), root * x[..., 1]
    test = (c.square() * (1 + 0.5 * torch.sin(z))).mean(-1).numpy()
    along = 2 * c * (1 - c.square()) * (1 + 0.5 * torch.sin(z)) * slope[..., 0]
    along = along + 0.5 * root * c.square() * torch.cos(z) * slope[..., 1]
    flux, error = over_time(along.mean(-1).numpy(), settings["dt"])
    yield claim(identity("change of ∫χ dμ; −∫∫∇χ·∇V dμ dt", test[-1] - test[0], -flux, discretisation=error))
    yield misprint(identity("as printed, without the minus", test[-1] - test[0], flux, discretisation=error))

    # A mixture lies below the chord by ½ε(1 - ε) E|f_μ - f_ν|².
    n, share = settings["n_particles"], 0.75
    first, second = EmpiricalMeasure(x[0, 0]), EmpiricalMeasure(x[-1, 1])
    weights = torch.tensor([1 - share, share]).repeat_interleave(n) / n
    mixed = EmpiricalMeasure(torch.cat([first.points, second.points]), weights)
    chord = (1 - share) * student.energy(first) + share * student.energy(second) - student.energy(mixed)
    distances = []
    for k in range(20):
        inputs = student.inputs(2_000 if quick else 20_000, torch.Generator().manual_seed(100 + k))
        distances.append(float((student.predict(first, inputs) - student.predict(second, inputs)).square().mean()))
    sampled = 0.5 * share * (1 - share) * np.array(distances)
    yield claim(identity("½ε(1−ε)E|f_μ − f_ν|², sampled; chord − E(mixture)", sampled, float(chord)))
    smallest = theory.convexity_gap(student.energy, [EmpiricalMeasure(x[k, 0]) for k in (0, 20, 40, 80)])
    yield claim(inequality("smallest gap of E along mixtures ≥ 0", 0.0, smallest))


def over_time(values: Array, h: float) -> tuple[Array, float]:
    """Simpson's rule over frames a step h apart, (T, ...) -> (...), and its distance to that over every other frame."""
    fine: Array = simpson(values, dx=h, axis=0)
    coarse = simpson(values[::2], dx=2 * h, axis=0)
    return fine, float(np.abs(fine - coarse).max())


# Where training ends --------------------------------------------------------------------------------------------------


@item(
    source="003, (29)–(30), global convergence",
    statement="if μ_t → μ*, μ* minimises E: V(θ, μ*) ≥ V̄ everywhere with equality on supp μ*, and "
    "lim_t lim_n f_t^{(n)} = f for f ∈ F₁; for any μ, 2E(μ) = V̄ − ∫V dμ_f where μ_f represents f",
    hypotheses=(
        "homogeneous units",
        "the support of μ_0 separates: weights of both signs in all directions",
        "f ∈ F₁",
        "measured: E falls like a power of t or faster, and like 1/n or faster",
    ),
    misprints=(
        "the short form prints lim_n lim_t f_t^{(n)} = f; (30) gives lim_t lim_n (000, Lemma C.15: both, for E)",
    ),
    fault="the run has a weight decay of 0.003 that V does not know",
)
def global_optimality(quick: bool, faulty: bool) -> Iterator[Finding]:
    """A student in the plane, trained long; what is left is extrapolated from t/4, t/2 and t."""
    student = StudentTeacher(data_dim=2)
    settings: dict[str, Any] = {
        "n_particles": 60 if quick else 200,
        "n_replicas": 4,
        "horizon": 100.0 if quick else 400.0,
        "dt": 0.2,
    }
    settings |= {"seed": 0, "dtype": DOUBLE, "save_every": round(settings["horizon"] / settings["dt"] / 4)}
    told = f"t = {settings['horizon']:g}, n = {settings['n_particles']}"
    run = mfsde.simulate(Descent(student, decay=0.003 if faulty else 0.0), **settings)
    states = [EmpiricalMeasure(torch.as_tensor(frame)) for frame in run.position.values[[0, 1, 2, 4]]]
    seen = separation(states[0])

    losses = [student.energy(mu).numpy() for mu in states]
    limit, left = extrapolated(losses)
    yield claim(identity(f"E as t → ∞, {told}", limit, 0.0, discretisation=left, hypotheses=[seen]))
    # The other order: n → ∞ at t/4, t/2 and t from n/2 and n neurons, and then t → ∞.
    fewer = {**settings, "n_particles": settings["n_particles"] // 2}
    run = mfsde.simulate(Descent(student, decay=0.003 if faulty else 0.0), **fewer)
    late = [EmpiricalMeasure(torch.as_tensor(frame)) for frame in run.position.values[[1, 2, 4]]]
    in_n = [2 * now - student.energy(mu).numpy() for now, mu in zip(losses[-3:], late, strict=True)]
    at_n, (limit, left) = limit, extrapolated(in_n)
    # What falls faster than 1/n is between the two.
    apart = left + float(np.abs((limit - at_n).mean()))
    yield claim(identity("E as n → ∞, then t → ∞", limit, 0.0, discretisation=apart, hypotheses=[seen]))
    angle = torch.arange(720, dtype=DOUBLE) * (2 * math.pi / 720)
    grid = torch.stack([angle.cos(), angle.sin()], -1)
    # θ on the unit sphere of R³: V = cG(z) is least at c = -|z| sign G = ±1/√2.
    half = 0.5**0.5 * torch.ones(720, 1, dtype=DOUBLE)
    both = torch.cat([torch.cat([half, half * grid], -1), torch.cat([-half, half * grid], -1)])
    spreads = []
    for mu in states:
        own = student.potential(mu, mu.points)
        mean = own.mean(-1, keepdim=True)
        spreads.append((own - mean).abs().amax(-1).numpy())
    depth, means = (mean - student.potential(states[-1], both)).amax(-1).numpy(), mean[..., 0].numpy()
    # V = ⟨f_μ - f, cφ̂(z)⟩ and ‖φ̂(z)‖ = |z|/√2: (29) is off by no more than the loss, which goes to 0.
    allowed = np.abs(means) + 0.5 * np.sqrt(losses[-1])
    yield claim(inequality("max (V̄ − V) over |c||z| = ½, at t ≤ |V̄| + ½√E", depth, allowed, hypotheses=[seen]))
    limit, left = extrapolated(spreads)
    yield claim(identity("max |V − V̄| over supp μ_t as t → ∞", limit, 0.0, discretisation=left, hypotheses=[seen]))
    last = states[-1]
    gap = student.potential(last, last.points).mean(-1) - student.potential(last, student.teacher.points).mean(-1)
    rounding = 1e-14 * student.loss_of_none
    yield claim(identity("V̄ − ∫V dμ_f at t; 2E(μ_t)", gap.numpy(), 2 * losses[-1], discretisation=rounding))

    # c > |z| for all neurons: c² - |z|² is conserved, no weight turns negative, and neither does the network.
    narrow = replace(student, initial_mean=2.0, initial_deviation=0.1, initial_spread=0.3)
    run = mfsde.simulate(Descent(narrow), **settings)
    states = [EmpiricalMeasure(torch.as_tensor(frame)) for frame in run.position.values[[0, 1, 2, 4]]]
    losses = [student.energy(mu).numpy() for mu in states]
    limit, left = extrapolated(losses)
    seen = separation(states[0])
    told = "E as t → ∞, support that does not separate"
    yield outside(identity(told, limit, 0.0, discretisation=left, hypotheses=[seen]))
    inputs = student.inputs(200_000, torch.Generator().manual_seed(0))
    negative = 0.5 * student.predict(student.teacher, inputs).clamp(max=0).square().view(20, -1).mean(-1).numpy()
    yield claim(inequality("½E min(f, 0)² ≤ its loss, however long", negative, float(losses[-1].min())))


def separation(start: EmpiricalMeasure) -> str:
    """What the signs of the initial weights, and their balance with places, exclude; empty where nothing."""
    c, length = start.points[..., 0], start.points[..., 1:].norm(dim=-1)
    for sign, name in ((1, "positive"), (-1, "negative")):
        if bool((sign * c > length).all()):
            return f"all {c.numel()} initial weights are {name} with |c| > |z|: neurons of the other sign never appear"
    return ""


def extrapolated(values: list[Array]) -> tuple[Array, float]:
    """From the values at t/4, t/2 and t of what falls like a power of t or faster: its limit, and how far it is to go.

    Each doubling of t leaves the same share q of the change, so that q/(1 - q) of the last one is to come; what does
    not slow down is taken where it is.
    """
    early, before, now = values[-3:]
    share = float(np.abs(np.mean(now - before)) / max(np.abs(np.mean(before - early)), 1e-300))
    ahead = share / (1 - share) * (now - before) if share < 1 else 0.0 * now
    return now + ahead, float(np.abs(ahead).max())


# The law of large numbers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearUnits:
    """θ = (c, z): dc = -z·h dt, dz = -c h dt, h = u - target, u = ∫ c z dμ: the network f(x) = u·x of linear units.

    x ~ N(0, I), so E = ½|h|². Every neuron moves by the same matrix, θ' = -Hθ, so that S = ∫ θθᵀ dμ solves a closed
    equation, S' = -HS - SH: for the limit and, from its own S_0, for every n. Gaussian laws stay Gaussian.

    Args:
        target: u of the target.
        spread: θ ~ N(0, spread² I).
        speed: of c against z, 1 for the gradient flow.

    """

    target: tuple[float, ...] = (1.0, 0.5)
    spread: float = 0.7
    speed: float = 1.0

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-Hθ."""
        h = mu.integrate(lambda y: y[..., :1] * y[..., 1:]).unsqueeze(-2) - x.new_tensor(self.target)
        return -torch.cat([self.speed * (x[..., 1:] * h).sum(-1, keepdim=True), x[..., :1] * h], dim=-1)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """None."""
        return 0.0

    def initial(self) -> Gaussian:
        """N(0, spread² I)."""
        return Gaussian([0.0] * (1 + len(self.target)), self.spread**2)

    def observables(self) -> tuple[Observable | str, ...]:
        """The network u."""
        network = Observable(
            "network", lambda t, x, mu: mu.integrate(lambda y: y[..., :1] * y[..., 1:]), "1", "u = ∫ c z dμ", ("input",)
        )
        return (network,)

    def second_moments(self, start: Tensor, n_steps: int, dt: float) -> Tensor:
        """S after every step of Euler's method, (n_steps + 1, ..., 1 + d, 1 + d), from S_0 (..., 1 + d, 1 + d)."""
        target, found = torch.tensor(self.target, dtype=start.dtype), [start]
        identity_matrix = torch.eye(1 + len(target), dtype=start.dtype)
        for _ in range(n_steps):
            s = found[-1]
            h = s[..., :1, 1:] - target
            step = identity_matrix - dt * symmetric(h)
            found.append(step @ s @ step.mT)
        return torch.stack(found)


def symmetric(h: Tensor) -> Tensor:
    """The matrix with h (..., 1, d) in its first row and column, and else 0."""
    corner = h.new_zeros((*h.shape[:-1], 1))
    below = torch.cat([h.mT, h.new_zeros((*h.shape[:-2], h.shape[-1], h.shape[-1]))], dim=-1)
    return torch.cat([torch.cat([corner, h], dim=-1), below], dim=-2)


@item(
    source="003, (25)–(27), law of large numbers",
    statement="∂_t f_t = −∫M([μ_t], x, x')(f_t − f)(x') ν(dx'), M = ∫∇φ·∇φ dμ positive semi-definite, and "
    "sup_{t ≤ T} |f_t^{(n)} − f_t| → 0, at the rate n^{−1/2}",
    hypotheses=("θ_i(0) independent of law μ_0", "units differentiable with moments that make M finite"),
    fault="the weights c learn a fifth faster than the places z",
)
def law_of_large_numbers(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Linear units, whose f_t is known for every n; M of tanh units, by its formula and by differentiation."""
    yield from _linear_networks(LinearUnits(speed=1.2 if faulty else 1.0), quick)
    yield from _tangent_kernel_of_tanh()


def _linear_networks(linear: LinearUnits, quick: bool) -> Iterator[Finding]:
    """f_t^(n) against (26) of the same neurons, and against f_t for growing n."""
    settings: dict[str, Any] = {
        "n_replicas": 40 if quick else 200,
        "horizon": 4.0,
        "dt": 0.05,
        "seed": 0,
        "save_every": 1,
    }
    settings |= {"dtype": DOUBLE, "keep_particles": 0}
    sizes = [50, 100, 200, 400] if quick else [50, 100, 200, 400, 800, 1600]
    path = linear.second_moments(linear.initial().cov, 80, settings["dt"])[:, 0, 1:].numpy()
    starts, errors = {}, []
    for n in sizes:
        run = mfsde.simulate(linear, n_particles=n, **settings)
        found = run.network.transpose("time", "replica", "input").values
        starts[n] = found
        errors.append(np.linalg.norm(found - path[:, None], axis=-1).max(0))
    # From the second moments of the same neurons, drawn once more.
    n = sizes[0]
    first = mfsde.simulate(linear, n_particles=n, **{**settings, "horizon": 0.05, "keep_particles": n})
    x = torch.as_tensor(first.position.values[0])
    own = linear.second_moments(x.mT @ x / n, 80, settings["dt"])[..., 0, 1:].numpy()
    worst = np.abs(own - starts[n]).max(-1)
    for frame in (20, 80):
        t, rounding = frame * settings["dt"], 1e-12
        size = np.linalg.norm(starts[n][frame], axis=-1)
        exact = np.linalg.norm(own[frame], axis=-1)
        yield claim(identity(f"|f_t^(n)| at t = {t:g}, n = {n}; (26) solved", size, exact, discretisation=rounding))
    yield claim(identity("largest |f_t^(n) − (26) solved|", worst.max(0), 0.0 * worst[0], discretisation=1e-12))
    table = xr.DataArray(
        np.stack(errors), dims=("n_particles", "replica"),
        coords={"n_particles": sizes, "replica": np.arange(settings["n_replicas"])},
    )  # fmt: skip
    slope = rates.power(table)
    told = f"slope of the largest |f_t^(n) − f_t|, t ≤ 4, |x| ≤ 1, in n ≤ {sizes[-1]}"
    yield claim(identity(told, slope.value, -0.5, stderr=slope.stderr))


def _tangent_kernel_of_tanh() -> Iterator[Finding]:
    """(26) along a run, and (27) against differentiation."""
    spins = SphericalSpin(data_dim=3, n_data=40, scale=3.0)
    h = 0.01
    run = mfsde.simulate(
        spins, n_particles=50, n_replicas=4, horizon=1.0, dt=h, seed=0, save_every=1, dtype=DOUBLE, method="dopri5"
    )
    inputs, y = spins.energy.data(torch.zeros(1, dtype=DOUBLE))
    states = [EmpiricalMeasure(torch.as_tensor(frame)) for frame in run.position.values]
    f = torch.stack([spins.energy.predict(mu, inputs) for mu in states]).numpy()
    at = 50
    mu = states[at]
    kernel = tangent_kernel(spins, mu, inputs)
    stated = -(kernel @ (torch.as_tensor(f[at]) - y).unsqueeze(-1)).squeeze(-1).numpy() / len(y)
    fine, coarse = (f[at + 1] - f[at - 1]) / (2 * h), (f[at + 2] - f[at - 2]) / (4 * h)
    error = float(np.abs(fine - coarse).mean())
    along = np.sign(stated)
    yield claim(
        identity(
            "mean |∂_t f_t| of tanh units; |∫M(f_t − f)|", (along * fine).mean(-1), (along * stated).mean(-1),
            discretisation=error,
        )
    )  # fmt: skip
    slopes = by_differentiation(spins, mu.points[0], inputs)
    norms = float(kernel[0].norm()), float(slopes.norm())
    yield claim(identity("M(x, x') by (27), Frobenius norm; by autodiff", *norms))
    apart = float((kernel[0] - slopes).norm() / slopes.norm())
    yield claim(identity("|M by (27) − M by autodiff| / |M|", apart, 0.0, discretisation=1e-12))
    smallest = float(torch.linalg.eigvalsh(kernel).min() / torch.linalg.eigvalsh(kernel).max())
    yield claim(inequality("0 ≤ least eigenvalue of M, of the largest", 0.0, smallest, discretisation=1e-13))


def tangent_kernel(case: SphericalSpin, mu: EmpiricalMeasure, inputs: Tensor) -> Tensor:
    """M = scale² ∫ (c² ∇_z h·∇_z h + h h) dμ of tanh units at inputs with their constant, (..., P, P): (27)."""
    value = torch.tanh(mu.points[..., :-1] @ inputs.T)
    moving = mu.points[..., -1:] * (1 - value.square())
    return case.scale**2 / mu.n_particles * (value.mT @ value + (moving.mT @ moving) * (inputs @ inputs.T))


def by_differentiation(case: SphericalSpin, theta: Tensor, inputs: Tensor) -> Tensor:
    """The same from the derivatives of the units themselves.    theta: (N, d + 2)."""
    unit = mfsde.Neuron(case.activation, scale=case.scale)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: unit(one[None, None], inputs)[0]))(theta)
    return torch.einsum("nsk,nrk->sr", jacobian, jacobian) / len(theta)


# The central limit theorem --------------------------------------------------------------------------------------------


@item(
    source="003, (31)–(32), central limit theorem",
    statement="√n(f_t^{(n)} − f_t) → g_t, Gaussian and of mean 0, with "
    "∂_t g_t = −∫M([ω_t])(f_t − f)dν − ∫M([μ_t]) g_t dν; lim_t lim_n n E∫|f_t^{(n)} − f_t|² dν ≤ ∫K(θ, θ) dμ* − ∫f² dν "
    "with 0 on the left for f ∈ F₁",
    hypotheses=("θ_i(0) independent of law μ_0", "units differentiable twice", "for (32): μ_t → μ*"),
    misprints=(
        "after (32), “goes to zero for functions in F₁” reads as of the bound: it is the left side that vanishes",
    ),
    fault="each neuron moves in the field of the limit f_t instead of that of f_t^{(n)}: independent copies",
    cost=1.0,
)
def central_limit(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Linear units, where (31) is the tangent of a closed equation; tanh units, where it is solved by quadrature."""
    linear, dt = LinearUnits(), 0.05
    n, r, horizon = (500, 300, 4.0) if quick else (1000, 3000, 4.0)
    n_steps = round(horizon / dt)
    path = linear.second_moments(linear.initial().cov, n_steps, dt)
    scenario: Any = linear
    if faulty:
        scenario = mfsde.decoupled(linear, lambda t: Gaussian([0.0] * 3, path[round(t / dt)]))
    settings: dict[str, Any] = {
        "n_particles": n,
        "n_replicas": r,
        "horizon": horizon,
        "dt": dt,
        "seed": 0,
        "save_every": 10,
    }
    run = mfsde.simulate(scenario, keep_particles=0, dtype=DOUBLE, **settings)
    found = run.network.transpose("time", "replica", "input").values
    limit = path[::10, 0, 1:].numpy()
    scaled = n * np.square(found - limit[:, None]).sum(-1)
    tangents = linear_covariances(linear, n_steps, dt)[::10]
    for t in (0.0, 0.5, 1.0, 2.0):
        frame = round(t / (10 * dt))
        stated = float(tangents[frame].trace())
        yield claim(identity(f"n E∫|f_t^(n) − f_t|², t = {t:g}, n = {n}, linear; (31)", scaled[frame], stated))
    frame = round(1.0 / (10 * dt))
    independent = variance_of_units(path[10 * frame])
    yield claim(inequality("t = 1: interacting ≤ independent neurons of law μ_t", scaled[frame], independent))
    normalised = (found[frame] - limit[frame])[:, 0] * (n / float(tangents[frame][0, 0])) ** 0.5
    yield claim(identity("variance of g_t(e_1) over that of (31), t = 1", np.square(normalised), 1.0))
    yield claim(identity("fourth moment of it, t = 1; 3 of a Gaussian", normalised**4, 3.0))

    # (32), at a time at which the limit has converged; its left side from t = 1, 2 and 4.
    bound = variance_of_units(path[-1])
    yield claim(inequality(f"(32) at t = {horizon:g}: left ≤ right", scaled[-1], bound))
    going, left = extrapolated([scaled[k].mean() for k in (2, 4, 8)])
    yield claim(identity("its left side as t → ∞", float(going), 0.0, discretisation=left))
    yield misprint(identity("its right side goes to 0 on F₁", bound, 0.0))

    # tanh units on data: the scatter of replicas against the tangent of the flow of μ_t.
    spins = SphericalSpin(data_dim=2, n_data=20, scale=3.0)
    n, r = (200, 300) if quick else (400, 2000)
    settings = {"n_particles": n, "n_replicas": r, "horizon": 1.0, "dt": dt, "seed": 0, "save_every": 10}
    run = mfsde.simulate(spins, dtype=DOUBLE, **settings)
    inputs, _ = spins.energy.data(torch.zeros(1, dtype=DOUBLE))
    for k, stated in enumerate(tanh_variances(spins, dt, [0, 10, 20])):
        f = spins.energy.predict(EmpiricalMeasure(torch.as_tensor(run.position.values[k])), inputs).numpy()
        scatter = n * r / (r - 1) * np.square(f - f.mean(0)).mean(-1)
        yield claim(identity(f"n Var f_t^(n), t = {10 * k * dt:g}, n = {n}, tanh; (31)", scatter, stated))


def linear_covariances(case: LinearUnits, n_steps: int, dt: float) -> Tensor:
    """Covariance of g_t as a vector u after every step, (n_steps + 1, d, d): J Cov Jᵀ, J the tangent of S_0 ↦ u_t.

    √n(S_0^(n) - S_0) is Gaussian with Cov(θ_i θ_j, θ_k θ_l) = S_ik S_jl + S_il S_jk for Gaussian θ, and u_t a smooth
    function of S_0: the linearised equation (31) for these units, in closed form.
    """
    start = case.initial().cov
    jacobian = torch.autograd.functional.jacobian(
        lambda s: case.second_moments(s, n_steps, dt)[:, 0, 1:], start, vectorize=True
    )
    through = torch.einsum("taij,ik,jl->takl", jacobian, start, start)
    return torch.einsum("takl,tbkl->tab", through, jacobian + jacobian.mT)


def variance_of_units(s: Tensor) -> float:
    """∫ c²|z|² dμ - |u|² for the Gaussian μ of second moments s: n E|f^(n) - f|² of independent neurons of law μ."""
    return float(s[0, 0] * s.diagonal()[1:].sum() + s[0, 1:].square().sum())


def tanh_variances(case: SphericalSpin, dt: float, frames: list[int]) -> list[float]:
    """E g_t² of (31), mean over the data, after these steps of Euler's method.

    μ_0 is a quadrature Σ p_i δ_{θ_i}; f_t of its flow is differentiated along the masses, D_i = ∂f_t/∂p_i by reverse
    accumulation. With ω_0 the white noise of independent neurons, g_t = ∫ D dω_0 and E g_t² = Σ p_i (D_i - Σ p_j D_j)².
    """
    inputs, y = case.energy.data(torch.zeros(1, dtype=DOUBLE))
    start = case.initial().as_measure()

    def networks(masses: Tensor) -> Tensor:
        x, found = start.points, []
        for step in range(max(frames) + 1):
            value = torch.tanh(x[:, :-1] @ inputs.T)
            f = case.scale * (masses * x[:, -1]) @ value
            if step in frames:
                found.append(f)
            pull = (case.scale / len(y)) * (y - f)
            moving = x[:, -1:] * ((1 - value.square()) * pull) @ inputs
            x = x + dt * torch.cat([moving, (value @ pull).unsqueeze(-1)], dim=-1)
        return torch.stack(found)

    slopes = torch.autograd.functional.jacobian(networks, start.weights)
    centred = slopes - (slopes * start.weights).sum(-1, keepdim=True)
    return [float(v) for v in (centred.square() * start.weights).sum(-1).mean(-1)]


# Trained loss against n -----------------------------------------------------------------------------------------------


@item(
    source="003, loss against n; (31)–(32)",
    statement="E ℓ(f_t^{(n)}) = ℓ(f_t) + O(1/n), whatever the dimension; 2n(E ℓ(f_t^{(n)}) − ℓ(f_t)) stays below "
    "∫K(θ, θ) dμ_t − ∫f_t² dν, its value for independent neurons of law μ_t, once f_t is near f",
    hypotheses=(
        "θ_i(0) independent of law μ_0",
        "t fixed as n grows",
        "three spins: n so small that later orders in 1/n count; what is held is a fall no slower than 1/n",
    ),
    fault="the loss is that of the first 8 neurons, those that the run kept",
    cost=1.0,
)
def loss_against_n(quick: bool, faulty: bool) -> Iterator[Finding]:
    """A ReLU student of a wide teacher on its exact loss; tanh units on three spins, by fresh samples."""
    student = StudentTeacher(data_dim=3, n_teacher=100, initial_spread=2.0)
    sizes, large, r, horizon = ([16, 32, 64, 128], 320, 16, 2.0) if quick else ([16, 32, 64, 128], 384, 40, 10.0)
    settings: dict[str, Any] = {
        "n_replicas": r,
        "horizon": horizon,
        "dt": 0.1,
        "seed": 0,
        "save_every": round(horizon / 0.1),
    }
    losses = {n: trained_loss(student, n, faulty and n != large, **settings) for n in (*sizes, large)}
    # ℓ(f_t^(n)) - ℓ(f_t^(N)) is C/n - C/N: freed of the N-neuron network's own share, it is C/n.
    excess = {n: (losses[n] - losses[large]) / (1 - n / large) for n in sizes}
    slope = rates.power(table_of(excess))
    told = f"slope in n of E ℓ(f_t^(n)) − ℓ(f_t), t = {horizon:g}, student"
    yield claim(identity(told, slope.value, -1.0, stderr=slope.stderr))
    run = mfsde.simulate(student, n_particles=large, dtype=DOUBLE, **{**settings, "n_replicas": 2})
    last = EmpiricalMeasure(torch.as_tensor(run.position.values[-1]))
    squares = last.integrate(lambda x: x[..., 0].square() * x[..., 1:].square().sum(-1)) / 2
    constant = 2 * sizes[-1] * excess[sizes[-1]]
    x = student.inputs(20_000, torch.Generator().manual_seed(0))
    bound = float((squares - student.predict(last, x).square().mean(-1)).mean())
    yield claim(inequality(f"2n(E ℓ(f_t^(n)) − ℓ(f_t)), n = {sizes[-1]} ≤ independent neurons", constant, bound))

    spins = SphericalSpin()
    sizes, horizon = ([8, 16, 32], 10.0) if quick else ([8, 16, 32, 64, 128], 40.0)
    settings = {
        "n_replicas": 8 if quick else 16,
        "horizon": horizon,
        "dt": 0.02,
        "seed": 0,
        "save_every": round(horizon / 0.02),
    }
    table = table_of({n: trained_loss(spins, n, faulty, method="sgd", **settings) for n in sizes})
    slope = rates.power(table)
    told = f"slope in n of the loss of three spins, SGD, t = {horizon:g} ≤ −1"
    yield claim(inequality(told, slope.value, -1.0, stderr=slope.stderr))


def trained_loss(case: Any, n: int, faulty: bool, **settings: Any) -> Array:
    """The loss at the end of a run of n neurons, (R,)."""
    run = mfsde.simulate(case, n_particles=n, keep_particles=8 if faulty else 0, dtype=DOUBLE, **settings)
    if not faulty:
        return np.asarray(run.loss.isel(time=-1).values)
    kept = EmpiricalMeasure(torch.as_tensor(run.position.values[-1]))
    loss = case.test_energy if isinstance(case, SphericalSpin) else case.energy
    return np.asarray(loss(kept).numpy())


def table_of(values: dict[int, Array]) -> xr.DataArray:
    """(n_particles, replica)."""
    found, sizes = np.stack(list(values.values())), list(values)
    coordinates = {"n_particles": sizes, "replica": np.arange(found.shape[1])}
    return xr.DataArray(found, dims=("n_particles", "replica"), coords=coordinates)
