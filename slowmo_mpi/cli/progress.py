"""How a run is shown: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from ..launch import terminal_columns
from ..units import clock
from .say import note

NOT_METRICS = (
    "kind", "step", "epoch", "time_s", "lr", "samples_per_s", "communication_share", "input_share",
    "sent_bytes_per_step", "consensus",
)  # fmt: skip


def spread_of(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """The metrics that a record has for each worker: name -> the keys of minimum, mean and maximum that are there."""
    keys = {k: [f"{k}_{end}" for end in ("min", "mean", "max") if f"{k}_{end}" in record] for k in record}
    return {k: found for k, found in keys.items() if len(found) > 1}


def metrics_of(record: Mapping[str, Any]) -> str:
    """The metrics of a line of metrics.jsonl, in words; of an evaluation also how far the workers differ."""
    spread = spread_of(record)
    hidden = {key for keys in spread.values() for key in keys}.union(NOT_METRICS)
    told = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items() if k not in hidden]
    measured = {k: [record[key] for key in keys] for k, keys in spread.items() if len(keys) == 3}
    differ = [
        f"{k} {low:.4f} to {high:.4f} (mean {mean:.4f})" for k, (low, mean, high) in measured.items() if low != high
    ]
    if measured:
        told.append(f"workers: {', '.join(differ) or 'all alike'}")
    return "  ".join(told)


class Progress:
    """Implements train.Show on stderr. Under `slowmo train -n N` the starter tells whether there is a terminal."""

    def __init__(self) -> None:
        self._columns = int(os.environ.get("SLOWMO_TERMINAL", 0)) or terminal_columns()
        self._bar: Any = None
        self._first = self._steps = 0
        self._started = 0.0

    def start(self, lines: list[str], first: int, steps: int) -> None:
        for line in lines:
            note(line)
        self._first, self._steps, self._started = first, steps, time.perf_counter()
        if self._columns:
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps, initial=first, ncols=self._columns, nrows=24, unit="step", file=sys.stderr,
                mininterval=0.3,
                bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {remaining} left{postfix}",
            )  # fmt: skip

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        self._line(text)

    def record(self, record: dict[str, Any]) -> None:
        metrics = metrics_of(record)
        if record["kind"] == "eval":
            metrics += "  " if metrics else ""
            tested = "test after" if metrics else "after"
            line = f"  {tested} epoch {record['epoch']:.2f}  {metrics}consensus {record['consensus']:.3g}"
            self._line(line)
            return
        rates = (
            f"{record['samples_per_s']:,.0f} samples/s  communication {record['communication_share']:.0%}  "
            f"consensus {record['consensus']:.3g}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"{metrics}  {rates}")
        else:
            done, to_do = record["step"] - self._first, self._steps - record["step"]
            left = (time.perf_counter() - self._started) / max(1, done) * to_do
            self._line(
                f"step {record['step']:>{len(str(self._steps))}}/{self._steps}  {metrics}  {rates}  {clock(left)} left"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            note(line)
