"""Runs side by side: which settings tell them apart, what each came to, repetitions with other seeds as one row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import UsageError, did_you_mean
from .runs import DEFAULTS, MOVES, NOT_METRICS, Run

HIGHER = ("acc", "top", "bleu", "f1", "auc", "score", "precision", "recall", "reward")
"""A metric with one of these in its name is better when it is higher; any other when it is lower, and an error too."""
WORKERS = ("_min", "_mean", "_max")
"""Endings of what a metric came to over the workers; the plain name is the averaged model's."""
COLUMNS = 5  # the most settings that name a row; runs that differ in more go by their folder's name
SHOWN = {"train": "train", "eval": "test"}


@dataclass(frozen=True)
class Metric:
    """A number that runs wrote: its name, and in which kind of record."""

    kind: str
    name: str

    @property
    def higher(self) -> bool:
        name = self.name.lower()
        return "err" not in name and any(word in name for word in HIGHER)

    @property
    def title(self) -> str:
        return f"{SHOWN.get(self.kind, self.kind)} {self.name}"

    def best(self, values: Sequence[float]) -> float:
        return max(values) if self.higher else min(values)


@dataclass(frozen=True)
class Target:
    """A metric's value that is to be reached."""

    metric: Metric
    value: float

    @property
    def title(self) -> str:
        return f"{self.metric.title} {'≥' if self.metric.higher else '≤'} {self.value:g}"

    def time_s(self, run: Run) -> float | None:
        """Wall time of the first record that reaches it, or None."""
        name, sign = self.metric.name, 1 if self.metric.higher else -1
        for record in run.of(self.metric.kind):
            if record.get(name) is not None and sign * record[name] >= sign * self.value:
                return record.get("time_s")
        return None


@dataclass(frozen=True)
class Number:
    """The mean over a row's runs, and their standard deviation (None for one run)."""

    mean: float
    deviation: float | None = None
    of: int = 1
    """Over how many of the row's runs; others have no such number."""


@dataclass(frozen=True)
class Series:
    """A metric of a row against steps and time, with a band: lowest and highest of workers, or of seeds."""

    steps: list[int]
    times_s: list[float]
    values: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    band: str = ""


@dataclass(frozen=True)
class Row:
    """One run, or finished runs of one setting that differ in nothing but the seed."""

    label: str
    settings: dict[str, Any]
    """The settings that tell the rows apart."""
    runs: list[Run]

    @property
    def state(self) -> str:
        return self.runs[0].state

    def number(self, value: Callable[[Run], float | None]) -> Number | None:
        """What `value` gives for the row's runs, summed up; None where it gives nothing."""
        known = [v for run in self.runs if (v := value(run)) is not None and math.isfinite(v)]
        if not known:
            return None
        deviation = statistics.stdev(known) if len(known) > 1 else None
        return Number(statistics.fmean(known), deviation, len(known))

    def last(self, metric: Metric) -> Number | None:
        """What the last record says: nothing where that is no number, as of a run that diverged."""
        return self.number(
            lambda run: next((r[metric.name] for r in reversed(run.of(metric.kind)) if metric.name in r), None)
        )

    def best(self, metric: Metric) -> Number | None:
        return self.number(lambda run: metric.best(values) if (values := _values(run, metric)) else None)

    def series(self, metric: Metric) -> Series | None:
        """A metric along the way. Of several runs the mean, at the steps that all of them have."""
        tables = [{r["step"]: r for r in run.of(metric.kind) if r.get(metric.name) is not None} for run in self.runs]
        common = sorted(set.intersection(*(set(t) for t in tables)))
        if not common:
            return None
        columns = [[table[step] for table in tables] for step in common]
        values = [statistics.fmean(r[metric.name] for r in column) for column in columns]
        times = [statistics.fmean(r.get("time_s") or 0.0 for r in column) for column in columns]
        if len(self.runs) > 1:
            low = [min(r[metric.name] for r in column) for column in columns]
            high = [max(r[metric.name] for r in column) for column in columns]
            return Series(common, times, values, low, high, "seeds")
        ends = (f"{metric.name}_min", f"{metric.name}_max")
        if all(column[0].get(end) is not None for column in columns for end in ends):
            low, high = ([column[0][end] for column in columns] for end in ends)
            return Series(common, times, values, low, high, "workers")
        return Series(common, times, values)


