"""Births and deaths at signed rates: the reaction that follows the transport of a step.

A scenario gives particle i the signed rate L_i = V(x_i, m) - ∫ V dm: `birth_death_rate` is V, the mean is subtracted
here. Its law then follows

    ∂_t m = -L m,        d/dt ∫ φ dm = -Cov_m(V, φ),

in which a constant added to V cancels. Three particle systems have this limit:

    jumps     a step of length h at a time: each particle rings at most once, and those that ring act one by one
    clocks    every particle has a clock of intensity |L_i| at the present state, and the rates follow every event
    weights   no particle is born or dies: weights take the mirror (multiplicative) step exp(-h L_i)

In the first two a particle with L_i > 0 dies and a copy of another takes its place; with L_i < 0 it is copied over
another. The other one is uniform among the N - 1: at finite N rates act as if multiplied by N/(N - 1). N is conserved.

With a transport that follows -∇V the splitting is the Wasserstein-Fisher-Rao gradient flow of the energy whose first
variation is V [1]. For the free energy F + T·KL(·| e^{-U}), V = δF/δm + T U + T log m [2]: see `selection` for both.

A scenario with `reinjection() -> (rate, law)` also has each particle replaced, at that rate, by an independent draw
from the law π: ∂_t m = ... + rate (π - m).

[1] Rotskoff, Jelassi, Bruna, Vanden-Eijnden, Global convergence of neuron birth-death dynamics, ICML 2019, Algorithm 1.
[2] Lu, Lu, Nolen, Accelerating Langevin sampling with birth-death, 2019.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .measure import Law, blocked_sum
from .model import Equation
from .noise import Noise, Stream, assign_
from .nonlinear_process import Decoupled
from .torus import shortest

FLOAT64 = torch.float64

REACTIONS = ("jumps", "clocks", "weights")

# A particle rings at most once in a step. At |L|h = 1 it does so with probability 0.63 where one event is due: above,
# the step no longer follows the rate.
MAX_RING = 1.0

# Events in a step and particle from which on `clocks` would not end.
MAX_TURNOVER = 1000.0

# Draws by which a law of reinjection is held against the domain.
PROBES = 512

# Events of `clocks` whose draws are made at once.
DRAWN = 64


def jumps(equation: Equation, t: float, h: float, noise: Noise, step: int, x: Tensor) -> Tensor:
    """One step of births and deaths: particle i rings with probability 1 - exp(-|L_i| h), ringers act in random order.

    The order is uniform and independent of the rates, so no sign acts first. Ringers act on what stands in their place
    at their turn, which an earlier one may have overwritten. The mean of the step is that of the limit to O(h²), hence
    a weak error O(h), as the splitting with transport has.

    Draws of the stream JUMP: channel 0 of particle i makes it a candidate, so that runs with other rates or other N
    share these; channels 1, 2, 3 of k belong to the k-th candidate of its replica: does it ring, when, and which other.
    Who is a candidate is known from channel 0 alone, so the others are fresh whatever k is, and few of them are made.

    Args:
        equation: the checked scenario; `parent` is carried along where it is not None.
        t: time at which the rates are taken.
        h: length of the step.
        noise: the keyed noise.
        step: the step, in the key.
        x: (R, N, d), contiguous, overwritten.

    Returns:
        The number of ringers in each replica, (R,), int64.

    Raises:
        FloatingPointError: a rate is not finite.
        ValueError: |L_i| h > 1.

    """
    fine = step * noise.substeps
    rate, mean = _rates(equation, t, x)
    shift = -h * mean
    slot = noise.rings(rate.contiguous(), h, shift, fine)
    if not len(slot):
        _reinject(equation, h, noise, fine, x)
        return torch.zeros(len(x), dtype=torch.int64, device=x.device)
    replica, particle = _places(slot, x.shape[1])
    # In the dtype and with the roundings of the kernel. Whatever reaches 1 is a candidate.
    signed = (rate[replica, particle] * h).add_(shift[replica, 0]).double()
    if float(signed.abs().max()) > MAX_RING:
        _refuse_step(equation.name, t, h, replica, particle, signed)
    target, source, count = _events(slot, replica, particle, signed, x.shape, noise, fine)
    _assign(equation, x, target, source)
    _reinject(equation, h, noise, fine, x)
    return count


def clocks(equation: Equation, t: float, h: float, noise: Noise, step: int, x: Tensor) -> Tensor:
    """Births and deaths over a time h, exactly in time: independent clocks of intensity |L_i|, rates after every event.

    Given the state at t this is the jump process with frozen positions in law, for every h: waiting times are
    exponential with the present total intensity, and the particle that rings is chosen in proportion to its own.
    Reinjection is one more clock. Rates that depend on time explicitly are taken at t. What remains is the splitting
    with transport: particles do not move between events of a step, a weak error O(h).

    Every event evaluates all rates again, O(N); replicas run side by side and wait for the one with most events.
    Draws of the stream JUMP, channels 0, 1, 2 of n: waiting time, ringer, other one of the n-th event of the step.

    Arguments and result as `jumps`.

    Raises:
        FloatingPointError: a rate is not finite.
        ValueError: more than 1000 events per particle are due in the step.

    """
    n_replicas, n_particles, _ = x.shape
    fine, number = step * noise.substeps, 0
    inflow, law = equation.reinjection or (0.0, None)
    elapsed = torch.zeros(n_replicas, dtype=FLOAT64, device=x.device)
    count = torch.zeros(n_replicas, dtype=torch.int64, device=x.device)
    first = torch.arange(n_replicas, device=x.device) * n_particles
    while True:
        if number % DRAWN == 0:
            shape = (n_replicas, DRAWN, 3)
            draws = noise.uniforms(fine, shape, first_particle=number, dtype=FLOAT64, device=x.device)
        wait, which, other = draws[:, number % DRAWN].unbind(-1)
        rate, mean = _rates(equation, t, x)
        signed = rate - mean
        reached = signed.abs().double().cumsum(-1)
        ringing = reached[:, -1]
        total = ringing + inflow * n_particles
        if bool((total * h > MAX_TURNOVER * n_particles).any()):
            _refuse_turnover(equation.name, t, h, total / n_particles)
        elapsed = elapsed - wait.log() / total
        active = elapsed <= h
        if not bool(active.any()):
            return count
        chosen = which * total
        ringer = torch.searchsorted(reached, chosen.unsqueeze(-1), right=True).squeeze(-1).clamp(max=n_particles - 1)
        partner = _others(other, ringer, n_particles)
        dies = signed.gather(-1, ringer.unsqueeze(-1)).squeeze(-1) > 0
        target, source = torch.where(dies, ringer, partner), torch.where(dies, partner, ringer)
        jump = active & (chosen < ringing)
        count += jump
        _assign(equation, x, (first + target)[jump], (first + source)[jump])
        if law is not None and bool((fresh := active & (chosen >= ringing)).any()):
            replaced = ((chosen - ringing) / inflow).long().clamp(max=n_particles - 1)
            z = _variates(law, noise, fine, (n_replicas, 1), number, x)[:, 0]
            _replace(equation, x, (first + replaced)[fresh], law.from_variates(z[fresh]))
        number += 1


def weights(equation: Equation, t: float, h: float, noise: Noise, step: int, x: Tensor) -> Tensor:
    """w_i ← w_i exp(-h L_i) / Z: the mirror step, explicit in the rate, exactly normalised; nobody is born or dies.

    It minimises ∫ L dν + KL(ν | μ)/h over the ν on the same particles. In a pure reaction with V independent of m it is
    exact for every h; else the error is O(h). Weights move in the log domain and stay at or above the smallest normal
    number of their dtype: nothing underflows to zero, where no rate could bring it back.

    A reinjected particle keeps its weight. The mean change is Σ_i w_i rate (π - δ_{x_i}) = rate (π - m), as it must be;
    a particle that carries most of the mass makes it a rough one.

    Arguments as `jumps`, equation.weights (R, N) is replaced. Returns zeros: there is no event to count.

    Raises:
        FloatingPointError: a rate is not finite, mass was lost, or one particle has come to hold all of it.
        ValueError: the system has no weights.

    """
    if equation.weights is None:
        raise ValueError(f'{equation.name}: the reaction "weights" moves weights, and the system has none.')
    rate, mean = _rates(equation, t, x)
    before = equation.weights.double()
    _check_mass(equation.name, t, before)
    log_weights = before.log().sub_((rate - mean).double(), alpha=h)
    after = torch.softmax(log_weights, -1).to(x.dtype).clamp_(min=torch.finfo(x.dtype).tiny)
    after /= blocked_sum(after, 1).unsqueeze(-1)
    _check_collapse(equation.name, t, after)
    equation.weights = after
    _reinject(equation, h, noise, step * noise.substeps, x)
    return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)


def check(equation: Equation, reaction: str) -> None:
    """Refuses a reaction that would be wrong for this equation.

    Raises:
        ValueError: unknown, a single particle, jumps of weighted particles, or a reinjection that is none.

    """
    n_particles = equation.shape[1]
    if reaction not in REACTIONS:
        raise ValueError(f"unknown reaction {reaction!r}; expected one of {', '.join(REACTIONS)}.")
    if n_particles < 2 and reaction != "weights":
        raise ValueError(
            f"{equation.name}: births and deaths replace a particle by another, and N = 1 has no other; "
            "take n_particles >= 2."
        )
    if n_particles > 2**31:
        raise ValueError(f"{equation.name}: births and deaths draw others by 32-bit words; take N <= 2**31.")
    if equation.weights is not None and reaction != "weights":
        raise ValueError(
            f"{equation.name}: {reaction!r} copies particles, and copies of weighted ones would not conserve mass; "
            'use the reaction "weights" (method="euler+weights"), or start from particles without weights.'
        )
    if reaction != "weights" and isinstance(equation.scenario, Decoupled) and equation.has_birth_death:
        raise ValueError(
            f"{equation.name}: particles that copy one another are no independent copies of the nonlinear process; use "
            'the reaction "weights" (method="euler+weights"), in which none is copied.'
        )
    if equation.reinjection is not None:
        _check_reinjection(equation, *equation.reinjection)


def resolve(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """The assignments slot[target_k] ← slot[source_k], k = 0, 1, ... one by one, as one simultaneous assignment.

    What the k-th reads was written by the last earlier assignment to its source, or stood there at the beginning. That
    one in turn read from somewhere: pointers are followed to the slot of the beginning by doubling, and of all that
    write a slot the last remains. O(E log E), whatever the number of slots.

    Args:
        target: (E,), int64 slots, in order.
        source: (E,), source_k ≠ target_k.

    Returns:
        Distinct slots and, for each, the slot whose initial content it ends with.

    """
    n = len(target)
    if n == 0:
        return target, source
    order = torch.arange(n, device=target.device)
    # Slot and order in one number: the writes of a slot side by side, in their order.
    writes, writer = (target * n + order).sort()
    written = target[writer]
    place = torch.searchsorted(writes, source * n + order) - 1
    linked = ((written[place] == source) & (place >= 0)).nonzero().squeeze(-1)
    root, read_from = source.clone(), torch.full_like(source, -1)
    read_from[linked] = writer[place[linked]]
    while len(linked):
        at = read_from[linked]
        root[linked], read_from[linked] = root[at], read_from[at]
        linked = linked[read_from[linked] >= 0]
    last = writer[torch.cat([written[1:] != written[:-1], written.new_ones(1, dtype=torch.bool)])]
    return target[last], root[last]


def mean_rate(rate: Tensor) -> Tensor:
    """The mean over particles, (R, N) -> (R, 1). It cancels in the law; without it there are more events."""
    return blocked_sum(rate, 1).unsqueeze(-1) / rate.shape[1]


def _rates(equation: Equation, t: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rates before centring and what is to be subtracted, both finite."""
    mu = equation.measure(x)
    rate = equation.birth_death_rate(t, x, mu)
    mean = mean_rate(rate) if mu.is_uniform else mu.integrate(lambda _: rate).unsqueeze(-1)
    # One number instead of a pass: a mean that is finite has finite terms.
    if not bool(torch.isfinite(mean).all()):
        _refuse_rate(equation.name, t, rate)
    return rate, mean


