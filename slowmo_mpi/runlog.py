"""The run folder: manifest.json, config.toml, metrics.jsonl, and error.txt where a run failed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .config import Config, dump
from .errors import SlowmoError


def make_folder(config: Config) -> Path:
    """A new folder RUNS/NAME-DATE-TIME; two runs that start together get two folders."""
    stem = f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    parent = Path(config.run.folder)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in ["", *(f"-{i}" for i in range(2, 100))]:
            try:
                (parent / (stem + suffix)).mkdir()
                return parent / (stem + suffix)
            except FileExistsError:
                continue
    except OSError as error:
        raise SlowmoError(
            f"The run folder cannot be made in {parent}: {error.strerror}.", "Type --set run.folder=FOLDER."
        ) from None
    raise SlowmoError(f"{parent} has 99 runs named {stem}.", "Type --set run.name=NAME.")


class RunLog:
    """What rank 0 writes while it trains. Each line of metrics.jsonl is complete once written."""

    def __init__(self, folder: Path, config: Config, manifest: Mapping[str, Any], resumed: int | None = None):
        """resumed: the step that a run which has such a folder already goes on from; what it wrote later is undone."""
        self.folder = folder
        (folder / "config.toml").write_text(dump(config), encoding="utf-8")
        self._manifest = dict(manifest)
        if resumed is not None:
            self._manifest["resumed_at_step"] = resumed
        if resumed is not None and (folder / "manifest.json").exists():
            first = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            lives = [*first.pop("lives", []), first]
            self._manifest["lives"] = lives
            _forget_after(folder / "metrics.jsonl", resumed)
        self._write_manifest()
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._board = _tensorboard(folder) if config.run.tensorboard else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. Numbers that are not finite become null: JSON has none."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._metrics.write(json.dumps(clean) + "\n")
        if self._board is not None:
            for name, value in clean.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def note(self, **facts: Any) -> None:
        """Add to the manifest."""
        self._manifest |= facts
        self._write_manifest()

    def close(self, **outcome: Any) -> None:
        """Add how it ended to the manifest."""
        self.note(ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **outcome)
        self._metrics.close()
        if self._board is not None:
            self._board.close()

    def _write_manifest(self) -> None:
        temporary = self.folder / "manifest.json.new"
        temporary.write_text(json.dumps(self._manifest, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.folder / "manifest.json")


def set_error_aside(folder: Path) -> None:
    """Rename the error.txt of a life that has ended, so that the next one's can be told."""
    for i in range(1, 1000):
        aside = folder / f"error-{i}.txt"
        if not aside.exists():
            with contextlib.suppress(OSError):
                (folder / "error.txt").rename(aside)
            return


def _forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that will be done again, and a last line that was cut off."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    temporary = metrics.with_suffix(".new")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(metrics)


def manifest(mpi_library: str, hosts: list[str], threads: int) -> dict[str, Any]:
    """What was run, by what, where."""
    import numpy
    import torch

    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "ranks": len(hosts),
        "hosts": hosts,
        "threads_per_rank": threads,
        "mpi_library": mpi_library,
        "versions": {
            "slowmo-mpi": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "git_commit": _git_commit(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def claim_error(folder: Path | None, report: str) -> bool:
    """True for the first rank that fails: it writes error.txt and is the one to speak.

    The file system decides who is first, since the others may be inside a wait and cannot be asked.
    """
    if folder is None:
        return True
    try:
        with (folder / "error.txt").open("x", encoding="utf-8") as file:
            file.write(report)
        return True
    except FileExistsError:
        return False
    except OSError:
        return True


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SlowmoError(
            "run.tensorboard = true needs the package tensorboard, which is not installed.",
            "Type `pip install tensorboard`, or --set run.tensorboard=false.",
        ) from None
    return SummaryWriter(str(folder))
