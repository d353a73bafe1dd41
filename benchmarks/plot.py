"""docs/performance.png: the cost of a step against N for the workloads A, B and C, one thread, float32."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart, and one mark for each line.
STYLES: dict[str, tuple[str, str]] = {
    "mfsde": ("#0072B2", "o"),
    "mfsde compiled": ("#0072B2", "o"),
    "mfsde, compiled": ("#56B4E9", "o"),
    "mfsde grid": ("#56B4E9", "s"),
    "mfsde batches": ("#0072B2", "v"),
    "mfsde fourier": ("#56B4E9", "^"),
    "mfsde blocked": ("#0072B2", "x"),
    "torch loop": ("#D55E00", "o"),
    "torchsde": ("#D55E00", "x"),
    "numpy": ("#009E73", "o"),
    "numba": ("#009E73", "x"),
    "JAX": ("#CC79A7", "o"),
    "diffrax": ("#CC79A7", "x"),
    "KeOps": ("#E69F00", "o"),
    "SiSyPHE": ("#E69F00", "x"),
}
GREY = "#777777"
PANELS = {
    "A": ("Mean-field OU, d = 1", "ns per particle and step", 1e9, 1),
    "B": ("Gaussian attraction, d = 2", "ms per step", 1e3, 0),
    "C": ("Two-layer tanh network, n = 1000, d = 20", "ms per step", 1e3, 0),
}


def draw(record: Row, path: Path, device: str = "cpu") -> None:
    """One panel for each workload; ours solid, others thin, the machine's ceilings dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        row
        for row in record["workloads"]
        if row["threads"] == 1 and row["dtype"] == "float32" and row["replicas"] == 1 and row["device"] == device
    ]
    shown = [letter for letter in PANELS if any(row["workload"] == letter for row in rows)]
    figure, panels = plt.subplots(1, len(shown), figsize=(5.4 * len(shown), 5.2), layout="constrained", squeeze=False)
    for axes, letter in zip(panels[0], shown, strict=True):
        panel(axes, letter, [row for row in rows if row["workload"] == letter])
    machine = next(m for m in record["machines"] if (m["device"] == "cpu") == (device == "cpu"))
    where = machine["device"] if device == "cuda" else f"{machine['processor']}, one thread"
    figure.suptitle(f"Cost of an Euler step, float32; {where}, torch {machine['versions']['torch']}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panel(axes: Any, letter: str, rows: list[Row]) -> None:
    title, label, scale, order = PANELS[letter]
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    least: dict[int, float] = {}
    for row in rows:
        # Per particle where the cost is linear in their number: the line is then level.
        unit = scale / row["n"] ** order
        least[row["n"]] = row["ceiling_seconds"] * unit
        if row["seconds"] is not None and row["by"] in STYLES:
            lines[row["by"]].append((row["n"], row["seconds"] * unit))
    labels = []
    for name in sorted(lines, key=lambda name: list(STYLES).index(name)):
        colour, mark = STYLES[name]
        own = name.startswith("mfsde")
        axes.plot(*zip(*sorted(lines[name]), strict=True), color=colour, marker=mark, markersize=5 if own else 4,
                  linewidth=2.2 if own else 1.0, zorder=3 if own else 2)  # fmt: skip
        labels.append((name, colour, *max(lines[name])))
    what = rows[0]["ceiling"]
    axes.plot(*zip(*sorted(least.items()), strict=True), color=GREY, linestyle="--", linewidth=1.3)
    labels.append((f"ceiling: {what}", GREY, *max(least.items())))
    axes.set(title=title, ylabel=label, xlabel="particles N", xscale="log", yscale="log")
    axes.xaxis.set_minor_formatter("")
    axes.yaxis.set_minor_formatter("")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", linewidth=0.4, color="#dddddd")
    directly(axes, labels)


def directly(axes: Any, labels: list[tuple[str, str, int, float]]) -> None:
    """Each line named beside the last size, apart from each other, with a thin line where the name had to move."""
    import math

    low, high = axes.get_ylim()
    rightmost = max(x for _, _, x, _ in labels)
    span = math.log(high / low)
    gap, place = 0.045, -math.inf
    placed = []
    for name, colour, x, y in sorted(labels, key=lambda label: label[3]):
        place = max(math.log(y / low) / span, place + gap)
        placed.append([name, colour, x, y, place])
    # What went beyond the top comes down again, and pushes those below it.
    ceiling = 1.0
    for label in reversed(placed):
        label[4] = min(label[4], ceiling)
        ceiling = label[4] - gap
    for name, colour, x, y, place in placed:
        axes.annotate(
            name, (x, y), xytext=(1.04, place), textcoords="axes fraction", va="center", fontsize=8.5, color=colour,
            fontweight="bold" if name.startswith("mfsde") else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.7, "relpos": (0, 0.5)},
        )  # fmt: skip
    axes.set_xlim(right=rightmost * 1.15)
    axes.set_ylim(low, high)
