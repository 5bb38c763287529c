"""Runs that still go on, on a terminal: a few lines each, drawn over those before, until all have ended."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .compare import Metric, compare
from .runs import Run, find
from .table import ending, span

EVERY_S = 1.0
BLOCKS = "▁▂▃▄▅▆▇█"
UP, CLEAR = "\033[{}A", "\033[J"


def follow(places: Iterable[str | Path], show: Callable[[str], None]) -> list[Run]:
    """Show the runs until none goes on any more; as they were then.

    On a terminal a picture of bounded height is redrawn; elsewhere `show` gets each new record as a line, and each
    run's end. Raises: UsageError as `find`.
    """
    folders = [run.folder for run in find(places)]
    terminal = sys.stdout.isatty()
    seen: dict[Path, int] = {}
    drawn = 0
    while True:
        runs = find(folders)
        if terminal:
            columns, height = shutil.get_terminal_size()
            lines = _picture(runs, columns, height)
            sys.stdout.write((UP.format(drawn) if drawn else "") + "\r" + CLEAR + "\n".join(lines) + "\n")
            sys.stdout.flush()
            drawn = len(lines)
        else:
            for line in _news(runs, seen):
                show(line)
        if not any(run.state == "running" for run in runs):
            break
        time.sleep(EVERY_S)
    for run in runs:
        show(f"{run.name}: {ending(run) or f'{run.state} after {run.steps:,} steps, {span(run.time_s)}'}")
    return runs


def _news(runs: list[Run], seen: dict[Path, int]) -> list[str]:
    """A line for each record that was not there before. A run that was resumed may have lost some."""
    lines = []
    for run in runs:
        had = min(seen.get(run.folder, 0), len(run.records))
        name = f"{run.name}  " if len(runs) > 1 else ""
        lines += [f"{name}{_record(record)}" for record in run.records[had:]]
        seen[run.folder] = len(run.records)
    return lines


def _record(record: dict[str, object]) -> str:
    skipped = ("kind", "step", "time_s")
    values = [f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, int | float) and k not in skipped]
    return f"{record['kind']} step {record['step']}  {'  '.join(values)}"


def _picture(runs: list[Run], columns: int, height: int) -> list[str]:
    """As many lines as fit: where each run is, and the curves of what it is about."""
    lines: list[str] = []
    room = max(2, height - 2)
    for n, run in enumerate(runs):
        block = [_where(run), *_curves(run, columns)] if len(runs) <= room // 5 else [_where(run)]
        if len(lines) + len(block) > room - (1 if n < len(runs) - 1 else 0):
            lines.append(f"and {len(runs) - n} more")
            break
        lines += block
    return [line[: columns - 1] for line in lines]


def _where(run: Run) -> str:
    """State, steps, time left, speed, in a line."""
    parts = [run.name, run.state, f"step {run.steps:,}"]
    if (done := run.progress) is not None and run.state != "done":
        parts.append(f"{done:.0%}")
        if run.state == "running" and 0 < done < 1:
            parts.append(f"{span(run.time_s * (1 - done) / done)} left")
    if rate := run.samples_per_s():
        parts.append(f"{rate:,.0f} samples/s")
    if "communication" in (shares := run.shares()):
        parts.append(f"communication {shares['communication']:.0%}")
    if run.quiet_s > 60 and run.state == "running":
        parts.append(f"no word since {span(run.quiet_s)}")
    return "  ".join(parts)


def _curves(run: Run, columns: int) -> list[str]:
    """A line for each of the run's main metrics and the consensus distance, with the last value."""
    comparison = compare([run])
    lines = []
    for metric in [*comparison.main[:4], Metric("train", "consensus")]:
        if s := comparison.rows[0].series(metric):
            head = f"  {metric.title:<16.16} {s.values[-1]:<10.4g} "
            lines.append(head + sparkline(s.values, max(8, min(60, columns - len(head) - 1))))
    return lines


def sparkline(values: list[float], width: int) -> str:
    """A curve in a line of text: the means of equal parts, from the lowest block to the highest."""
    width = min(width, len(values))
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
