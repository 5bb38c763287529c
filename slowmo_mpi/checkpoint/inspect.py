"""Looking at checkpoints: which there are, what is in them, whether they are whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .read import Checkpoint, resolve, step_of, versions
from .seal import Damaged
from .write import SHARDS


def places(place: str | Path) -> list[Path]:
    """As `resolve`. Raises: UsageError also for what cannot be read."""
    try:
        return resolve(place)
    except OSError as error:
        raise UsageError(
            f"{place} cannot be read: {error.strerror}.", "Give a run folder, or a checkpoint file."
        ) from None


def opened(place: str | Path) -> Checkpoint:
    """The checkpoint that `place` is, or the newest of that run folder. Raises: UsageError; Damaged."""
    return _open(places(place)[0])


def _open(path: Path) -> Checkpoint:
    try:
        found = Checkpoint(path)
    except OSError as error:  # HDF5's: no memory, no locks on this file system, ...
        raise Damaged(path, f"HDF5 cannot open it ({' '.join(str(error).split())})") from None
    if "ranks" not in found.attributes:
        found.close()
        raise Damaged(path, "it is one rank's shard, a part of the checkpoint beside its folder")
    return found


@dataclass(frozen=True)
class Listed:
    """A line of `slowmo checkpoint list`. What only the inside tells is None where there is a fault."""

    file: str
    step: int
    round: int | None
    ranks: int | None
    layout: str | None
    bytes: int
    written: str | None
    fault: str | None = None


def listed(place: str | Path) -> Iterator[Listed]:
    """The checkpoints of a run, newest first, their structure proved."""
    for path in places(place):
        try:
            with _open(path) as c:
                a = c.attributes
                size = size_of(c.files)
                yield Listed(str(path), c.step, a["round"], c.ranks, a["layout"], size, a["written"])
        except Damaged as damaged:
            if not path.exists():  # a running job has just deleted an old one
                continue
            shards = path.parent.glob(f"{path.stem}{SHARDS}*/*")
            yield Listed(
                str(path), step_of(path), None, None, None, size_of([path, *shards]), None, _fault(path, damaged)
            )


def size_of(files: Iterable[Path]) -> int:
    """Their bytes; those of missing ones, which a running job may just have deleted, are 0."""
    return sum(path.stat().st_size for path in files if path.exists())


def verified(given: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each checkpoint with its fault, "" where every byte is as it was written; a folder stands for all in it."""
    for place in given:
        fault = ""
        try:
            paths = resolve(place)
        except UsageError:
            fault = "it has no checkpoint" if os.path.isdir(place) else "it is missing"
        except OSError as error:
            fault = f"it cannot be read ({error.strerror})"
        if fault:
            yield place, fault
            continue
        for path in paths:
            fault = _fault_of(path)
            if path.exists() or path == Path(place):  # as above
                yield str(path), fault


def _fault_of(path: Path) -> str:
    try:
        with _open(path) as found:
            found.prove()
    except Damaged as damaged:
        return _fault(path, damaged)
    except OSError as error:
        return f"reading it failed ({error.strerror or error})"
    return ""


def _fault(path: Path, damaged: Damaged) -> str:
    return damaged.fault if damaged.path == path else f"{damaged.path.name}: {damaged.fault}"


def contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that `slowmo checkpoint show` tells, for JSON."""
    slabs = [slab for _, slab in checkpoint.slabs()]
    layout = {key: checkpoint.table(f"layout/{key}") for key in ("name", "vector", "start", "shape", "strides")}
    parameters = [
        {"name": n, "vector": v, "start": int(at), "shape": json.loads(shape), "strides": json.loads(strides)}
        for n, v, at, shape, strides in zip(*layout.values(), strict=True)
    ]
    return {
        "file": str(checkpoint.path),
        "files": [str(path) for path in checkpoint.files],
        "bytes": size_of(checkpoint.files),
        "attributes": {k: v for k, v in checkpoint.attributes.items() if k not in ("config", "versions")},
        "versions": versions(checkpoint),
        "slabs": len(slabs),
        "slab_bytes": sum(length for slab in slabs for _, length in slab.extents),
        "datasets": list(_datasets(checkpoint)),
        "parameters": parameters,
        "elements": sum(math.prod(p["shape"]) for p in parameters),
        "model": dict(zip(checkpoint.table("model/key"), checkpoint.table("model/source"), strict=True)),
        "averaged": checkpoint.table("model/averaged"),
        "config": checkpoint.attributes["config"],
    }


def _datasets(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    found: list[tuple[str, Any]] = []
    checkpoint._h5.visititems(lambda name, item: found.append((name, item)))
    for name, item in found:
        if hasattr(item, "shape"):
            kind = checkpoint.datasets[name][0] if name in checkpoint.datasets else str(item.dtype)
            text = item.dtype.kind == "O"  # its own size would be that of pointers
            size = sum(len(t) for t in item[()]) if text else item.size * item.dtype.itemsize
            yield {"name": name, "type": "text" if text else kind, "shape": list(item.shape), "bytes": size}
