"""How two checkpoints differ, and whether training goes on alike from both."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import dump, parse
from ..errors import UsageError
from .read import Checkpoint, versions
from .tree import STORED

PIECE = 1 << 22  # elements that are compared at once
TOLD_APART = ("config", "versions", "written")  # attributes; when one was written is no difference
CALLERS = "extra"  # the caller's part of the tree

Pairs = dict[str, tuple[Any, Any]]  # what the first has and what the second has; None: nothing


@dataclass(frozen=True)
class Compared:
    """A vector, all its rows: how many elements differ in any bit, and by how much at most (nan: by no number).

    note: why it cannot be compared; then it counts as different.
    """

    elements: int = 0
    differ: int = 0
    largest: float = 0.0
    note: str = ""

    @property
    def same(self) -> bool:
        return not self.differ and not self.note


@dataclass(frozen=True)
class Change:
    """A leaf of a rank's tree that differs; None where a tree has none (or holds None)."""

    rank: int
    path: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """What differs: only that, but for `vectors`, which has all.

    state_note: why the ranks' trees were not compared. same: training goes on alike from both. The caller's `extra`
    is compared too but does not decide: it may hold times of day.
    """

    attributes: Pairs
    config: Pairs
    versions: Pairs
    parameters: Pairs
    state: list[Change]
    state_note: str
    vectors: dict[str, Compared] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        vectors = all(c.same for name, c in self.vectors.items() if not _callers(name))
        return vectors and not self.state_note and all(_callers(c.path) for c in self.state)


def compare(a: Checkpoint, b: Checkpoint) -> Comparison:
    """What differs between two checkpoints whose data are proved."""
    same_ranks = a.ranks == b.ranks
    note = "" if same_ranks else f"{a.ranks} ranks and {b.ranks}"
    trees = ((r, json.loads(a.text(r)), json.loads(b.text(r))) for r in range(a.ranks if same_ranks else 0))
    return Comparison(
        attributes=_pairs(*({k: v for k, v in c.attributes.items() if k not in TOLD_APART} for c in (a, b))),
        config=_pairs(*_configs(a.attributes["config"], b.attributes["config"])),
        versions=_pairs(versions(a), versions(b)),
        parameters=_pairs(_parameters(a), _parameters(b)),
        state=[Change(r, *change) for r, mine, theirs in trees for change in _changes(mine, theirs)],
        state_note=note,
        vectors={name: _vectors(a, b, name) for name in sorted(a.datasets | b.datasets)},
    )


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Pairs:
    return {k: (a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)}


def _configs(*texts: str) -> Iterator[dict[str, Any]]:
    """Both by key, defaults filled in; as they are written where this version does not know their keys."""
    tables: list[dict[str, Any]]
    try:
        tables = [tomllib.loads(dump(parse(text))) if all(texts) else {} for text in texts]
    except UsageError:
        try:
            tables = [tomllib.loads(text) for text in texts]
        except tomllib.TOMLDecodeError:
            tables = [{"text": text} for text in texts]
    for table in tables:
        yield {
            f"{section}.{key}" if key else section: value
            for section, keys in table.items()
            for key, value in (keys.items() if isinstance(keys, dict) else [("", keys)])
        }


def _parameters(checkpoint: Checkpoint) -> dict[str, str]:
    columns = (checkpoint.table(f"layout/{key}") for key in ("name", "vector", "shape", "start", "strides"))
    return {
        n: f"{v} {shape} at {start}, strides {strides}" for n, v, shape, start, strides in zip(*columns, strict=True)
    }


# ---- the ranks' trees ----
def _changes(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves that differ between two trees as JSON has them; where a tensor lies is one leaf."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            word = "" if key in ("$tuple", "$items") else f"/{key}" if path else key
            yield from _changes(a.get(key), b.get(key), f"{path}{word}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and not path.endswith(("$tensor", "$numpy")):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _changes(x, y, f"{path}/{i}")
    elif json.dumps(a) != json.dumps(b):  # nan is nan, and 1 is not 1.0
        yield path.removesuffix("/$tensor").removesuffix("/$numpy"), a, b


def _callers(name: str) -> bool:
    return name.split("/")[0] == CALLERS


# ---- vectors ----
def _vectors(a: Checkpoint, b: Checkpoint, name: str) -> Compared:
    for checkpoint, which in ((a, "first"), (b, "second")):
        if name not in checkpoint.datasets:
            return Compared(note=f"the {which} has none")
    (kind, shape), (other_kind, other_shape) = a.datasets[name], b.datasets[name]
    rows = len(shape) == 2 or len(other_shape) == 2
    if kind != other_kind:
        return Compared(note=f"{kind} and {other_kind}")
    if rows and a.ranks != b.ranks:
        return Compared(note=f"a row per rank, of {a.ranks} ranks and of {b.ranks}: cannot be compared")
    if shape[-1] != other_shape[-1]:
        return Compared(note=f"{shape[-1]:,} elements and {other_shape[-1]:,}")
    differ, distances = 0, [0.0]
    ranks = range(a.ranks if rows else 1)
    for rank in ranks:
        for start in range(0, shape[-1], PIECE):
            here = slice(start, min(start + PIECE, shape[-1]))
            x, y = a.vector(name, rank, here), b.vector(name, rank, here)
            where = _bits(x) != _bits(y)
            if count := int(where.sum()):
                differ += count
                wide = torch.complex128 if x.is_complex() else torch.float64
                distances.append(float((x[where].to(wide) - y[where].to(wide)).abs().max()))
    largest = math.nan if any(map(math.isnan, distances)) else max(distances)
    return Compared(len(ranks) * shape[-1], differ, largest)


def _bits(x: Tensor) -> Tensor:
    return x.view(STORED[x.dtype.itemsize])