def _events(
    slot: Tensor, replica: Tensor, particle: Tensor, signed: Tensor, shape: torch.Size, noise: Noise, fine: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets and sources of those candidates that ring, in the order in which they act, and their number, (R,).

    1 - e^{-y} = p · (1 - e^{-y})/p, y = |L| h: a candidate is there with probability p ≥ y, and rings with the rest.
    """
    n_replicas, n_particles, _ = shape
    rank, most = _ranks(replica, n_replicas)
    draws = noise.uniforms(fine, (n_replicas, most, 4), dtype=FLOAT64, device=slot.device).flatten(0, 1)
    _, thinning, moment, other = draws[replica * most + rank].unbind(-1)
    expected = signed.abs()
    rings = thinning * (expected * 2.0**16).ceil().mul_(2.0**-16) < -torch.expm1(-expected)
    count = torch.bincount(replica, weights=rings, minlength=n_replicas).long()
    partner = slot + (_others(other, particle, n_particles) - particle)
    dies = signed > 0
    # Positive numbers are ordered as their bits are, and integers are sorted faster. Those that do not ring come last.
    acting = moment.masked_fill(~rings, 2.0).view(torch.int64).argsort(stable=True)[: int(count.sum())]
    return torch.where(dies, slot, partner)[acting], torch.where(dies, partner, slot)[acting], count


def _places(slot: Tensor, n_particles: int) -> tuple[Tensor, Tensor]:
    """Replica and particle of a slot."""
    replica = slot.div(n_particles, rounding_mode="floor")
    return replica, slot - replica * n_particles


def _ranks(replica: Tensor, n_replicas: int) -> tuple[Tensor, int]:
    """Position of each entry among those of its replica, and the largest number of them; replicas in order."""
    count = torch.bincount(replica, minlength=n_replicas)
    start = count.cumsum(0) - count
    return torch.arange(len(replica), device=replica.device) - start[replica], int(count.max())


def _others(u: Tensor, particle: Tensor, n_particles: int) -> Tensor:
    """A uniform one of the N - 1 others."""
    other = (u * (n_particles - 1)).long()
    return other + (other >= particle)


def _assign(equation: Equation, x: Tensor, target: Tensor, source: Tensor) -> None:
    """Slot ← slot, one by one: on a CPU literally."""
    states = [x.view(-1, x.shape[-1])] + ([] if equation.parent is None else [equation.parent.view(-1)])
    if all([assign_(state, target, source) for state in states]):
        return
    to, of = resolve(target, source)
    for state in states:
        state[to] = state[of]


def _reinject(equation: Equation, h: float, noise: Noise, fine: int, x: Tensor) -> None:
    """Each particle, with probability 1 - e^{-rate·h}, becomes a draw from the law: exact for every h.

    Draws of the stream REINJECTION: channel 0 of particle i makes it a candidate; of the k-th candidate of its replica,
    channel 1 of k decides, and the variates are channels 2, 3, ... of k.
    """
    if equation.reinjection is None:
        return
    rate, law = equation.reinjection
    probability = -math.expm1(-rate * h)
    n_replicas, n_particles, _ = x.shape
    level = x.new_full((n_replicas, 1), probability)
    slot = noise.rings(x.new_zeros(n_replicas, n_particles), 0.0, level, fine, stream=Stream.REINJECTION)
    if not len(slot):
        return
    replica, _ = _places(slot, n_particles)
    rank, most = _ranks(replica, n_replicas)
    shape = (n_replicas, most, 2)
    u = noise.uniforms(fine, shape, stream=Stream.REINJECTION, dtype=FLOAT64, device=x.device)[replica, rank, 1]
    chosen = u * (level[0].double() * 2.0**16).ceil().mul_(2.0**-16) < probability
    z = _variates(law, noise, fine, (n_replicas, most), 0, x)[replica[chosen], rank[chosen]]
    _replace(equation, x, slot[chosen], law.from_variates(z))


def _variates(law: Law, noise: Noise, fine: int, shape: tuple[int, int], first: int, x: Tensor) -> Tensor:
    """(R, K, q). Channels 0 and 1 are left to the decisions, whose words it would share."""
    z = noise.normals(
        fine, (*shape, 2 + law.n_variates), stream=Stream.REINJECTION, first_particle=first, dtype=x.dtype,
        device=x.device,
    )  # fmt: skip
    return z[..., 2:]


def _replace(equation: Equation, x: Tensor, slot: Tensor, drawn: Tensor) -> None:
    x.view(-1, x.shape[-1])[slot] = drawn
    if equation.parent is not None:
        equation.parent.view(-1)[slot] = -1


def _check_reinjection(equation: Equation, rate: float, law: Law) -> None:
    name, dim = equation.name, equation.shape[-1]
    if not 0 <= float(rate) < math.inf:
        raise ValueError(f"{name}.reinjection gives the rate {rate}; expected a finite rate per unit time, >= 0.")
    if not isinstance(law, Law) or law.dim != dim:
        told = f"a law in dimension {law.dim}" if isinstance(law, Law) else f"a {type(law).__name__}"
        raise ValueError(
            f"{name}.reinjection gives {told}; expected (rate, law), the law one of mfsde's in dimension {dim}."
        )
    if equation.has_projection:
        z = Noise(0).normals(0, (1, PROBES, law.n_variates), stream=Stream.REINJECTION, dtype=FLOAT64)
        x = law.from_variates(z).to(equation.device)
        moved = shortest(equation.project(0.0, x.clone()) - x, equation.period).abs().amax(-1)
        outside = moved > 1e-6 * (1 + x.abs().amax(-1))
        if bool(outside.any()):
            raise ValueError(
                f"{name}.reinjection draws from a law of which {float(outside.double().mean()):.1%} lies outside the "
                "domain that `project` keeps particles in; expected a law on the domain."
            )


def _check_mass(name: str, t: float, w: Tensor) -> None:
    total = blocked_sum(w, 1)
    bad = ~((total - 1).abs() <= 1e-4) | ~(w >= 0).all(-1)
    if bool(bad.any()):
        replica = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"{name}: the weights of replica {replica} have total mass {float(total[replica]):.6g} at time {t:.12g}; "
            "expected a probability. Something outside the reaction changed equation.weights."
        )


def _check_collapse(name: str, t: float, w: Tensor) -> None:
    largest = w.amax(-1)
    alone = ~(largest < 1 - 2 * torch.finfo(w.dtype).eps)
    if w.shape[1] > 1 and bool(alone.any()):
        replica = int(alone.nonzero()[0])
        raise FloatingPointError(
            f"{name}: at time {t:.12g} particle {int(w[replica].argmax())} of replica {replica} holds all the mass "
            f"({float(largest[replica]):.9g}): the weights have degenerated and the system is one particle. Use the "
            'reaction "jumps", which moves particles to where the mass is, or a smaller rate or horizon.'
        )


def _refuse_rate(name: str, t: float, rate: Tensor) -> None:
    bad = (~torch.isfinite(rate)).nonzero()
    if not len(bad):
        raise FloatingPointError(
            f"{name}.birth_death_rate is finite at time {t:.12g}, but its mean over the particles overflows "
            f"{rate.dtype}; the largest rate is {float(rate.abs().max()):.3g}. Scale it down, or use float64."
        )
    replica, particle = bad[0].tolist()
    raise FloatingPointError(
        f"{name}.birth_death_rate is {float(rate[replica, particle])} at time {t:.12g}, replica {replica}, particle "
        f"{particle}; expected a finite rate per unit time. Check for a logarithm of zero, or for positions that have "
        "run away (a smaller dt)."
    )


def _refuse_step(name: str, t: float, h: float, replica: Tensor, particle: Tensor, signed: Tensor) -> None:
    worst = int(signed.abs().argmax())
    largest = float(signed[worst].abs()) / h
    raise ValueError(
        f"{name}.birth_death_rate: |L| = {largest:.4g} at time {t:.12g}, replica {int(replica[worst])}, particle "
        f"{int(particle[worst])} (L = rate minus its mean), so that |L| dt = {largest * h:.3g} > {MAX_RING:g}: more "
        f"events are due in a step than the one that a particle can have. dt = {1 / largest:.2g} would just do, dt = "
        f'{0.1 / largest:.2g} keeps the error in its rate below 5 %; or use method="euler+clocks", exact in time.'
    )


def _refuse_turnover(name: str, t: float, h: float, rate: Tensor) -> None:
    replica = int(rate.argmax())
    worst = float(rate[replica])
    raise ValueError(
        f"{name}.birth_death_rate: {worst * h:.3g} events per particle are due in the step before time {t:.12g} in "
        f"replica {replica}; the positions cannot be frozen meanwhile. dt = {1 / worst:.2g} gives one event per "
        "particle and step; or scale the rate down."
    )
