"""Going on with a run: which one, and whether its configuration still means the same."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from .checkpoint.read import Checkpoint
from .checkpoint.store import newest
from .comm import Endpoint
from .config import Config, changed, parse
from .errors import UsageError

AUTO = "auto"


def unfinished(config: Config) -> Path | None:
    """The newest run folder of this name that has a checkpoint and did not come to its end, or None."""
    parent = Path(config.run.folder)
    named = parent.glob(f"{glob.escape(config.run.name)}-*")
    for folder in sorted(named, key=lambda f: f.stat().st_mtime, reverse=True):
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        name, _, _ = folder.name.removeprefix(config.run.name).partition("-")
        if name == "" and manifest.get("result") != "done" and any((folder / "checkpoints").glob("step-*.h5")):
            return folder
    return None


def checkpoint_of(
    place: Path, config: Config, allowed: Iterable[str], comm: Endpoint, note: Callable[[str], None]
) -> Checkpoint:
    """The newest whole checkpoint of a run folder, or the file `place`; on all ranks together.

    Raises: SlowmoError where there is none; UsageError where the configuration differs from the one it was written
    under in keys that move the trajectory, and that are not `allowed`.
    """
    checkpoint = newest(place, comm, note)
    different = set(changes(checkpoint, config)) - set(allowed)
    if different:
        checkpoint.close()
        keys = sorted(different)
        before, now = parse(checkpoint.attributes["config"]), config
        told = [f"{k} was {_value(before, k)!r} and is {_value(now, k)!r}" for k in keys]
        raise UsageError(
            f"The configuration is not the one that {checkpoint.path} was written under: {'; '.join(told)}.",
            f"Put it back, or type {' '.join(f'--allow-changed {k}' for k in keys)} to go on all the same.",
        )
    return checkpoint


def changes(checkpoint: Checkpoint, config: Config) -> list[str]:
    """The keys that move the trajectory and differ from the checkpoint's configuration."""
    text = checkpoint.attributes["config"]
    return changed(parse(text, str(checkpoint.path)), config) if text else []


def _value(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    values = getattr(config, section)
    return getattr(values, name) if hasattr(values, name) else values.options.get(name)
