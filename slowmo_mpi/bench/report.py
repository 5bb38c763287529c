"""What a benchmark prints: a table as of the OSU benchmarks, or JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..comm.launcher import launched
from .common import Bench

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Column:
    """A column of the table: the row's key, the heading with its unit, how the value is shown, and times what."""

    key: str
    heading: str
    form: str = ""
    scale: float = 1

    def show(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return format(value * self.scale, self.form) if self.form else str(value)


def spread(unit: str, scale: float, form: str = ".1f") -> list[Column]:
    """The columns of `Timing.spread`."""
    named = (("time_s", unit), ("q1_s", "quartile 1"), ("q3_s", "quartile 3"))
    return [Column(key, heading, form, scale) for key, heading in named]


OVER_WIRE = Column("over_wire", "x wire", ".2f")
OK = Column("ok", "ok")


@dataclass(frozen=True)
class Report:
    """Rows of measurements: `about` says what was measured, in which units."""

    name: str
    about: Sequence[str]
    columns: Sequence[Column]
    rows: Rows
    environment: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether all results were correct."""
        return all(row.get("ok", True) for row in self.rows)

    def json(self) -> str:
        return json.dumps({"benchmark": self.name, "about": list(self.about), **self.environment, "rows": self.rows})

    def text(self) -> str:
        """`# ` lines, then aligned columns; those without any value are left out."""
        e = self.environment
        columns = [c for c in self.columns if any(row.get(c.key) is not None for row in self.rows)]
        table = [[c.heading for c in columns], *([c.show(row) for c in columns] for row in self.rows)]
        widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
        wire = f"; wire {e['wire_rate_bit_s'] / 1e9:g} Gbit/s" if e["wire_rate_bit_s"] else ""
        versions = ", ".join(f"{name} {number}" for name, number in e["versions"].items() if name != "mpi")
        head = [
            f"slowmo bench {self.name}: {_many(e['ranks'], 'rank')} on {_many(e['hosts'], 'host')}, "
            f"{_many(e['threads'], 'thread')} each{wire}",
            f"{e['device']}, {e['transport']}; {e['versions']['mpi']}, {versions}",
            e["command"],
            *self.about,
        ]
        lines = [f"# {line}" for line in head]
        for n, cells in enumerate(table):
            left = [c.ljust(w) if not column.form else c.rjust(w) for c, w, column in zip(cells, widths, columns)]  # noqa: B905
            lines.append(("# " if n == 0 else "  ") + "  ".join(left).rstrip())
        return "\n".join(lines)


def report(bench: Bench, name: str, about: Sequence[str], columns: Sequence[Column], rows: Rows) -> Report:
    """The report of this benchmark, with what it was measured on. Collective."""
    import torch

    from ..comm.mpi import library_version

    comm = bench.comm
    claim = launched()
    cuda = comm.device.type == "cuda"
    about = [*about, "median and quartiles of alternated repetitions, of each the slowest rank's time"]
    if any(row.get("over_wire") is not None for row in rows):
        about.append("x wire: the time over what a host's wire alone would take for the bytes it must send")
    environment = {
        "command": shlex.join(["slowmo", *sys.argv[1:]]),
        "launcher": claim.launcher if claim else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "ranks": comm.size,
        "hosts": bench.hosts,
        "threads": bench.threads,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(comm.device) if cuda else _processor(),
        "transport": comm.transport,
        "wire_rate_bit_s": bench.rate_bit_s or None,
        "versions": {
            "slowmo": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "mpi4py": version("mpi4py"),
            "mpi": library_version(),
        },
    }
    return Report(name, about, columns, rows, environment)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
