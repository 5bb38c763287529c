"""The pictures of a comparison: each a few panels, drawn side by side as a PNG, or one by one as SVG for the page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..picture import INK, MUTED, blank, save
from ..units import size
from .compare import Comparison, Metric, Row, Series
from .runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5B4B8A", "#3B3B3B")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)))
GREY = "#C9CFD6"
NAMED = len(COLOURS) * 2  # rows with a line of their own; of more the best are named, the others grey
FEW = 4  # rows whose bands may lie on each other and still be told apart
POINTS = 8000  # in a panel
LOGARITHMIC = 30.0  # the ratio of largest to smallest from which an axis is logarithmic
PARTS = {"computation": "#C4CCD4", "communication": "#4A5764", "input": "#A98467"}  # no row has these colours
EXTRA = 4  # metrics beside the loss that get a figure

Draw = Callable[["Axes"], None]


@dataclass(frozen=True)
class Panel:
    draw: Draw
    says: str
    """What it shows, for those who cannot see it."""


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    note: str
    panels: list[Panel]
    legend: bool = True
    """Whether it needs the list of rows by colour."""


@dataclass(frozen=True)
class Pen:
    """How a row is drawn everywhere."""

    colour: str
    dash: Any = "-"
    named: bool = True


def pens(comparison: Comparison) -> dict[str, Pen]:
    """A pen for each row, by its label."""
    rows = comparison.rows
    if len(rows) > NAMED:
        best = [row.label for row in comparison.ranking()[: len(COLOURS)]]
        coloured = {label: Pen(colour) for label, colour in zip(best, COLOURS, strict=True)}
        return {row.label: coloured.get(row.label, Pen(GREY, named=False)) for row in rows}
    return {row.label: Pen(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS)]) for i, row in enumerate(rows)}


def named(comparison: Comparison) -> list[Row]:
    """The rows with a line of their own: all in their order, or of many the best, best first."""
    drawn = pens(comparison)
    rows = comparison.rows if len(comparison.rows) <= NAMED else comparison.ranking()
    return [row for row in rows if drawn[row.label].named]


def figures(comparison: Comparison) -> list[Figure]:
    """What there is to draw: a figure whose numbers no run has is left out."""
    lines = _Lines(comparison, pens(comparison))
    found = []
    wanted = [m for m in comparison.metrics if m.name == "loss" or m.kind == "eval"]
    wanted += [m for m in comparison.metrics if Metric("eval", m.name) not in wanted and m not in wanted]
    for metric in wanted[: 2 + EXTRA]:
        if any(row.series(metric) for row in comparison.rows):
            where = "" if metric.kind == "eval" else ", the mean over workers and the steps since the last line"
            of = " of the averaged model" if metric.kind == "eval" else ""
            panels = [
                Panel(partial(lines.metric, metric=metric, against="steps"), f"{metric.title} against steps"),
                Panel(partial(lines.metric, metric=metric, against="time"), f"{metric.title} against wall time"),
            ]
            title = metric.title[:1].upper() + metric.title[1:]
            found.append(Figure(_file(metric), title, f"{title}{of}{where}.{lines.bands(metric)}", panels))
    found += lines.consensus() + lines.traffic() + lines.time()
    return found


def overview(found: list[Figure], comparison: Comparison) -> Figure:
    """The most telling panels of a comparison's figures in one: learning by step, time and bytes, and a step's time."""
    by_name = {figure.name: figure.panels for figure in found}
    first, last = comparison.main[:1], [comparison.headline] if comparison.headline else []
    chosen = [by_name.get(_file(m), [])[:1] for m in first] + [by_name.get(_file(m), [])[1:] for m in last]
    chosen += [by_name.get("traffic", [])[1:], by_name.get("time", [])[:1]]
    return Figure("overview", "", "", [panel for panels in chosen for panel in panels])


def png(figure: Figure, comparison: Comparison, path: Path) -> None:
    """The panels two by two, the legend below them. Raises OSError."""
    handles, labels = _legend(comparison) if figure.legend else ([], [])
    columns = max(1, min(4, math.floor(100 / (max(map(len, labels), default=1) + 8))))
    rows = math.ceil(len(labels) / columns)
    high = math.ceil(len(figure.panels) / 2)
    canvas = blank(11, 0.5 + 3.5 * high + 0.25 * rows)
    for i, panel in enumerate(figure.panels):
        ax = canvas.add_subplot(high, 2, i + 1)
        _style(ax)
        panel.draw(ax)
    canvas.suptitle(figure.title, fontsize=13, color=INK, weight="bold")
    if handles:
        canvas.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
                      labelcolor=INK, handlelength=2.6)  # fmt: skip
    save(canvas, path)


def svg(panel: Panel) -> str:
    """One panel alone, as an SVG document: letters are outlines, so that it looks alike everywhere."""
    canvas = blank(5.0, 3.4)
    axes = canvas.subplots()
    _style(axes)
    panel.draw(axes)
    text = io.StringIO()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "slowmo"}):
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


@dataclass(frozen=True)
class _Lines:
    """Draws on axes what the rows came to."""

    comparison: Comparison
    pens: dict[str, Pen]

    def metric(self, axes: Axes, metric: Metric, against: str) -> None:
        drawn = [(row, s) for row in self.comparison.rows if (s := row.series(metric))]
        self._curves(axes, drawn, against)
        target = self.comparison.target
        if target and target.metric == metric:
            axes.axhline(target.value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        self._scale(axes, [v for _, s in drawn for v in s.values], metric.title)

    def bands(self, metric: Metric) -> str:
        """What the bands of this metric's figure are, as a sentence; "" where there is none."""
        kinds = dict.fromkeys(s.band for row in self.comparison.rows if (s := row.series(metric)) and s.band)
        if not kinds:
            return ""
        return " Band: the lowest to the highest of the " + ", or of the ".join(kinds) + "."

    def consensus(self) -> list[Figure]:
        metric = Metric("train", "consensus")
        drawn = []
        for row in self.comparison.rows:
            if (s := row.series(metric)) and any(v > 0 for v in s.values):
                keep = [i for i, v in enumerate(s.values) if v > 0]  # a logarithmic axis has no zero
                drawn.append((row, Series([s.steps[i] for i in keep], [s.times_s[i] for i in keep],
                                          [s.values[i] for i in keep])))  # fmt: skip
        if not drawn:
            return []

        def draw(axes: Axes, against: str) -> None:
            self._curves(axes, drawn, against)
            self._scale(axes, [v for _, s in drawn for v in s.values], "consensus distance")

        note = "Consensus distance, sqrt(1/m Σ |z_i - mean|²): how far apart the workers are. Zeros are left out."
        panels = [
            Panel(lambda axes: draw(axes, "steps"), "consensus distance against steps"),
            Panel(lambda axes: draw(axes, "time"), "consensus distance against wall time"),
        ]
        return [Figure("consensus", "Consensus distance", note, panels)]

    def traffic(self) -> list[Figure]:
        """What a rank sends: by step, and what it buys."""
        metric = self.comparison.headline
        sums = [(row, total.mean) for row in named(self.comparison) if (total := row.number(_sent_per_step))]
        if metric is None or not any(total for _, total in sums):
            return []

        def bought(axes: Axes) -> None:
            drawn = []
            for row in self.comparison.rows:
                if (s := row.series(metric)) and row.runs[0].sent_bytes():
                    at = [_sent_until(row.runs[0], step) / 1e6 for step in s.steps]
                    drawn.append((row, Series(s.steps, at, s.values, s.low, s.high, s.band)))
            self._curves(axes, drawn, "sent")
            self._scale(axes, [v for _, s in drawn for v in s.values], metric.title)

        note = "What a rank sends, outer steps included, the mean over ranks; and what the metric has come to by then."
        panels = [Panel(lambda axes: _bars(axes, sums, self.pens), "bytes that a rank sends per step"),
                  Panel(bought, f"{metric.title} against the bytes that a rank has sent")]  # fmt: skip
        return [Figure("traffic", "Bytes sent", note, panels)]

    def time(self) -> list[Figure]:
        """Where a step's time goes."""
        rows = [row for row in named(self.comparison) if row.number(Run.step_s) and row.runs[0].shares()]
        if not rows:
            return []

        def draw(axes: Axes) -> None:
            parts = dict.fromkeys(part for row in rows for part in row.runs[0].shares())
            left = [0.0] * len(rows)
            for i, part in enumerate(parts):
                widths = [1e3 * _part_s(row, part) for row in rows]
                axes.barh(range(len(rows)), widths, left=left, label=part, height=0.62,
                          color=PARTS.get(part, COLOURS[(i + 2) % len(COLOURS)]))  # fmt: skip
                left = [x + w for x, w in zip(left, widths, strict=True)]
            axes.set_xlabel("time of a step, ms", color=INK)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=8.5, labelcolor=INK)
            _names(axes, rows)

        def rate(axes: Axes) -> None:
            metric = Metric("train", "samples_per_s")
            self._curves(axes, [(row, s) for row in self.comparison.rows if (s := row.series(metric))], "time")
            axes.set_ylabel("samples per second, all ranks", color=INK)
            axes.set_ylim(bottom=0)

        note = "Evaluations and checkpoints not counted. Communication is what ranks wait for; what hides is not in it."
        panels = [Panel(draw, "the parts of a step's time"), Panel(rate, "samples per second against wall time")]
        return [Figure("time", "Time of a step", note, panels)]

    def _curves(self, axes: Axes, drawn: list[tuple[Row, Series]], against: str) -> None:
        for row, s in drawn:
            x = [float(step) for step in s.steps] if against == "steps" else s.times_s
            self._line(axes, row, x, s.values, s.low, s.high)
        if against == "steps":
            axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}" if step == round(step) else "")
        names = {"steps": "steps", "sent": "sent by a rank, MB"}
        axes.set_xlabel(names.get(against) or _time_axis(axes), color=INK)
        axes.set_xlim(0, 1.03 * axes.dataLim.x1 if axes.dataLim.x1 > 0 else 1)

    def _line(self, axes: Axes, row: Row, x: Any, y: Any, low: Any = None, high: Any = None) -> None:
        pen = self.pens[row.label]
        every = max(1, math.ceil(len(x) * len(self.comparison.rows) / POINTS))
        keep = sorted({*range(0, len(x), every), len(x) - 1})
        x, y = [x[i] for i in keep], [y[i] for i in keep]
        mark: dict[str, Any] = {"marker": "o", "markersize": 3.5 if len(x) <= 30 and pen.named else 0}
        style: dict[str, Any] = {"color": pen.colour, "linestyle": pen.dash, "zorder": 3 if pen.named else 2}
        axes.plot(x, y, linewidth=1.7 if pen.named else 0.8, **mark, **style)
        if low is not None and pen.named:
            alpha = 0.16 if len(self.comparison.rows) <= FEW else 0.06
            low, high = [low[i] for i in keep], [high[i] for i in keep]
            axes.fill_between(x, low, high, color=pen.colour, alpha=alpha, linewidth=0, zorder=1)

    def _scale(self, axes: Axes, values: list[float], title: str) -> None:
        axes.set_ylabel(title, color=INK)
        if values and min(values) > 0 and max(values) / min(values) > LOGARITHMIC:
            from matplotlib.ticker import LogLocator

            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) / min(values) < 1e3 else (1,)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _bars(axes: Axes, sums: list[tuple[Row, float]], pens: dict[str, Pen]) -> None:
    unit = 1e6 if max(total for _, total in sums) >= 1e6 else 1e3
    axes.barh(range(len(sums)), [total / unit for _, total in sums], color=[pens[row.label].colour for row, _ in sums],
              height=0.62)  # fmt: skip
    for i, (_, total) in enumerate(sums):
        axes.annotate(size(total), (total / unit, i), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=8.5, color=INK)  # fmt: skip
    axes.margins(x=0.16)
    axes.set_xlabel(f"sent by a rank per step, {'MB' if unit == 1e6 else 'kB'}", color=INK)
    _names(axes, [row for row, _ in sums])


