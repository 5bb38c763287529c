"""Run folders as they are found: finished, going on, stopped, killed, half written or damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import sections
from ..errors import UsageError, did_you_mean

CONFIG = "config.toml"
FILES = ("manifest.json", CONFIG, "metrics.jsonl")
ERROR = "error.txt"
NOT_METRICS = ("kind", "step", "epoch", "time_s", "lr", "samples_per_s", "consensus", "skipped_steps")
HINT = "Give the run folder that `slowmo train` told, or the folder that holds several: slowmo report runs"
SILENT_S = 600.0  # a run on another host that has written nothing for so long may be dead,
GAPS = 10  # where that is also so many times the usual time between its lines

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder's content, as far as it can be read."""

    folder: Path
    name: str
    """The folder's name; its whole path where another run's folder is called alike."""
    settings: dict[str, Any]
    """section.key -> value, defaults filled in; and "ranks" and "simulated" from the manifest."""
    manifest: dict[str, Any]
    records: list[Record]
    """The lines of metrics.jsonl in order. Numbers that were not finite are None."""
    faults: list[str] = field(default_factory=list)
    """What could not be read, in words."""

    @cached_property
    def state(self) -> str:
        """done, stopped, failed, running, killed, silent, unknown or empty.

        silent: on another host, no word for long; nobody here can tell whether it is dead. unknown: without a manifest.
        """
        result = self.manifest.get("result")
        if result in ("done", "stopped"):
            return str(result)
        if (self.folder / ERROR).exists():
            return "failed"
        alive = _is_alive(self.manifest)
        if alive is not None:
            return "running" if alive else "killed"
        if not self.manifest:
            return "unknown" if self.records else "empty"
        usual_s = self.time_s / max(1, len(self.records))
        return "running" if self.quiet_s < max(SILENT_S, GAPS * usual_s) else "silent"

    @property
    def quiet_s(self) -> float:
        """Seconds since the run last wrote."""
        times = [f.stat().st_mtime for name in FILES if (f := self.folder / name).exists()]
        return max(0.0, time.time() - max(times, default=0.0))

    @property
    def why(self) -> str:
        """What is known of an end that was none: the last line of error.txt, or the reason for stopping."""
        if self.state == "stopped":
            return str(self.manifest.get("reason", ""))
        with contextlib.suppress(OSError):
            lines = (self.folder / ERROR).read_text(encoding="utf-8", errors="replace").split("\n")
            # An error of ours is two lines, message and hint; the line that names the exception is the message.
            named = [line for line in lines if line[:1].strip() and ("Error: " in line or "Exception: " in line)]
            last = (named or [line for line in lines if line.strip()] or [""])[-1].strip()
            return last.removeprefix("slowmo_mpi.errors.SlowmoError: ")
        return ""

    @property
    def simulated(self) -> bool:
        return bool(self.settings["simulated"])

    @cached_property
    def steps(self) -> int:
        return max((int(r["step"]) for r in self.records), default=0)

    @cached_property
    def time_s(self) -> float:
        """Wall time of the training up to its last record, over all its lives."""
        return max((r["time_s"] for r in self.records if r.get("time_s") is not None), default=0.0)

    @property
    def progress(self) -> float | None:
        """The share that is done, or None where the length is not known."""
        if self.state == "done":
            return 1.0
        last = self.records[-1] if self.records else {"step": 0, "epoch": 0.0}
        for key, unit in (("run.steps", "step"), ("run.epochs", "epoch")):
            if isinstance(whole := self.settings.get(key), int) and whole > 0 and last.get(unit) is not None:
                return float(min(1.0, last[unit] / whole))
        return None

    def of(self, kind: str) -> list[Record]:
        return [r for r in self.records if r["kind"] == kind]

    @cached_property
    def windows(self) -> list[tuple[Record, int]]:
        """The train records, each with the number of steps that it sums up."""
        before = self._first_step
        found = []
        for record in self.of("train"):
            found.append((record, max(0, record["step"] - before)))
            before = record["step"]
        return found

    @property
    def _first_step(self) -> int:
        """Above 0 where the run began with another run's checkpoint."""
        lives = self.manifest.get("lives")
        first = lives[0] if isinstance(lives, list) and lives and isinstance(lives[0], dict) else self.manifest
        return int(first.get("resumed_at_step") or 0)

    def sent_bytes(self) -> float | None:
        """What a rank has sent in all, the mean over ranks."""
        known = [(r["sent_bytes_per_step"], n) for r, n in self.windows if r.get("sent_bytes_per_step") is not None]
        return sum(b * n for b, n in known) if known else None

    def samples_per_s(self) -> float | None:
        """Over the whole run, evaluations not counted."""
        steps, inverse = self._over_time(lambda record: 1.0)
        return steps / inverse if inverse else None

    def shares(self) -> dict[str, float]:
        """Parts of the step's time: the train records' NAME_share, weighted by time; computation is the rest."""
        names = dict.fromkeys(k for r, _ in self.windows for k in r if k.endswith("_share"))
        found = {}
        for name in names:
            _, whole = self._over_time(lambda record, name=name: 0.0 if record.get(name) is None else 1.0)
            _, part = self._over_time(lambda record, name=name: record.get(name) or 0.0)
            if whole:
                found[name.removesuffix("_share")] = part / whole
        return {"computation": max(0.0, 1 - sum(found.values())), **found} if found else {}

    def step_s(self) -> float | None:
        """Seconds per step, evaluations not counted."""
        rate = self.samples_per_s()
        batch, ranks = self.settings.get("task.batch_size"), self.settings["ranks"]
        return batch * ranks / rate if rate and isinstance(batch, int) and isinstance(ranks, int) else None

    def _over_time(self, weight: Any) -> tuple[float, float]:
        """Steps, and time in units of samples a step, of the train records, each weighed."""
        known = [(r, n) for r, n in self.windows if r.get("samples_per_s")]
        return sum(n * weight(r) for r, n in known), sum(n * weight(r) / r["samples_per_s"] for r, n in known)


