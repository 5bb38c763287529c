"""A picture of a topology: who sends to whom at each step, the product of a cycle, the error by steps."""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slowmo_mpi.errors import SlowmoError
from slowmo_mpi.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 8  # steps drawn; a cycle may have more
COLUMNS = 4
CURVE_STEPS = 400  # the longest error curve
TARGET = 1e-6
FLOOR = 1e-16  # errors below are rounding, and the axis ends there
INK, LINE, ACCENT, MUTED = "#1f2933", "#2f6db3", "#d1495b", "#8a97a6"


def draw(topology: Topology, path: str | Path) -> None:
    """Writes a PNG: one panel a step, a heat map of the cycle's product, the error against steps.

    Raises SlowmoError when matplotlib is not installed or the file cannot be written.
    """
    shown = min(topology.period, PANELS)
    rows = math.ceil(shown / COLUMNS)
    columns = math.ceil(shown / rows)  # 5 steps are 3 above 2, not 4 above 1
    figure = blank(11, 1.0 + 3.0 * rows + 4.0)
    halves: Any = figure.subfigures(2, 1, height_ratios=[3.0 * rows + 0.3, 4.0])
    above, below = halves
    title = f"{topology.name}, {_count(topology.ranks, 'rank')}"
    figure.suptitle(title, fontsize=16, color=INK, weight="bold")
    left_out = topology.period - shown
    above.suptitle(
        f"a cycle of {_count(topology.period, 'step')}" + (f", the last {left_out} not shown" if left_out else ""),
        fontsize=11,
        color=MUTED,
    )
    # Columns of half a panel, so that a short row stays in the middle, as large as a full one.
    grid = above.add_gridspec(rows, 2 * COLUMNS)
    for panel in range(shown):
        row, column = divmod(panel, columns)
        first = 2 * column + COLUMNS - min(columns, shown - row * columns)
        _draw_step(above.add_subplot(grid[row, first : first + 2]), topology, panel)
    heat, curve = below.subplots(1, 2, width_ratios=[1, 1.35])
    bar = _draw_product(heat, topology)
    below.colorbar(bar, ax=heat, shrink=0.85).ax.tick_params(labelsize=8, color=MUTED)
    _draw_errors(curve, topology)
    try:
        save(figure, path)
    except OSError as error:
        raise SlowmoError(
            f"The picture cannot be written to {str(path)!r}: {error.strerror}.", "Give another --png FILE."
        ) from None


def blank(width: float, height: float) -> "Figure":
    """An empty white figure, in inches, whose parts keep clear of each other; no display, no global state.

    Raises SlowmoError when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise SlowmoError(
            "Drawing needs matplotlib, which is not installed.", "Type `pip install matplotlib`."
        ) from None
    engine = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08, rect=(0.01, 0.01, 0.98, 0.98))
    figure = Figure(figsize=(width, height), facecolor="white", layout=engine)
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: str | Path) -> None:
    """Write a PNG. Raises OSError."""
    figure.savefig(path, dpi=130, format="png")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _draw_step(axes: "Axes", topology: Topology, step: int) -> None:
    """The ranks on a circle, rank 0 on top and on clockwise, and the messages of one step."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import FancyArrowPatch

    n = topology.ranks
    angles = np.pi / 2 - 2 * np.pi * np.arange(n) / n
    places = np.stack([np.cos(angles), np.sin(angles)], axis=1) if n > 1 else np.zeros((1, 2))
    edges = {(e.source, e.target): e.weight for e in topology.steps[step] if e.source != e.target}
    radius = 11.0 if n <= 12 else max(3.0, 130 / n)  # of a rank's disc, in points
    strongest = max(edges.values(), default=1.0)
    if len(edges) > 600:
        lines = [(places[i], places[j]) for i, j in edges]
        faint = max(0.02, 60 / len(edges))
        axes.add_collection(LineCollection(lines, colors=LINE, linewidths=0.4, alpha=faint))
    else:
        for (i, j), weight in edges.items():
            both = edges.get((j, i)) == weight
            if both and i > j:
                continue  # drawn once, with two heads
            axes.add_patch(
                FancyArrowPatch(
                    tuple(places[i]),
                    tuple(places[j]),
                    arrowstyle="<|-|>" if both else "-|>",
                    connectionstyle=f"arc3,rad={_bend(i, j, n, (j, i) in edges and not both):.3f}",
                    mutation_scale=max(5.0, 10 - n / 8),
                    shrinkA=radius * 0.8,
                    shrinkB=radius * 0.8,
                    linewidth=(0.5 + 1.1 * weight / strongest) * (1 if n <= 16 else 0.7),
                    color=LINE,
                    alpha=0.9 if len(edges) <= 40 else 0.5,
                    zorder=1,
                )
            )
    busy = {rank for edge in edges for rank in edge}
    # Idle ranks are hollow: they keep all they have.
    fills = [INK if rank in busy else "white" for rank in range(n)]
    x, y = places.T
    axes.scatter(x, y, s=(1.6 * radius) ** 2, c=fills, edgecolors=INK, linewidths=1, zorder=2)
    if n <= 24:
        size = 9 if n <= 12 else 6.5
        for rank in range(n):
            axes.text(
                x[rank],
                y[rank],
                str(rank),
                ha="center",
                va="center_baseline",
                fontsize=size,
                color="white" if rank in busy else INK,
                zorder=3,
            )
    else:
        for rank in range(0, n, math.ceil(n / 8)):
            at = 1.2 * places[rank]
            axes.text(at[0], at[1], str(rank), ha="center", va="center", fontsize=7, color=MUTED)
    weights = sorted({round(weight, 4) for weight in edges.values()})
    says = f"weights {weights[0]:.3g} to {weights[-1]:.3g}" if len(weights) > 1 else "no messages"
    if len(weights) == 1:
        says = f"weight {weights[0]:.3g}"
    axes.set_title(f"step {step}", fontsize=11, color=INK, pad=3)
    axes.text(0.5, -0.02, says, transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color=MUTED)
    axes.set(xlim=(-1.35, 1.35), ylim=(-1.3, 1.3), aspect="equal")
    axes.axis("off")


