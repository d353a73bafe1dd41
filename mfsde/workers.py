"""Tasks of unequal cost in several processes: the costliest first, results in the order of the tasks.

Processes are spawned: a fork would copy the locks of threads that it does not copy. Each runs one task at a time, and
has a pipe to the parent and a process group of its own, so that Ctrl-C reaches it through the parent, once.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FunctionType
from typing import Any

# Seconds that a worker has to write its checkpoint and leave.
PATIENCE = 30.0

Task = Callable[[int], Any]
Done = Callable[[int, int, Any], None]


class WorkerDied(RuntimeError):
    """A process ended without an answer: killed, out of memory, or it could not start."""


def run_all(
    task: Task,
    costs: Sequence[float],
    n_workers: int,
    name: Callable[[int], str],
    done: Done = lambda count, index, result: None,
) -> list[Any]:
    """[task(0), task(1), ...] by `n_workers` processes, the costliest first.

    Args:
        task: picklable, as its results are.
        costs: of each task, in any unit.
        n_workers: number of processes, among which torch's threads are shared out; 1: this one, task after task.
        name: of a task, for errors.
        done: called after each task with the number of results so far, the task's index and its result.

    Raises:
        TypeError: the task cannot be sent to another process.
        WorkerDied: one ended without an answer.
        KeyboardInterrupt: Ctrl-C, after the tasks under way have been told and have ended.
        Exception: what a task raised, with its name in a note. The other tasks under way are interrupted.

    """
    if n_workers == 1:
        return _one_after_another(task, len(costs), name, done)
    sent = _pickled(task)
    # The first of equal ones first.
    waiting = sorted(range(len(costs)), key=lambda k: (costs[k], -k))
    results: dict[int, Any] = {}
    with _Workers(sent, min(n_workers, len(costs))) as workers:
        for worker in workers:
            worker.take(waiting.pop())
        while len(results) < len(costs):
            for worker in workers.ready():
                index, answer = worker.answer(name)
                results[index] = answer
                done(len(results), index, answer)
                if waiting:
                    worker.take(waiting.pop())
    return [results[k] for k in range(len(costs))]


def at_least_one(name: str, value: Any) -> int:
    """A number of processes.

    Raises:
        TypeError, ValueError: it is none.

    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} = {value!r:.60}; expected a whole number >= 1.")
    if value < 1:
        raise ValueError(f"{name} = {value}; expected a whole number >= 1.")
    return value


def _one_after_another(task: Task, n: int, name: Callable[[int], str], done: Done) -> list[Any]:
    results: list[Any] = []
    for k in range(n):
        try:
            results.append(task(k))
        except Exception as error:
            error.add_note(f"at {name(k)}")
            raise
        done(len(results), k, results[-1])
    return results


class _Worker:
    """A process and the task that it has."""

    def __init__(self, sent: bytes, n_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, sent, _files(), n_threads), daemon=True)
        self.process.start()
        theirs.close()
        self.index: int | None = None

    def take(self, index: int) -> None:
        self.index = index
        with contextlib.suppress(OSError):
            # One that has died is noticed by its missing answer.
            self.connection.send(index)

    def answer(self, name: Callable[[int], str]) -> tuple[int, Any]:
        """The index and result of its task."""
        index, self.index = self.index, None
        assert index is not None
        try:
            fine, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as problem:
            self.process.join(PATIENCE)
            raise WorkerDied(_death(name(index), self.process.exitcode)) from problem
        if fine:
            return index, value
        error = _rebuilt(*value)
        error.add_note(f"at {name(index)}")
        raise error


