"""The memory of a step's temporaries, kept by the process for the next step.

glibc returns freed memory to the system above two thresholds, and a step that takes it again pays for every page: two
thirds of its time with a drift of three operations on a million particles in float64. The thresholds rise, by glibc's
own rule (mallopt(3), M_MMAP_THRESHOLD), when a large block is freed: to the size of the block and to twice that.

The price: before glibc 2.38 aligned blocks do not fit where equal ones were freed, and among small blocks that live on
the heap grows by what every step takes: 20 MB a step for 16 replicas of 200 particles that compare all pairs. What is
free and resident is therefore given back above a bound.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

import torch

# The largest block whose release moves the thresholds, 32 MiB, less what the allocator adds to it.
LARGEST = 2**25 - 2**13

# Free memory that may stay resident, bytes.
RESIDENT = 2**30


@functools.cache
def keep() -> None:
    """From now on up to 64 MiB of freed memory stay with the process, and blocks of up to 32 MiB come from there.

    Once per process. The block is not written to, so that it takes no memory; other C libraries are not affected.
    """
    # Freed as soon as it is there.
    torch.empty(LARGEST, dtype=torch.uint8)


def trim() -> None:
    """Gives free memory back to the system where more than RESIDENT bytes of it are resident.

    Some microseconds where nothing is to be done; for glibc >= 2.33, and nothing with other C libraries.
    """
    library = _glibc()
    if library is None:
        return
    used = library.mallinfo2()
    with open("/proc/self/statm", "rb") as file:
        resident = int(file.read().split()[1]) * mmap.PAGESIZE
    if resident - used.uordblks - used.hblkhd > RESIDENT:
        library.malloc_trim(0)


class _Used(ctypes.Structure):
    """What mallinfo2 returns: uordblks, bytes in use on heaps, hblkhd, bytes in blocks of their own."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@functools.cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallinfo2.restype = _Used
    except (OSError, AttributeError):
        return None
    return library