def _bend(source: int, target: int, n: int, opposed: bool) -> float:
    """How far an arrow bends to the inside, so that a short one does not run through the ranks it skips."""
    ahead = (target - source) % n
    apart = min(ahead, n - ahead)
    if opposed:
        return 0.14  # an arrow of another weight comes back: both bend to their own side
    inward = 1 if ahead == apart else -1
    return inward * (0.12 if apart == 1 else 0.32 * (1 - 2 * apart / n))


def _draw_product(axes: "Axes", topology: Topology) -> Any:
    """The cycle's product as a heat map; returns the image, for the colour bar."""
    n = topology.ranks
    far = float(np.abs(topology.cycle - 1 / n).max())
    top = max(float(topology.cycle.max()), 2 / n)
    image = axes.imshow(topology.cycle, cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
    exact = "exactly 1/n everywhere" if far < 1e-12 else f"at most {far:.3g} from 1/n = {1 / n:.3g}"
    axes.set_title(f"the product of a cycle: {exact}", fontsize=10.5, color=INK, pad=8)
    axes.set_xlabel("from rank", fontsize=9, color=INK)
    axes.set_ylabel("to rank", fontsize=9, color=INK)
    ticks = range(0, n, math.ceil(n / 16))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    if n <= 32:
        axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="minor", length=0)
    return image


def _draw_errors(axes: "Axes", topology: Topology) -> None:
    """max |z_i - mean| over unit inputs, step by step, on a logarithmic axis."""
    from matplotlib.ticker import MaxNLocator

    steps = topology.steps_to_average(TARGET)
    length = min(max(2 * topology.period, (steps or 0) + 2, 4), CURVE_STEPS)
    errors = np.maximum(list(itertools.islice(topology.errors(), length + 1)), FLOOR)
    axes.axhline(TARGET, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    style: dict[str, Any] = {"marker": "o", "markersize": 4} if length <= 60 else {}
    axes.plot(errors, color=LINE, linewidth=1.8, zorder=2, clip_on=False, **style)
    if steps is not None and steps <= length:
        axes.plot([steps], [errors[steps]], "o", markersize=8, color=ACCENT, zorder=3, clip_on=False)
        says = f"1e-6 after {_count(steps, 'step')}"
    elif steps is not None:
        says = f"1e-6 after {steps} steps, far to the right"
    else:
        says = "1e-6 is out of reach"
    gap = topology.spectral_gap
    axes.set_title(f"{says};  spectral gap of a cycle {gap:.3g}", fontsize=10.5, color=INK, pad=8)
    axes.set_xlabel("steps", fontsize=9, color=INK)
    axes.set_ylabel("largest error of a rank's average", fontsize=9, color=INK)
    lowest = errors.min()
    axes.set(yscale="log", xlim=(0, length), ylim=(FLOOR if lowest < 1e-12 else min(lowest / 3, 1e-7), 2))
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e4e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
