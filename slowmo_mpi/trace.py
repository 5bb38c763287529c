"""A time line of one rank: what it computed, copied, sent and waited for, as a Chrome/Perfetto trace.

Spans are kept in memory (about 100 bytes each) and written at the end. https://ui.perfetto.dev shows the file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LANES = ("computation", "waiting", "copies", "messages", "outer step", "input and output")
LIMIT = 1_000_000  # spans; a longer run keeps its first ones


class Trace:
    """Spans of one rank, by lane. Times are `time.time()`'s, so that the ranks of one host share a clock."""

    def __init__(self, rank: int = 0):
        self.rank = rank
        self._offset_s = time.time() - time.perf_counter()
        self._spans: list[tuple[str, str, float, float]] = []

    def add(self, lane: str, name: str, start_s: float, end_s: float) -> None:
        """One span, in `time.perf_counter()`'s seconds."""
        if len(self._spans) < LIMIT:
            self._spans.append((lane, name, start_s, end_s))

    @contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        """What is done inside the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, start, time.perf_counter())

    def seconds(self) -> dict[tuple[str, str], float]:
        """The time of all spans, summed by lane and name."""
        total: dict[tuple[str, str], float] = {}
        for lane, name, start, end in self._spans:
            total[lane, name] = total.get((lane, name), 0.0) + end - start
        return total

    def write(self, path: Path) -> None:
        """The trace as JSON: lanes as threads of a process named after the rank, messages under way side by side."""
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "process_name", "pid": self.rank, "args": {"name": f"rank {self.rank}"}}
        ]
        rows: dict[tuple[str, int], int] = {}
        free_at: dict[str, list[float]] = {}
        for lane, name, start, end in sorted(self._spans, key=lambda span: span[2]):
            ends = free_at.setdefault(lane, [])
            # A viewer nests what overlaps in one row; messages do not nest, so each row holds one at a time.
            row = next((i for i, e in enumerate(ends) if e <= start), len(ends)) if lane == "messages" else 0
            ends[row : row + 1] = [end]
            thread = rows.setdefault((lane, row), 100 * LANES.index(lane) + row)
            events.append({
                "ph": "X", "cat": lane, "name": name, "pid": self.rank, "tid": thread,
                "ts": (start + self._offset_s) * 1e6, "dur": (end - start) * 1e6,
            })  # fmt: skip
        for (lane, row), thread in rows.items():
            label = f"{lane} {row + 1}" if row else lane
            events.append({"ph": "M", "name": "thread_name", "pid": self.rank, "tid": thread, "args": {"name": label}})
            events.append(
                {
                    "ph": "M",
                    "name": "thread_sort_index",
                    "pid": self.rank,
                    "tid": thread,
                    "args": {"sort_index": thread},
                }
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
