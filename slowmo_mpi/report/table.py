"""The comparison as a table: text for people, plain data for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..units import size
from .compare import Comparison, Number, Row, short
from .runs import Run

NAME = 44  # the longest name of a row in the text table


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The heading, and a line of text per row. A column in which no row has anything is left out."""
    keys = comparison.keys
    heads = [*(short(k, keys) for k in keys), *_heads(comparison)]
    lines = []
    for row in comparison.rows:
        settings = ["-" if (v := row.settings[k]) is None else str(v) for k in keys]
        lines.append([*settings, *_values(comparison, row)])
    named = not keys or len({tuple(line[: len(keys)]) for line in lines}) < len(lines)
    if named:  # settings do not tell them apart
        heads = ["run", *heads]
        lines = [[row.runs[0].name, *line] for row, line in zip(comparison.rows, lines, strict=True)]
    used = [i for i in range(len(heads)) if i == 0 or any(line[i] not in ("-", "") for line in lines)]
    return [heads[i] for i in used], [[line[i] for i in used] for line in lines]


def text(comparison: Comparison) -> str:
    """Aligned columns, and below them what the figures mean where it is not plain."""
    heads, lines = cells(comparison)
    lines = [[_cut(cell) for cell in line] for line in lines]
    words = are_words(lines)
    widths = [max(len(row[i]) for row in [heads, *lines]) for i in range(len(heads))]
    out = []
    for line in [heads, *lines]:
        padded = [c.ljust(w) if left else c.rjust(w) for c, w, left in zip(line, widths, words, strict=True)]
        out.append("  ".join(padded).rstrip())
    return "\n".join([*out, *notes(comparison)])


def are_words(lines: list[list[str]]) -> list[bool]:
    """Which columns hold words, and are set to the left."""
    return [all(not _is_number(cell) for cell in column) for column in zip(*lines, strict=True)]


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table should know."""
    found = []
    if any(len(row.runs) > 1 for row in comparison.rows):
        found.append("±: standard deviation over the runs of a row, which differ in run.seed alone")
    if any(run.simulated for run in comparison.runs):
        found.append("simulated ranks take turns in one process: their times and rates are not a cluster's")
    found += [f"{run.name}: {end}" for run in comparison.runs if (end := ending(run))]
    found += [f"{run.name}: {fault}" for run in comparison.runs for fault in run.faults]
    told = [run.manifest["notes"] for run in comparison.runs if isinstance(run.manifest.get("notes"), list)]
    return found + list(dict.fromkeys(str(line) for lines in told for line in lines))  # the task's own, of its data


def ending(run: Run) -> str:
    """How a run ended that did not come to its end; "" for others."""
    at = f"after step {run.steps:,}" if run.records else "before its first line of metrics.jsonl"
    why = f": {run.why}" if run.why else ""
    match run.state:
        case "stopped" | "failed":
            return f"{run.state} {at}{why}"
        case "killed":
            return f"killed {at}: its process is gone, and it has not said why"
        case "silent":
            return f"no word since {span(run.quiet_s)}, {at}; it runs on {run.manifest.get('host', 'another host')}"
        case "empty":
            return "has no metrics yet"
    return ""


def data(comparison: Comparison) -> dict[str, Any]:
    """The table for programs. Times in seconds, shares from 0 to 1."""
    rows = []
    for row in comparison.rows:
        numbers = {
            "steps": row.number(lambda run: run.steps),
            "time_s": row.number(lambda run: run.time_s),
            **{f"{m.kind}/{m.name}": row.last(m) for m in comparison.metrics},
            **{f"best {m.kind}/{m.name}": row.best(m) for m in comparison.metrics},
            "time_to_target_s": row.number(comparison.target.time_s) if comparison.target else None,
            "sent_bytes": row.number(Run.sent_bytes),
            "samples_per_s": row.number(Run.samples_per_s),
            "step_s": row.number(Run.step_s),
            **{f"{part}_share": _share(row, part) for part in _parts(row)},
        }
        rows.append({
            "name": row.label, "settings": row.settings, "state": row.state, "runs": [str(r.folder) for r in row.runs],
            "seeds": [r.settings.get("run.seed") for r in row.runs],
            "numbers": {name: asdict(n) for name, n in numbers.items() if n is not None},
        })  # fmt: skip
    return {"target": comparison.target.title if comparison.target else None, "rows": rows}


def span(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def shown(number: Number | None) -> str:
    """A metric's number with as many digits as its spread leaves meaning."""
    if number is None:
        return "-"
    if abs(number.mean) >= 1e5 or 0 < abs(number.mean) < 1e-3:
        spread = "" if number.deviation is None else f" ± {number.deviation:.1e}"
        return f"{number.mean:.3e}{spread}"
    places = 4 if abs(number.mean) < 10 else 2
    spread = "" if number.deviation is None else f" ± {number.deviation:.{places}f}"
    return f"{number.mean:.{places}f}{spread}"


def _heads(comparison: Comparison) -> list[str]:
    metrics = [head for m in comparison.main for head in ((m.title, "best") if m.kind == "eval" else (m.title,))]
    target = [f"time to {comparison.target.title}"] if comparison.target else []
    return ["runs", "state", "steps", "time", *metrics, *target, "sent/rank", "communication", "samples/s"]


def _values(comparison: Comparison, row: Row) -> list[str]:
    time, sent, rate = row.number(lambda run: run.time_s), row.number(Run.sent_bytes), row.number(Run.samples_per_s)
    share = _share(row, "communication")
    line = [
        str(len(row.runs)) if len(comparison.rows) < len(comparison.runs) else "-",
        row.state if any(run.state != "done" for run in comparison.runs) else "-",
        f"{max(run.steps for run in row.runs):,}",
        span(time.mean) if time else "-",
    ]
    for metric in comparison.main:
        line.append(shown(row.last(metric)))
        if metric.kind == "eval":
            best, last = row.best(metric), row.last(metric)
            line.append("-" if best is None or best == last else shown(Number(best.mean)))
    if comparison.target:
        reached = row.number(comparison.target.time_s)
        some = f" ({reached.of} of {len(row.runs)})" if reached and reached.of < len(row.runs) else ""
        line.append(span(reached.mean) + some if reached else "never" if row.state == "done" else "not yet")
    line += [size(sent.mean) if sent else "-", f"{share.mean:.0%}" if share else "-"]
    return [*line, f"{rate.mean:,.0f}" if rate else "-"]


def _parts(row: Row) -> list[str]:
    return list(dict.fromkeys(part for run in row.runs for part in run.shares()))


def _share(row: Row, part: str) -> Number | None:
    return row.number(lambda run: run.shares().get(part))


def _cut(cell: str) -> str:
    return cell if len(cell) <= NAME else f"{cell[: NAME - 1]}…"


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[1:2].isdigit()
