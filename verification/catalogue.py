"""All items in the order of the documents, and the choice of some."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module

from .item import Item

# One subject each; documents 001, 002, 003, 000, as their mathematics builds up.
MODULES = (
    *("langevin", "approximation", "chaos", "training", "gaussians"),
    *("function_space", "birth_death", "descent", "measures"),
)
DOCUMENTS = {
    "001": "Szpruch, Mean-field Langevin dynamics in the energy landscape of neural networks, seminar, Oxford (2019)",
    "002": "Montanari, One lecture on two-layer neural networks, Cargèse (2018)",
    "003": "Rotskoff, Mean-field neural networks, summer school, Shanghai (2020)",
    "000": "Yang, Goulbourne, review of Chizat, Bach, On the global convergence of gradient descent for "
    "over-parameterized models using optimal transport (2018), Cambridge (2020)",
}


def items() -> dict[str, Item]:
    """Name -> item, all of them, document by document."""
    found = [
        value
        for name in MODULES
        for value in vars(import_module(f".{name}", __package__)).values()
        if isinstance(value, Item)
    ]
    order = list(DOCUMENTS)
    return {what.name: what for what in sorted(found, key=lambda what: order.index(what.document))}


def chosen(names: Sequence[str]) -> list[Item]:
    """The items of these names, or of documents by their number; all of them for none.

    Raises:
        TypeError: a name that is no text.
        ValueError: an unknown name, with those that are near.

    """
    known = items()
    if not names:
        return list(known.values())
    wanted = []
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"an item is named by text; got {name!r:.60}. Write verify('sphere', '003').")
        if name not in known and name not in DOCUMENTS:
            near = difflib.get_close_matches(name, [*known, *DOCUMENTS], 3, 0.4)
            guess = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(
                f"unknown item {name!r}; {guess}The items are {', '.join(known)}; a document's number "
                f"({', '.join(DOCUMENTS)}) stands for all of its items."
            )
        wanted += [what for what in known.values() if name in (what.name, what.document)]
    return list(dict.fromkeys(wanted))
