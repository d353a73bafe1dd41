"""The memory of a step's temporaries, kept by the process for the next step.

glibc returns freed memory to the system above two thresholds, and a step that takes it again pays for every page: two
thirds of its time with a drift of three operations on a million particles in float64. The thresholds rise, by glibc's
own rule (mallopt(3), M_MMAP_THRESHOLD), when a large block is freed: to the size of the block and to twice that.
"""

from __future__ import annotations

import functools

import torch

# The largest block whose release moves the thresholds, 32 MiB, less what the allocator adds to it.
LARGEST = 2**25 - 2**13


@functools.cache
def keep() -> None:
    """From now on up to 64 MiB of freed memory stay with the process, and blocks of up to 32 MiB come from there.

    Once per process. The block is not written to, so that it takes no memory; other C libraries are not affected.
    """
    # Freed as soon as it is there.
    torch.empty(LARGEST, dtype=torch.uint8)
