"""The random numbers of a step besides its noise: data, one sample for all particles of a replica, and shuffles."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Equation
from .noise import MAX_PARTICLES, Noise, Stream

# Values along n in one call. Call j takes the window of particles from j·SPAN on, so that no two calls share a word.
SPAN = 1 << 24
CALLS = MAX_PARTICLES // SPAN


class Draws:
    """Random numbers of one step, the same for every number of particles; each replica has its own.

    The j-th call of a step is a function of (seed, step, replica, j) in the stream DATA, and no two calls share a word:
    what `sample` asks for, in the same order, is reproduced by a resumed run, by another N and by a single replica. A
    step of the run made of k fine ones has the data of its first fine step. Tensors are in the run's dtype and on its
    device.

    In a shape (R, n, m) the axis n is the cheap one: a vector of length m is best drawn as `normals(m, 1)`.
    """

    def __init__(
        self, noise: Noise, step: int, n_replicas: int, dtype: torch.dtype, device: torch.device, first_call: int = 0
    ) -> None:
        self.noise = noise
        self.step = step
        self.n_replicas = n_replicas
        self.dtype = dtype
        self.device = device
        self._call = first_call

    def normals(self, n: int, m: int) -> Tensor:
        """Standard normals, (R, n, m)."""
        return self.noise.normals(
            self._fine_step,
            (self.n_replicas, n, m),
            stream=Stream.DATA,
            first_particle=self._window(n),
            dtype=self.dtype,
            device=self.device,
        )

    def uniforms(self, n: int, m: int) -> Tensor:
        """Uniforms in (0, 1), (R, n, m)."""
        return self._uniforms(n, m, self.dtype)

    def integers(self, n: int, high: int) -> Tensor:
        """Uniform in {0, ..., high - 1}, int64, (R, n)."""
        found = self.noise.integers(
            self._fine_step,
            (self.n_replicas, n, 1),
            high,
            stream=Stream.DATA,
            first_particle=self._window(n),
            device=self.device,
        )
        return found.squeeze(-1)

    def permutations(self, n: int) -> Tensor:
        """Uniform permutations of 0, ..., n - 1, int64, (R, n); O(n log n).

        Sorts 32-bit words: a tie, of probability below n²/2³³, keeps the order of its two numbers.
        """
        # In float64 whatever the run's dtype: float32 would round many words to the same number.
        return self._uniforms(n, 1, torch.float64).squeeze(-1).argsort(dim=-1, stable=True)

    def at(self, step: int) -> Draws:
        """Draws that belong to another step, for data that last longer than one; disjoint from that step's own."""
        return Draws(self.noise, step, self.n_replicas, self.dtype, self.device, CALLS // 2)

    @property
    def _fine_step(self) -> int:
        return self.step * self.noise.substeps

    def _uniforms(self, n: int, m: int, dtype: torch.dtype) -> Tensor:
        return self.noise.uniforms(
            self._fine_step,
            (self.n_replicas, n, m),
            stream=Stream.DATA,
            first_particle=self._window(n),
            dtype=dtype,
            device=self.device,
        )

    def _window(self, n: int) -> int:
        """First particle of this call's window.

        Raises:
            ValueError: more values or calls than a step has.

        """
        if not 0 <= n < SPAN:
            raise ValueError(f"draws: n = {n} values in one call; expected 0 <= n < {SPAN}. Use several calls.")
        own = self._call % (CALLS // 2)
        if own == CALLS // 2 - 1:
            raise ValueError(f"draws: more than {own} calls in one step; ask for more values in each, along n.")
        self._call += 1
        return (self._call - 1) * SPAN


class Shuffles:
    """The permutations of one step: for each n the same at every call, so that all sums over pairs share them.

    A function of (seed, step, replica, n) in the stream BATCH.
    """

    def __init__(self, noise: Noise, step: int, n_replicas: int, device: torch.device, first_replica: int = 0) -> None:
        self._noise, self._step = noise, step
        self._n_replicas, self._first_replica, self._device = n_replicas, first_replica, device
        self._known: dict[int, Tensor] = {}

    def permutations(self, n: int) -> Tensor:
        """Uniform permutations of 0, ..., n - 1, int64, (R, n); ties of 32-bit words keep their order."""
        if n not in self._known:
            shape = (self._n_replicas, n, 1)
            step = self._step * self._noise.substeps
            words = self._noise.uniforms(
                step,
                shape,
                stream=Stream.BATCH,
                first_replica=self._first_replica,
                dtype=torch.float64,
                device=self._device,
            )
            self._known[n] = words.squeeze(-1).argsort(dim=-1, stable=True)
        return self._known[n]


def set_key(equation: Equation, noise: Noise, step: int) -> None:
    """Gives the equation's measures the randomness of a step: of what is evaluated at its beginning."""
    equation.key = Shuffles(noise, step, equation.shape[0], equation.device)
