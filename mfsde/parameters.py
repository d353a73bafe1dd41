"""Parameters of a scenario as a vector: what a run is differentiated with respect to, and what is fitted."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .model import parameters, scenario_name


@dataclass(frozen=True)
class Parameters:
    """Some fields of a scenario, each a float, a sequence of floats (nested or not) or a floating tensor.

    As a vector they follow one another in the order of `values`, sequences and tensors row by row.
    """

    values: dict[str, Any]

    @classmethod
    def of(cls, scenario: Any, names: Iterable[str]) -> Parameters:
        """The named fields.

        Raises:
            TypeError: a field that is no float, no sequence of floats and no floating tensor.
            ValueError: an unknown or repeated name, none at all, or a value that is not finite.

        """
        known, chosen = parameters(scenario), [names] if isinstance(names, str) else list(names)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(
                f"parameters = {chosen!r}; expected at least one field of {scenario_name(scenario)}, each once."
            )
        for name in chosen:
            if name not in known:
                raise ValueError(
                    f"{scenario_name(scenario)} has no parameter {name!r}; its fields are {', '.join(known)}."
                )
            _check(f"{scenario_name(scenario)}.{name}", known[name])
        return cls({name: known[name] for name in chosen})

    def labels(self) -> list[str]:
        """A name for every number: kappa, initial_mean[0], matrix[1,0], ..."""
        return [label for name, value in self.values.items() for label in _labels(name, _shape(value))]

    def sizes(self) -> dict[str, int]:
        """How many numbers each field has."""
        return {name: len(_labels(name, _shape(value))) for name, value in self.values.items()}

    def vector(self) -> list[float]:
        """All numbers."""
        return [number for value in self.values.values() for number in _numbers(value)]

    def replacing(self, vector: Sequence[float]) -> dict[str, Any]:
        """The fields with the numbers of a vector, each of its own kind."""
        rest = iter(vector)
        return {name: _rebuilt(value, rest) for name, value in self.values.items()}

    def leaves(self) -> dict[str, Tensor]:
        """The fields as tensors to differentiate with respect to.

        Numbers become float64 tensors without axes on the CPU, which multiply as Python's floats do in any dtype and on
        any device; sequences become float64 tensors.
        """
        return {name: _leaf(value) for name, value in self.values.items()}


def _check(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} is a tensor of {value.dtype}; a derivative needs a floating one: {name}.double().")
        if value.numel() == 0:
            raise ValueError(f"{name} is an empty tensor; there is nothing to differentiate.")
        finite = bool(torch.isfinite(value).all())
    else:
        numbers_ = list(_entries(name, value))
        if not numbers_:
            raise ValueError(f"{name} is empty; there is nothing to differentiate.")
        finite = all(abs(float(number)) < float("inf") for number in numbers_)
    if not finite:
        raise ValueError(f"{name} = {value!r:.60} is not finite; a derivative needs finite parameters.")


def _entries(name: str, value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _entries(name, part)
    elif isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        yield value
    else:
        told = "an integer" if isinstance(value, numbers.Integral) else f"a {type(value).__name__}"
        raise TypeError(
            f"{name} is or contains {value!r:.40}, {told}; a derivative needs floats, sequences of floats or floating "
            "tensors. A number that happens to be whole is written 1.0; what counts has no derivative."
        )


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(torch.tensor(value, dtype=torch.float64).shape)


def _labels(name: str, shape: tuple[int, ...]) -> list[str]:
    places = itertools.product(*(range(n) for n in shape))
    return [name + ("[" + ",".join(map(str, place)) + "]" if place else "") for place in places]


def _numbers(value: Any) -> list[float]:
    numbers_: list[float] = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    return numbers_


def _leaf(value: Any) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return tensor.detach().clone().requires_grad_()


def _rebuilt(value: Any, rest: Iterator[float]) -> Any:
    if isinstance(value, Tensor):
        flat = [next(rest) for _ in range(value.numel())]
        return torch.tensor(flat, dtype=torch.float64).reshape(value.shape).to(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_rebuilt(part, rest) for part in value)
    return float(next(rest))
