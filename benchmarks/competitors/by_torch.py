"""Loops written by hand in torch: every array allocated once, updates in place, torch's own generator."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..workloads import DT, OU, Births, Case, Digits, digits, network_data
from . import Competitor, Run

# Exponentials of one block of rows stay in the second level of the cache; on a GPU launches must be few.
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 26}


def competitors() -> list[Competitor]:
    steps = {"A": ou, "B": attraction, "C": network, "D": minibatches, "E": births}
    return [Competitor("torch loop", steps, devices=("cpu", "cuda"))]


def ou(case: Case) -> Run:
    start = case.tensor()
    shrink, pull, noise = 1 - (OU.kappa + OU.coupling) * DT, OU.coupling * DT, case.noise * math.sqrt(DT)

    def run(steps: int) -> Tensor:
        x, z = start.clone(), torch.empty_like(start)
        for _ in range(steps):
            z.normal_()
            mean = x.mean(-2, keepdim=True)
            x.mul_(shrink).add_(mean, alpha=pull).add_(z, alpha=noise)
        return x

    return run


def euler(case: Case, drift_: Callable[[Tensor, Tensor], None]) -> Run:
    """One replica. drift_(x, out): the drift at σ = 0; what confines is added here."""
    start, sigma = case.tensor()[0], case.noise

    def run(steps: int) -> Tensor:
        x, z, drift = start.clone(), torch.empty_like(start), torch.empty_like(start)
        for _ in range(steps):
            drift_(x, drift)
            x.mul_(1 - 0.5 * sigma**2 * DT).add_(drift, alpha=DT)
            if sigma:
                x.add_(z.normal_(), alpha=sigma * math.sqrt(DT))
        return x[None]

    return run


def attraction(case: Case) -> Run:
    return euler(case, Attraction(case))


class Attraction:
    """Σ_j e^{-|x_i - x_j|²/2} (x_j - x_i)/N, the exponent and the sum as matrix products of a block of rows."""

    def __init__(self, case: Case) -> None:
        like = case.tensor()[0]
        self.rows = max(1, min(case.n, BLOCK[like.device.type] // case.n))
        self.left, self.right = like.new_empty((case.n, 4)), like.new_empty((4, case.n))
        self.ones = like.new_ones((case.n, 3))
        self.block = like.new_empty((self.rows, case.n))
        self.sums = like.new_empty((case.n, 3))

    def __call__(self, x: Tensor, out: Tensor) -> None:
        n = len(x)
        half = x.square().sum(1).mul_(-0.5)
        self.left[:, :2], self.left[:, 2], self.left[:, 3] = x, half, 1
        self.right[:2], self.right[2], self.right[3] = x.T, 1, half
        self.ones[:, :2] = x
        for k in range(0, n, self.rows):
            rows = slice(k, k + self.rows)
            block = self.block[: min(self.rows, n - k)]
            torch.mm(self.left[rows], self.right, out=block).exp_()
            torch.mm(block, self.ones, out=self.sums[rows])
        torch.addcmul(self.sums[:, :2], x, self.sums[:, 2:], value=-1, out=out).div_(n)


def network(case: Case) -> Run:
    return euler(case, Network(case))


class Network:
    """-(∇_α, ∇_β) of the squared risk of a tanh network, every array a buffer."""

    def __init__(self, case: Case) -> None:
        like = case.tensor()
        self.z, self.y = (torch.tensor(a).to(like) for a in network_data())
        self.hidden = like.new_empty((case.n, len(self.z)))
        self.f, self.r = like.new_empty(len(self.z)), like.new_empty(len(self.z))
        self.weighted, self.pulled = torch.empty_like(self.z), like.new_empty((case.n, self.z.shape[1]))

    def __call__(self, x: Tensor, out: Tensor) -> None:
        p = self.z.shape[1]
        alpha, beta = x[:, :p], x[:, p]
        torch.mm(alpha, self.z.T, out=self.hidden).tanh_()
        torch.mv(self.hidden.T, beta, out=self.f).div_(len(x))
        torch.sub(self.f, self.y, out=self.r).div_(-len(self.z))
        out[:, p] = self.hidden @ self.r
        torch.mul(self.z, self.r[:, None], out=self.weighted)
        self.hidden.square_().neg_().add_(1)
        torch.mm(self.hidden, self.weighted, out=self.pulled)
        torch.mul(self.pulled, beta[:, None], out=out[:, :p])


def minibatches(case: Case) -> Run:
    inputs, targets = (torch.tensor(a).to(case.tensor()) for a in digits())

    def drift_(x: Tensor, out: Tensor) -> None:
        p = inputs.shape[1]
        alpha, beta = x[:, :p], x[:, p]
        rows = torch.randint(len(inputs), (case.batch,), device=x.device) if case.batch else slice(None)
        z, y = inputs[rows], targets[rows]
        hidden = torch.mm(alpha, z.T).tanh_()
        f = torch.mv(hidden.T, beta).mul_(Digits.scale / len(x))
        r = (-y * f).sigmoid_().mul_(y).mul_(Digits.scale / len(y))
        out[:, p] = hidden @ r
        hidden.square_().neg_().add_(1)
        torch.mul(hidden @ (z * r[:, None]), beta[:, None], out=out[:, :p])

    return euler(case, drift_)


def births(case: Case) -> Run:
    """Rates frozen over a step; ringers act at once, which neglects events that meet in one place."""
    start = case.tensor()[0, :, 0]

    def run(steps: int) -> Tensor:
        x, z, u = start.clone(), torch.empty_like(start), torch.empty_like(start)
        for _ in range(steps):
            x.mul_(1 - DT).add_(z.normal_(), alpha=case.noise * math.sqrt(DT))
            rate = x.square().mul_(0.5 * Births.alpha)
            rate.sub_(rate.mean())
            rings = (u.uniform_() < -torch.expm1(-DT * rate.abs())).nonzero().squeeze(1)
            other = torch.randint(len(x), (len(rings),), device=x.device)
            dies = rate[rings] > 0
            x[torch.where(dies, rings, other)] = x[torch.where(dies, other, rings)]
        return x[None, :, None]

    return run
