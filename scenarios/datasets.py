"""Real classification data that need no download: scikit-learn's bundled sets, split and standardised."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

TEST_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs (n, p + 1) in float64 with a last column of ones, targets (n,) ±1.

    Inputs are standardised with the training set's mean and deviation and divided by √p, so that |z|² is of order one
    whatever p is.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


@cache
def load(name: str, split: int = 0) -> Dataset:
    """A data set by name: "digits" (even +1, odd -1) or "breast_cancer" (benign +1, malignant -1).

    Args:
        name: which one.
        split: seed of the stratified train/test split (a quarter is test data).

    Raises:
        ValueError: unknown name.
        ModuleNotFoundError: scikit-learn is not installed.

    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as problem:
        raise ModuleNotFoundError(
            f"the data set {name!r} comes with scikit-learn, which is not installed: pip install 'mfsde[data]'."
        ) from problem
    if name == "digits":
        bunch = datasets.load_digits()
        targets = np.where(bunch.target % 2 == 0, 1.0, -1.0)
    elif name == "breast_cancer":
        bunch = datasets.load_breast_cancer()
        targets = np.where(bunch.target == 1, 1.0, -1.0)
    else:
        raise ValueError(f"unknown data set {name!r}; expected 'digits' or 'breast_cancer'.")
    parts = train_test_split(bunch.data, targets, test_size=TEST_SHARE, random_state=split, stratify=targets)
    return _standardised(*parts)


def _standardised(train: np.ndarray, test: np.ndarray, train_y: np.ndarray, test_y: np.ndarray) -> Dataset:
    mean, deviation = train.mean(0), train.std(0)
    # Pixels that never change carry nothing; dividing by their deviation would make them NaN.
    safe = np.where(deviation > 0, deviation, 1.0) * np.sqrt(train.shape[1])
    with_bias = [np.column_stack([(z - mean) / safe, np.ones(len(z))]) for z in (train, test)]
    inputs = [torch.from_numpy(z) for z in with_bias]
    return Dataset(inputs[0], torch.from_numpy(train_y), inputs[1], torch.from_numpy(test_y))