@dataclass(frozen=True)
class Comparison:
    """What a report shows."""

    runs: list[Run]
    rows: list[Row]
    keys: list[str]
    """The settings in which the rows differ, in the order of the configuration."""
    target: Target | None = None
    metrics: list[Metric] = field(default_factory=list)

    @cached_property
    def main(self) -> list[Metric]:
        """What a table shows: the training loss, and what was tested."""
        loss = [m for m in self.metrics if m == Metric("train", "loss")]
        tested = [m for m in self.metrics if m.kind == "eval"]
        return [*loss, *tested] or self.metrics[:2]

    @cached_property
    def headline(self) -> Metric | None:
        """What runs are ranked by: the target's metric, else a tested one, not the loss where there is another."""
        if self.target:
            return self.target.metric
        tested = [m for m in self.main if m.kind == "eval" and m.name != "loss"] or self.main
        return max(tested, key=lambda m: sum(bool(_values(run, m)) for run in self.runs), default=None)

    def ranking(self) -> list[Row]:
        """The rows by the headline's last value, best first."""
        metric = self.headline
        if metric is None:
            return list(self.rows)

        def place(row: Row) -> float:
            value = row.last(metric)
            return math.inf if value is None else -value.mean if metric.higher else value.mean

        return sorted(self.rows, key=place)

    def common(self) -> dict[str, Any]:
        """The settings that all runs share and that are not the defaults."""
        first = self.runs[0].settings
        same = [k for k in first if all(run.settings.get(k) == first[k] for run in self.runs)]
        return {k: first[k] for k in same if k not in DEFAULTS or first[k] != DEFAULTS[k]}


def compare(runs: Iterable[Run], target: str = "") -> Comparison:
    """Put runs side by side. target: METRIC=VALUE; METRIC is a name as in metrics.jsonl, or eval/NAME, train/NAME.

    Raises: UsageError where no run has the target's metric, or it is not of that form.
    """
    runs = list(runs)
    metrics = _metrics(runs)
    rows, keys = _rows(runs)
    return Comparison(runs, rows, keys, _target(target, metrics) if target else None, metrics)


def words(settings: dict[str, Any]) -> str:
    """Settings as a short name: "sgp, tau 48". Text speaks for itself; numbers need their key."""
    return ", ".join(word for key, value in settings.items() if (word := _word(key, value)))


def short(key: str, keys: Iterable[str]) -> str:
    """A key without its section, unless another of `keys` ends alike; a name's key is the section."""
    section, _, name = key.rpartition(".")
    if name == "name":
        return section
    return name if [k.rpartition(".")[2] for k in keys].count(name) < 2 else key


def _word(key: str, value: Any) -> str:
    name = key.rpartition(".")[2]
    if value is None or value == "":
        return f"{name} unset"
    if isinstance(value, bool):
        return name if value else f"not {name}"
    if isinstance(value, str):
        return value
    return (
        f"{value} {name}" if key == "ranks" else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
    )


def _metrics(runs: list[Run]) -> list[Metric]:
    """Loss first, and training before testing; then as the runs write them."""
    found = dict.fromkeys(
        Metric(r["kind"], name)
        for run in runs
        for r in run.records
        for name, value in r.items()
        if name not in NOT_METRICS and not name.endswith(("_share", "_per_step"))
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    plain = [m for m in found if not (m.name.endswith(WORKERS) and Metric(m.kind, m.name.rpartition("_")[0]) in found)]
    return sorted(plain, key=lambda m: (m.kind != "train", m.name != "loss"))


def _values(run: Run, metric: Metric) -> list[float]:
    return [r[metric.name] for r in run.of(metric.kind) if r.get(metric.name) is not None]


def _target(text: str, metrics: list[Metric]) -> Target:
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise UsageError(f"--target {text} is not of the form METRIC=VALUE.", "Type for example --target accuracy=0.9.")
    by_name = {m.name: m for m in metrics} | {f"{m.kind}/{m.name}": m for m in metrics}  # testing is the later one
    if name.strip() not in by_name:
        known = ", ".join(f"{m.kind}/{m.name}" for m in metrics) or "none"
        raise UsageError(f"No run has a metric {name!r}.{did_you_mean(name, by_name)}", f"The metrics are: {known}.")
    return Target(by_name[name.strip()], value)


def _rows(runs: list[Run]) -> tuple[list[Row], list[str]]:
    """The runs by setting, and the settings that are shown to tell the rows apart.

    Finished runs of one setting are a row if their seeds differ; a run that has not finished is a row of its own.
    """
    everything = dict.fromkeys(k for run in runs for k in run.settings)
    # task.data may be the same data in another place; nobody here can tell.
    moving = [k for k in everything if (k in MOVES or k not in DEFAULTS or k == "task.data") and k != "run.seed"]
    keys = [k for k in moving if len({repr(run.settings.get(k)) for run in runs}) > 1]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        setting = repr([run.settings.get(k) for k in keys])
        groups.setdefault(setting if run.state == "done" else str(run.folder), []).append(run)
    parts: list[list[Run]] = []
    for group in groups.values():
        seeds = {run.settings.get("run.seed") for run in group}
        parts += [group] if len(seeds) == len(group) else [[run] for run in group]

    if len(keys) > COLUMNS:
        keys = [k for k in keys if k in ("task.name", "base.algorithm")]
    labels = [words({k: part[0].settings.get(k) for k in keys}) for part in parts]
    rows = []
    for part, label in zip(parts, labels, strict=True):
        if not label or labels.count(label) > 1:
            label = part[0].name if label in part[0].name else f"{label}: {part[0].name}"
        rows.append(Row(label, {k: part[0].settings.get(k) for k in keys}, part))
    return rows, keys
