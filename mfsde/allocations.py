"""Bytes that torch operations hold while a piece of code runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class LiveBytes(TorchDispatchMode):
    """Counts, as a context manager, the storages that are made within it and not freed yet.

    Views count nothing, and neither do tensors that were there before. What a kernel takes from the system behind
    torch's back is not seen.

    Attributes: `live` now; of the calls made by `inside`, the largest `live` at which one began, `entered`, and the
    most that one added to it, `added`; `outside`, the largest `live` at any other time.

    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and to say so to torch's compiler would load it: two seconds.
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.outside = self.entered = self.added = 0
        self._base: int | None = None
        self._known: dict[int, weakref.ref[Any]] = {}

    def inside(self, call: Callable[[], T]) -> T:
        """The result of a call, whose allocations are counted apart; calls do not nest."""
        if self._base is not None:
            return call()
        self._base = self.live
        self.entered = max(self.entered, self.live)
        try:
            return call()
        finally:
            self._base = None
            self._seen()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation as it is, with what it made counted."""
        kwargs = kwargs or {}
        given = {key for t in _tensors((args, kwargs)) if (key := _key(t)) is not None}
        result = func(*args, **kwargs)
        for t in _tensors(result):
            key = _key(t)
            if key is not None and key not in given and key not in self._known:
                self._take(key, t.untyped_storage())
        return result

    def _take(self, key: int, storage: Any) -> None:
        size: int = storage.nbytes()

        def freed(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self._seen()

    def _seen(self) -> None:
        if self._base is None:
            self.outside = max(self.outside, self.live)
        else:
            self.added = max(self.added, self.live - self._base)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _key(t: Tensor) -> int | None:
    """What tells a storage from others as long as it lives; None for tensors that have none."""
    try:
        return t.untyped_storage()._cdata  # type: ignore[no-any-return]
    except (NotImplementedError, RuntimeError):
        return None