def _names(axes: Axes, rows: list[Row]) -> None:
    """The rows' names beside bars, the first on top."""
    axes.set_yticks(range(len(rows)), [_plain(_wrapped(row.label)) for row in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _wrapped(label: str) -> str:
    """A long name in two lines, or cut."""
    if len(label) <= 22:
        return label
    middle = min(
        (i for i, c in enumerate(label) if c == " "), key=lambda i: abs(i - len(label) / 2), default=len(label)
    )
    return "\n".join(part if len(part) <= 30 else part[:29] + "…" for part in (label[:middle], label[middle + 1 :]))


def _plain(label: str) -> str:
    """A $ in a name begins no formula."""
    return label.replace("$", r"\$")


def _legend(comparison: Comparison) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    drawn = pens(comparison)
    rows = named(comparison)
    handles = [Line2D([], [], color=drawn[r.label].colour, linestyle=drawn[r.label].dash, linewidth=2) for r in rows]
    labels = [_plain(_several(row)) for row in rows]
    if len(rows) < len(comparison.rows):
        handles.append(Line2D([], [], color=GREY, linewidth=1))
        labels.append(f"{len(comparison.rows) - len(rows)} others")
    return handles, labels


def _several(row: Row) -> str:
    return row.label if len(row.runs) == 1 else f"{row.label} ({len(row.runs)} seeds)"


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(color="#E4E8EC", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, color=MUTED, labelcolor=INK)
    axes.xaxis.label.set_fontsize(9.5)
    axes.yaxis.label.set_fontsize(9.5)


def _time_axis(axes: Axes) -> str:
    """The label of an axis in seconds, whose ticks are shown in the unit that suits them."""
    from matplotlib.ticker import MultipleLocator

    longest = axes.dataLim.x1
    units = {"hours": 3600.0, "minutes": 60.0}
    unit = next((name for name, seconds in units.items() if longest > 3 * seconds), "seconds")
    if seconds := units.get(unit):
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / seconds:g}")
        base = 10 ** math.floor(math.log10(longest / seconds / 4)) * seconds
        axes.xaxis.set_major_locator(MultipleLocator(next(base * k for k in (1, 2, 5, 10) if longest <= 8 * base * k)))
    return f"wall time, {unit}"


def _part_s(row: Row, part: str) -> float:
    """Seconds of a step that are this part's, the mean over the row's runs."""
    found = row.number(lambda run: (run.step_s() or 0.0) * run.shares().get(part, 0.0))
    return found.mean if found else 0.0


def _sent_per_step(run: Run) -> float | None:
    steps = sum(n for r, n in run.windows if r.get("sent_bytes_per_step") is not None)
    total = run.sent_bytes()
    return total / steps if total is not None and steps else None


def _sent_until(run: Run, step: int) -> float:
    return sum(r["sent_bytes_per_step"] * n for r, n in run.windows
               if r["step"] <= step and r.get("sent_bytes_per_step") is not None)  # fmt: skip


def _file(metric: Metric) -> str:
    """What a metric's figure and its file are called."""
    return f"{metric.kind}-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in metric.name)
