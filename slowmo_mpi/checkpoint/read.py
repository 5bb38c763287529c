"""Reading a checkpoint, whatever wrote it: proved first, then opened."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from . import hdf5
from .seal import Damaged, Slab, damaged_slabs, identity, proved
from .tree import dtype_of, unpack


class Checkpoint:
    """A checkpoint whose structure is proved; `prove` proves the data too. Close it, or use it in a `with`.

    path: the file; attributes: step, round, ranks, config (TOML), versions, ... of its root.
    datasets: (type, shape) of each vector: (d,) is one for all ranks, (ranks, d) has a row for each.
    Raises: Damaged where the file is not whole, unchanged and of a known format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.seal = proved(self.path)
        self._files: list[tuple[Path, list[Slab]]] = [(self.path, self.seal.slabs)]
        for name, size, token in self.seal.shards:
            shard = self.path.parent / name
            if not shard.exists():
                raise Damaged(self.path, f"its shard {name} is missing")
            found = proved(shard)
            if identity(shard) != token or found.size != size:
                raise Damaged(self.path, f"its shard {name} belongs to another checkpoint")
            self._files.append((shard, found.slabs))
        h5py = hdf5.load()
        self._h5 = h5py.File(self.path, "r")
        self.attributes: dict[str, Any] = {k: _plain(v) for k, v in self._h5.attrs.items()}
        self.datasets: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._visit(h5py)

    def _visit(self, h5py: Any) -> None:
        vectors = {s.dataset for _, slabs in self._files for s in slabs}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and name in vectors:
                self.datasets[name] = (str(item.attrs.get("type", str(item.dtype))), item.shape)

        self._h5.visititems(visit)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._h5.close()

    # ---- what is in it ----
    @property
    def ranks(self) -> int:
        return int(self.attributes["ranks"])

    @property
    def step(self) -> int:
        return int(self.attributes["step"])

    @property
    def files(self) -> list[Path]:
        """The file, and its shards."""
        return [path for path, _ in self._files]

    def table(self, name: str) -> Any:
        """One of the small datasets: numbers as a numpy array, text as a list."""
        data = self._h5[name]
        return [t.decode() for t in data[()]] if data.dtype.kind == "O" else data[()]

    def text(self, rank: int) -> str:
        """A rank's tree as JSON."""
        return self._h5["state"][rank].decode()

    def tree(self, rank: int, instead: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """A rank's state, its tensors on the CPU; vectors in `instead` are taken from there."""
        cache: dict[str, Tensor] = dict(instead or {})

        def read(name: str) -> Tensor:
            if name not in cache:
                cache[name] = self.vector(name, rank)
            return cache[name]

        return unpack(self.text(rank), read)

    def vector(self, name: str, rank: int, here: slice = slice(None)) -> Tensor:
        """A rank's vector, or the part `here` of it, on the CPU."""
        kind, shape = self.datasets[name]
        data = self._h5[name]
        found = torch.from_numpy(data[rank, here] if len(shape) == 2 else data[here])
        return found if str(found.dtype) == f"torch.{kind}" else found.view(dtype_of(kind))

    # ---- is it what was written ----
    def slabs(self) -> Iterator[tuple[Path, Slab]]:
        """All pieces with checksums, and the files they lie in."""
        for path, slabs in self._files:
            for slab in slabs:
                yield path, slab

    def prove(self, part: int = 0, parts: int = 1) -> None:
        """Check the data of every `parts`-th slab against its checksum. Raises: Damaged, naming dataset and rank."""
        for path, slabs in self._files:
            for slab in damaged_slabs(path, slabs[part::parts]):
                raise Damaged(path, f"the data of {slab.dataset}, rank {slab.rank}, was changed since it was written")


def resolve(place: str | Path) -> list[Path]:
    """The checkpoint files of a run folder (or its checkpoints folder), newest first; a file is itself.

    Raises: UsageError where there is nothing.
    """
    place = Path(place)
    if place.is_file():
        return [place]
    if not place.exists():
        raise UsageError(f"There is no {place}.", "Give a run folder, or a checkpoint file.")
    folder = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    found = sorted(folder.glob("step-*.h5"), key=step_of, reverse=True)
    if not found:
        raise UsageError(f"{place} has no checkpoint.", "Set checkpoint.every, or give another run folder.")
    return found


def step_of(path: Path) -> int:
    """The step that a file's name tells; -1 where it tells none."""
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return value.item() if hasattr(value, "item") else value


def versions(checkpoint: Checkpoint) -> dict[str, str]:
    """What wrote it."""
    return dict(json.loads(checkpoint.attributes["versions"]))