class _Workers:
    """The processes; all end with the block, by being asked, interrupted or killed."""

    def __init__(self, sent: bytes, n: int) -> None:
        self._sent, self._n = sent, n
        self._threads = max(1, sys.modules["torch"].get_num_threads() // n) if "torch" in sys.modules else 1
        self._all: list[_Worker] = []

    def __enter__(self) -> _Workers:
        try:
            for _ in range(self._n):
                self._all.append(_Worker(self._sent, self._threads))
        except BaseException:
            self._stop()
            raise
        return self

    def __iter__(self) -> Iterator[_Worker]:
        return iter(self._all)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for worker in self._all:
                worker.connection.close()
                worker.process.join()
        else:
            self._stop()

    def ready(self) -> list[_Worker]:
        """Those that have an answer; waits for one."""
        busy = {worker.connection: worker for worker in self._all if worker.index is not None}
        return [busy[c] for c in wait(list(busy)) if isinstance(c, Connection)]

    def _stop(self) -> None:
        """Interrupts what is under way, so that stores get their checkpoints; kills what does not end."""
        alive = [worker.process for worker in self._all if worker.process.is_alive()]
        for process in alive:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)
        for worker in self._all:
            worker.connection.close()
        end = time.monotonic() + PATIENCE
        try:
            for process in alive:
                process.join(max(0.0, end - time.monotonic()))
        finally:
            # Also where the user's patience ends earlier, with a second Ctrl-C.
            for process in alive:
                process.kill()
                process.join()


def _serve(connection: Connection, sent: bytes, files: tuple[str, ...], n_threads: int) -> None:
    """A worker: answers each index it is sent with (True, result) or (False, parts of the error)."""
    os.setpgrp()
    # A parent in the background may have left it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
        try:
            for file in files:
                from .provenance import load_file

                load_file(file)
            task, problem = pickle.loads(sent), None
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(n_threads)
        except Exception as error:
            # Told as the answer to a task, where somebody reads it.
            task, problem = None, error
        while True:
            connection.send_bytes(_answered(task, connection.recv(), problem))


def _answered(task: Any, index: int, problem: Exception | None) -> bytes:
    try:
        if problem is not None:
            raise problem
        return pickle.dumps((True, task(index)))
    except Exception as error:
        # Classes whose __init__ takes other arguments than `args` could not be pickled as they are.
        parts = (type(error), error.args, error.__dict__)
        try:
            return pickle.dumps((False, parts))
        except Exception:
            return pickle.dumps((False, (RuntimeError, (f"{type(error).__name__}: {error}",), {})))


def _rebuilt(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def _death(name: str, code: int | None) -> str:
    if code is not None and code < 0:
        why = f"was killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        return f"the process of {name} {why}. Take fewer workers, or run this one by itself to see what it needs."
    return (
        f"the process of {name} ended with code {code} before it could answer. Spawned processes import the main "
        "script once more: what it runs has to stand below `if __name__ == '__main__':`. Its own message is above."
    )


def _pickled(task: Task) -> bytes:
    buffer = io.BytesIO()
    try:
        _Sender(buffer).dump(task)
    except (pickle.PicklingError, TypeError, AttributeError) as problem:
        raise TypeError(
            f"workers: what is to be run cannot be sent to another process: {problem}. The scenario's class and all "
            "functions (reduce, observables, fields) have to be defined at the top level of a module: no lambda, and "
            "nothing within a function. Move them there, or leave workers out."
        ) from problem
    return buffer.getvalue()


class _Sender(pickle.Pickler):
    """Pickles what a spawned process will find again: it imports the main script, and no notebook or prompt."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (type, FunctionType)) and value.__module__ == "__main__" and not _main_is_importable():
            raise TypeError(
                f"{value.__qualname__} is defined in a notebook or at a prompt, which has no file to import"
            )
        return NotImplemented


def _main_is_importable() -> bool:
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    return getattr(main, "__spec__", None) is not None or (file is not None and Path(file).is_file())


def _files() -> tuple[str, ...]:
    """Python files that were loaded as modules by their path: a new process knows nothing of them."""
    provenance = sys.modules.get(f"{__package__}.provenance")
    if provenance is None:
        # Nothing was loaded by what is not loaded itself.
        return ()
    modules = [m for name, m in list(sys.modules.items()) if name.startswith(provenance.FROM_FILE)]
    return tuple(file for m in modules if (file := m.__file__) is not None)
