"""Vector fields: the drift of a scenario at the law of a cloud, as arrows in the plane of two components."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mfsde import EmpiricalMeasure
from mfsde.model import on_device

from .axes import GREY
from .clouds import Cloud
from .particles import check_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARROWS = 15  # per axis


def draw_drift(ax: Axes, scenario: Any, cloud: Cloud, index: int, components: tuple[int, int]) -> None:
    """b(t, x, m) on the Axes as they are; further components of x are at their means."""
    x, weight = cloud.at(index)
    i, j = components
    sides = [np.linspace(*limits, ARROWS + 2)[1:-1] for limits in (ax.get_xlim(), ax.get_ylim())]
    across, up = (grid.ravel() for grid in np.meshgrid(*sides))
    points = np.tile(weight @ x, (len(across), 1))
    points[:, i], points[:, j] = across, up
    kind = torch.float64
    period = None if all(map(math.isinf, cloud.lengths)) else list(cloud.lengths)
    law = EmpiricalMeasure.given(torch.tensor(x, dtype=kind)[None], torch.tensor(weight, dtype=kind)[None], period)
    moved = on_device(scenario, torch.device("cpu"), kind)
    b = moved.drift(float(cloud.times[index]), torch.tensor(points, dtype=kind)[None], law)[0].detach().numpy()
    check_finite(b, "phase, the drift")
    ax.quiver(across, up, b[:, i], b[:, j], color=GREY, angles="xy", width=0.004, gid="field", zorder=1)
