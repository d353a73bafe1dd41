"""The settings of a run: everything besides the equation that determines its numbers, checked once."""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .noise import Noise

DTYPES = {"float32": torch.float32, "float64": torch.float64}

# Settings that an ordinary run does not record, so that its digest does not know the words.
WHERE_SET = frozenset({"antithetic", "precision", "compile"})


@dataclass(frozen=True)
class Settings:
    """What `simulate` was told, in plain values; steps are integers, times are formed from them.

    `n_steps` is horizon/dt. `substeps`, `antithetic` and `precision` belong to the noise. Save and checkpoint intervals
    count steps; None means the first and the last step only.
    """

    n_particles: int
    horizon: float
    dt: float
    seed: int
    n_replicas: int
    save_every: int | None
    keep_particles: int | None
    method: str
    device: str
    dtype: str
    substeps: int
    checkpoint_every: int | None
    antithetic: bool = False
    precision: str | None = None
    compile: bool = False

    @classmethod
    def checked(
        cls,
        *,
        n_particles: Any,
        horizon: Any,
        dt: Any,
        seed: Any,
        n_replicas: Any,
        save_every: Any,
        keep_particles: Any,
        method: Any,
        device: Any,
        dtype: Any,
        noise: Any,
        checkpoint_every: Any,
        compile: Any = False,
    ) -> Settings:
        """Settings from a call's arguments.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a value that no run can have, with the nearest that one can.

        """
        keyed = _keyed(seed, noise)
        settings = cls(
            n_particles=_count("n_particles", n_particles, 1),
            horizon=_positive("horizon", horizon),
            dt=_positive("dt", dt),
            seed=_count("seed", seed, 0),
            n_replicas=_count("n_replicas", n_replicas, 1),
            save_every=None if save_every is None else _count("save_every", save_every, 1),
            keep_particles=None if keep_particles is None else _count("keep_particles", keep_particles, 0),
            method=method,
            device=_device(device),
            dtype=_dtype(dtype),
            substeps=keyed.substeps,
            antithetic=keyed.antithetic,
            precision=None if keyed.precision is None else _dtype(keyed.precision),
            checkpoint_every=None if checkpoint_every is None else _count("checkpoint_every", checkpoint_every, 1),
            compile=_flag("compile", compile),
        )
        _check_whole_steps(settings)
        _check_pairs(settings)
        _check_precision(settings)
        _check_limits(settings)
        return settings

    @property
    def n_steps(self) -> int:
        """Number of steps, horizon/dt."""
        return round(self.horizon / self.dt)

    @property
    def kept(self) -> int:
        """Number of particles whose positions are stored."""
        return self.n_particles if self.keep_particles is None else min(self.keep_particles, self.n_particles)

    @property
    def noise(self) -> Noise:
        """The keyed noise."""
        return Noise(self.seed, self.substeps, self.antithetic, DTYPES[self.precision] if self.precision else None)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the state."""
        return DTYPES[self.dtype]

    def save_steps(self) -> list[int]:
        """Steps whose frames are stored: 0, every `save_every`, the last."""
        return _grid(self.n_steps, self.save_every)

    def checkpoint_steps(self) -> list[int]:
        """Steps at which a run on disk can be resumed: 0, every `checkpoint_every`, the last."""
        return _grid(self.n_steps, self.checkpoint_every)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; those of `WHERE_SET` only where they are."""
        return {name: value for name, value in asdict(self).items() if name not in WHERE_SET or value}


def label(time: float) -> float:
    """A time rounded to 12 significant digits, so that equal times are equal numbers."""
    return float(f"{time:.12g}")


def _grid(last: int, every: int | None) -> list[int]:
    return sorted({0, last, *(range(0, last + 1, every) if every else ())})


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}; expected a whole number >= {least}.")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} = {value!r} is a {type(value).__name__}; expected a whole number >= {least}."
        ) from None
    if number < least:
        raise ValueError(f"{name} = {number}; expected a whole number >= {least}.")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} = {value!r}; expected True or False.")
    return bool(value)


def _positive(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or (not isinstance(value, (int, float)) and not hasattr(value, "__float__")):
        raise TypeError(f"{name} = {value!r} is a {type(value).__name__}; expected a positive number.")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} = {number}; expected a positive, finite number of time units.")
    return number


def _device(device: Any) -> str:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as problem:
        raise ValueError(f"device = {device!r} is no torch device; expected 'cpu', 'cuda' or 'cuda:1'.") from problem
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device = {device!r}, but this torch ({torch.__version__}) sees no CUDA device. Use device='cpu', or "
            "install a CUDA build of torch on a machine with a GPU."
        )
    return str(found)


def _dtype(dtype: Any) -> str:
    for name, known in DTYPES.items():
        if dtype is known:
            return name
    raise TypeError(f"dtype = {dtype!r}; expected torch.float32 or torch.float64.")


def _keyed(seed: Any, noise: Any) -> Noise:
    number = _count("seed", seed, 0)
    if noise is None:
        return Noise(number)
    if not isinstance(noise, Noise):
        raise TypeError(f"noise = {noise!r:.60}; expected mfsde.Noise(seed, substeps=k) or None.")
    if noise.seed != number:
        raise ValueError(
            f"seed = {number} contradicts noise.seed = {noise.seed}; the run's randomness has one key. Pass seed="
            f"{noise.seed}, or build the noise with Noise({number}, substeps={noise.substeps})."
        )
    return noise


def _check_whole_steps(settings: Settings) -> None:
    n = settings.n_steps
    if n >= 1 and abs(n * settings.dt - settings.horizon) <= 1e-9 * settings.horizon:
        return
    below = math.floor(settings.horizon / settings.dt)
    near = [label(k * settings.dt) for k in (below, below + 1) if k >= 1]
    raise ValueError(
        f"horizon = {settings.horizon} is not a whole number of steps dt = {settings.dt}. The nearest horizons are "
        f"{' and '.join(map(str, near))}; or take dt = {label(settings.horizon / max(1, n))}."
    )


def _check_pairs(settings: Settings) -> None:
    if settings.antithetic and settings.n_replicas % 2:
        raise ValueError(
            f"n_replicas = {settings.n_replicas} with antithetic noise, whose replicas 2j and 2j + 1 are a pair; "
            f"expected an even number, for instance {settings.n_replicas + 1}."
        )


def _check_precision(settings: Settings) -> None:
    if settings.precision == "float64" and settings.dtype == "float32":
        raise ValueError(
            "noise has precision=torch.float64, and the state is in float32, where it would be lost. Use "
            "dtype=torch.float64, or leave precision out."
        )


def _check_limits(settings: Settings) -> None:
    limits = {
        "horizon/dt times substeps": (settings.n_steps * settings.substeps, 2**32),
        "n_replicas": (settings.n_replicas, 2**32),
        "n_particles": (settings.n_particles, 2**34),
        "seed": (settings.seed, 2**64),
    }
    for name, (value, limit) in limits.items():
        if value >= limit:
            raise ValueError(
                f"{name} = {value} exceeds the noise's counters; it must be below 2^{limit.bit_length() - 1}."
            )
