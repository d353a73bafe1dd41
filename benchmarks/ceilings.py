"""What the machine can do, measured beside the workloads: copying, exp, tanh, normals, matrix products.

A step cannot take less than its ceiling: the bytes it must move at the speed of a copy, its normals at the speed of
the noise kernel in the cache, one exp a pair, the products and the tanh of a network.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mfsde.noise import Noise

from .timing import interleaved
from .workloads import N_DATA, Case, digits

# Bytes beyond the caches; numbers that stay in the second level of one core's cache, and in the first.
COPIED, CACHED, DRAWN, NEAR = 1 << 27, 1 << 17, 1 << 16, 1 << 12
MATRIX = 1024
AGAIN = 20

# exp as 2^k 2^f with Taylor's polynomial of 2^f, |f| <= 1/2, to 1.2e-7: no special cases, nothing but arithmetic.
EXP = """
#include <string.h>
void exponentials(const float *restrict x, float *restrict y, int n, int times)
{
    for (int again = 0; again < times; again++) {
        for (int i = 0; i < n; i++) {
            float t = x[i] * 1.44269504f, shifted = t + 12582912.0f, f = t - (shifted - 12582912.0f);
            float p = 1.54035304e-4f;
            p = p * f + 1.33335581e-3f;
            p = p * f + 9.61812911e-3f;
            p = p * f + 5.55041087e-2f;
            p = p * f + 2.40226507e-1f;
            p = p * f + 6.93147181e-1f;
            p = p * f + 1.0f;
            unsigned k, bits;
            memcpy(&k, &shifted, 4);
            memcpy(&bits, &p, 4);
            bits += k << 23;
            memcpy(&y[i], &bits, 4);
        }
        __asm__ volatile("" : : "r"(y) : "memory");
    }
}
"""
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


def measured(device: str, quick: bool = False) -> dict[str, float]:
    """Seconds per byte copied (read or written), exp, tanh, normal, floating operation of a product; float32.

    Names: copy, exp, tanh, normal, normal64, flop; exp and tanh are the fastest of those that follow: torch's, numpy's
    and a C loop's, numpy's and C's divided among the threads. tanh(a) is 2 sigmoid(2a) - 1, where the factors can be
    taken into the products around it. The best of the repeats: a ceiling is what the machine can do undisturbed.
    """
    # On a GPU small blocks would time launches: there is no cache to fill, and arithmetic hides behind nothing.
    cached = CACHED if device == "cpu" else 1 << 26
    drawn = DRAWN if device == "cpu" else 1 << 24
    copied = COPIED if device == "cpu" else 8 * COPIED
    source, target = torch.rand(copied // 4, device=device), torch.empty(copied // 4, device=device)
    few, out = torch.rand(cached, device=device), torch.empty(cached, device=device)
    z, z64 = (torch.empty(1, drawn, 1, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64))
    size = MATRIX if device == "cpu" else 8 * MATRIX
    a, b, c = (torch.rand(size, size, device=device) for _ in range(3))
    noise = Noise(1)
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "copy": (partial(target.copy_, source), 2 * copied),
        "torch.exp": (partial(torch.exp, few, out=out), cached),
        "torch.sigmoid": (partial(torch.sigmoid, few, out=out), cached),
        "torch.tanh": (partial(torch.tanh, few, out=out), cached),
        "normal": (lambda: noise.normals(1, z.shape, dtype=z.dtype, device=device, out=z), drawn),
        "normal64": (lambda: noise.normals(1, z.shape, dtype=z64.dtype, device=device, out=z64), drawn),
        "flop": (partial(torch.mm, a, b, out=c), 2 * size**3),
    }
    repeated = {name: _repeated(call, 1 if name in ("copy", "flop") else AGAIN) for name, (call, _) in calls.items()}
    seconds = interleaved(repeated, repeats=5 if quick else 21, device=device, of=min)
    count = {name: units * (1 if name in ("copy", "flop") else AGAIN) for name, (_, units) in calls.items()}
    found = {name: seconds[name] / count[name] for name in calls}
    if device == "cpu":
        found |= {name: each / torch.get_num_threads() for name, each in of_one_core(quick).items()}
    exps, tanhs = ("torch.exp", "torch.sigmoid", "numpy exp", "exp in C"), ("torch.tanh", "torch.sigmoid", "numpy tanh")
    found["exp"] = min(found[name] for name in exps if name in found)
    found["tanh"] = min(found[name] for name in tanhs if name in found)
    return found


def of_one_core(quick: bool) -> dict[str, float]:
    """Seconds per exp and tanh of what runs on one core only."""
    x, y = np.linspace(-4, 0, CACHED, dtype=np.float32), np.empty(CACHED, np.float32)
    found = interleaved(
        {f"numpy {f.__name__}": partial(f, x, out=y) for f in (np.exp, np.tanh)}, 5 if quick else 21, of=min
    )
    found = {name: each / CACHED for name, each in found.items()}
    own = compiled_exp(quick)
    return found if own is None else found | {"exp in C": own}


def compiled_exp(quick: bool) -> float | None:
    """Seconds per exp of one core in a C loop over numbers in its first cache; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = (str(Path(folder) / name) for name in ("exp.c", "exp.so"))
        Path(source).write_text(EXP)
        if subprocess.run([compiler, *FLAGS, source, "-o", library], capture_output=True).returncode:
            return None
        function = ctypes.CDLL(library).exponentials
    x, y = torch.rand(NEAR).neg_(), torch.empty(NEAR)
    times = 50
    arguments = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), NEAR, times)
    return interleaved({"exp": partial(function, *arguments)}, 5 if quick else 21, of=min)["exp"] / (NEAR * times)


def parts(case: Case, unit: dict[str, float]) -> dict[str, float]:
    """Seconds of what a step cannot do without, each at the speed of its ceiling."""
    particles = case.replicas * case.n
    if case.workload == "B":
        return {"exp": particles * case.n * unit["exp"]}
    if case.workload in ("C", "D"):
        n = N_DATA if case.workload == "C" else case.batch
        p = case.of.dim - 1 if case.workload == "C" else digits()[0].shape[1]
        # z·α and its transpose, then the products with β and with the residuals.
        return {"products": 4 * particles * n * (p + 1) * unit["flop"], "tanh": particles * n * unit["tanh"]}
    scalars, wide = particles * case.of.dim, case.dtype == "float64"
    return {
        "copy": 2 * (8 if wide else 4) * scalars * unit["copy"],
        "normals": scalars * unit["normal64" if wide else "normal"],
    }


def of_step(case: Case, unit: dict[str, float]) -> tuple[str, float]:
    """What bounds a step of the workload from below, and its seconds.

    Products and tanh occupy the same units of a core, so their times add; memory works beside the arithmetic.
    """
    least = parts(case, unit)
    if case.workload in ("C", "D"):
        return " + ".join(least), sum(least.values())
    return max(least.items(), key=lambda part: part[1])


def described(unit: dict[str, float]) -> str:
    return (
        f"copy {1e-9 / unit['copy']:.1f} GB/s (read and written), exp {1e9 * unit['exp']:.3f} ns "
        f"(torch.exp {1e9 * unit['torch.exp']:.3f}), tanh {1e9 * unit['tanh']:.3f} ns (torch.tanh "
        f"{1e9 * unit['torch.tanh']:.3f}), "
        f"normal {1e9 * unit['normal']:.2f} ns (float64 {1e9 * unit['normal64']:.2f} ns), "
        f"products {1e-9 / unit['flop']:.0f} GFLOP/s"
    )


def _repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls
