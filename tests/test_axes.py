"""Colours and line styles that everybody can tell apart."""

import itertools

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mfsde.analysis import plots
from mfsde.analysis.axes import COLOURS, STYLES, shades

# Machado, Oliveira, Fernandes, A physiologically-based model for simulation of color vision deficiency (2009), complete
# deuteranopia, on linear RGB.
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
JUST_SEEN = 2.3  # distance in CIELAB


def seen(colour):
    """What a deuteranope sees, in CIELAB."""
    rgb = np.array([int(to_hex(colour)[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(DEUTERANOPIA @ linear, 0, 1) / TO_XYZ.sum(1)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours):
    return min(np.linalg.norm(seen(a) - seen(b)) for a, b in itertools.combinations(colours, 2))


def test_colours_differ_for_a_deuteranope_and_lines_in_style_too():
    assert closest(COLOURS) > 6 * JUST_SEEN
    assert closest(["#d62728", "#2ca02c"]) < 4 * JUST_SEEN  # the usual red and green do not
    assert len(set(STYLES)) == len(COLOURS)
    ax = Figure().add_subplot()
    for k in range(6):
        plots.series(xr.DataArray([k, k + 1.0], {"time": [0.0, 1.0]}, "time"), ax, f"k = {k}")
    assert len({line.get_color() for line in ax.lines}) == 6


@pytest.mark.parametrize("n", [2, 5, 12])
def test_shades_of_time_are_ordered_by_lightness(n):
    lightness = np.array([seen(shade)[0] for shade in shades(n)])
    assert (np.diff(lightness) > 0).all()
