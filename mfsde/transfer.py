"""Frames on their way from a device to the host, while the next steps run.

A state is overwritten by the step that follows. A frame is therefore copied on the device first, in the order of the
steps, and that copy goes to pinned memory on a stream of its own, which waits for nothing but it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """A tensor as it is now. `host()` is it on the host; on CUDA it travels meanwhile, and `host()` waits for it."""

    def __init__(self, x: Tensor) -> None:
        kept = x.detach().clone(memory_format=torch.contiguous_format)
        self._host, self._arrival = kept, None
        if kept.is_cuda:
            self._host, self._arrival = _sent(kept)

    def has_arrived(self) -> bool:
        """Whether `host()` would return at once."""
        return self._arrival is None or bool(self._arrival.query())

    def host(self) -> Tensor:
        """The tensor on the host, contiguous."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._host


def _sent(kept: Tensor) -> tuple[Tensor, Any]:
    """Pinned memory that `kept` is being copied to, and the event after which it is there."""
    with torch.cuda.device(kept.device):
        host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
        stream = _stream(kept.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            host.copy_(kept, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record(stream)
        # The allocator may give the memory to a later step only when this stream is done with it.
        kept.record_stream(stream)
    return host, arrival


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def travels(x: Tensor) -> bool:
    """Whether a tensor has a way to go to the host, during which steps can be made."""
    return x.is_cuda