def find(places: Iterable[str | Path]) -> list[Run]:
    """The runs at `places`: run folders, or folders that hold some, however deep. None twice.

    Raises: UsageError where a place does not exist or holds no run.
    """
    folders: dict[Path, Path] = {}
    for place in map(Path, places):
        if not os.path.exists(place):  # of a name that is too long too
            near = [p.name for p in place.parent.glob("*") if p.is_dir()]
            raise UsageError(f"There is no run {place}.{did_you_mean(place.name, near)}", HINT)
        here = place.parent if place.is_file() and place.name in FILES else place
        found = list(_run_folders(here)) if here.is_dir() else []
        if not found:
            raise UsageError(f"{place} holds no run: no folder with {', '.join(FILES[:2])} or {FILES[2]}.", HINT)
        folders |= {folder.resolve(): folder for folder in found if folder.resolve() not in folders}
    runs = [read(folder) for folder in folders.values()]
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else dataclasses.replace(run, name=str(run.folder)) for run in runs]


def read(folder: Path) -> Run:
    """A run folder, whatever state it is in. Raises nothing for files that are missing, cut off or damaged."""
    faults: list[str] = []
    manifest: dict[str, Any] = {}
    settings: dict[str, Any] = dict(DEFAULTS)
    with contextlib.suppress(FileNotFoundError):
        try:
            loaded = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            manifest = loaded if isinstance(loaded, dict) else {}
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            faults.append("manifest.json cannot be read")
    with contextlib.suppress(FileNotFoundError):
        try:
            table = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
            settings |= {f"{s}.{k}": v for s, keys in table.items() if isinstance(keys, dict) for k, v in keys.items()}
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            faults.append("config.toml cannot be read")
    records, damaged = _records(folder / "metrics.jsonl")
    if damaged:
        which = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        lines = f"{len(damaged)} of the {len(records) + len(damaged)} lines of metrics.jsonl"
        faults.append(f"{lines} cannot be read and {'is' if len(damaged) == 1 else 'are'} left out (line {which})")
    ranks = manifest.get("ranks")
    settings["ranks"] = ranks if isinstance(ranks, int) else None
    settings["simulated"] = str(manifest.get("mpi_library", "")).startswith("simulated")
    return Run(folder, folder.name, settings, manifest, records, faults)


DEFAULTS: dict[str, Any] = {
    f"{section.name}.{k.name}": [] if k.default is dataclasses.MISSING else k.default
    for section, keys in sections()
    for k in keys
    if k.name != "options"
}
"""Every key of the configuration, so that folders of different versions of it can be compared."""

MOVES = {f"{section.name}.{k.name}" for section, keys in sections() for k in keys if k.metadata["moves"]}
"""Those that move the trajectory. A key that is not known at all is a task's own, and moves it too."""


def _run_folders(folder: Path) -> Iterator[Path]:
    """A configuration alone is a run that has not begun, or lies in a job's folder, which holds the run's; an error
    alone, one that failed before it began."""
    if any((folder / name).is_file() for name in FILES if name != CONFIG):
        yield folder
        return
    inside: list[Path] = []
    with contextlib.suppress(OSError):
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.is_symlink() and child.name[:1] != ".":
                inside += _run_folders(child)
    yield from inside or [folder] * any((folder / name).is_file() for name in (CONFIG, ERROR))


def _records(path: Path) -> tuple[list[Record], list[int]]:
    """The records of metrics.jsonl, and the numbers of the lines that are none.

    A last line without its newline is being written, or was when the run was killed: it is no fault.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], []
    records, damaged = [], []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not (type(record["step"]) is int and isinstance(record["kind"], str)):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                damaged.append(number)
            continue
        records.append({k: v if k == "kind" or _is_finite(v) else None for k, v in record.items()})
    return records, damaged


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _is_alive(manifest: dict[str, Any]) -> bool | None:
    """Whether rank 0 still runs; None where that cannot be known: on another host, or by an older manifest."""
    pid = manifest.get("pid")
    if manifest.get("host") != socket.gethostname() or not isinstance(pid, int):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _started_before(pid, str(manifest.get("started", "")))


def _started_before(pid: int, moment: str) -> bool:
    """Whether the process is older than the manifest: another one may have got its number. True where unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        state, *fields = stat.rpartition(")")[2].split()  # from the third field on; the name may hold anything
        ticks = int(fields[18])
        lines = Path("/proc/stat").read_text().split("\n")
        boot_s = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
        written_s = time.mktime(time.strptime(moment[:19], "%Y-%m-%dT%H:%M:%S"))
    except (OSError, ValueError, StopIteration, IndexError):
        return True
    return state != "Z" and boot_s + ticks / os.sysconf("SC_CLK_TCK") <= written_s + 2
