"""Reading a checkpoint, whatever wrote it: proved first, then opened."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from . import hdf5
from .seal import PIECE_BYTES, Damaged, Slab, damaged_slabs, identity, proved
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
        self._slabs: dict[str, list[tuple[Path, Slab]]] = {}  # of each vector, by rank
        for path, slab in sorted(self.slabs(), key=lambda found: found[1].rank):
            self._slabs.setdefault(slab.dataset, []).append((path, slab))
        try:
            self._h5 = hdf5.load().File(self.path, "r")
            self.attributes: dict[str, Any] = {k: _plain(v) for k, v in self._h5.attrs.items()}
            if "ranks" not in self.attributes:
                raise Damaged(self.path, "it is one rank's shard, not the file that shows them all")
            self.datasets: dict[str, tuple[str, tuple[int, ...]]] = {
                name: (str(self._h5[name].attrs.get("type", str(self._h5[name].dtype))), self._h5[name].shape)
                for name in sorted(self._slabs)
            }
        except OSError as error:
            raise Damaged(self.path, f"HDF5 cannot open it ({' '.join(str(error).split())})") from None

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
        """A rank's vector, or the part `here` of it, on the CPU.

        Read from where the seals say that it lies, not through HDF5: a virtual dataset whose shard cannot be opened
        (too many open files, say) shows zeros, without a word. Raises: Damaged where reading fails.
        """
        kind, shape = self.datasets[name]
        dtype = dtype_of(kind)
        start, stop, _ = here.indices(shape[-1])
        found = torch.zeros(max(0, stop - start), dtype=dtype)  # a row shorter than others ends with zeros
        memory: Any = found.view(torch.uint8).numpy() if len(found) else b""
        memory = memoryview(memory)
        for path, slab in self._slabs[name]:
            if len(shape) == 1 or slab.rank == rank:
                position = slab.start - start * dtype.itemsize  # in `memory`, of the slab's next byte
                for offset, length in slab.extents:
                    skip = max(0, -position)
                    part = memory[position + skip : max(position + length, 0)] if length > skip else memory[:0]
                    read_into(path, part, offset + skip)
                    position += length
        return found

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


def read_into(path: Path, memory: memoryview, offset: int) -> None:
    """Fill `memory` from a file's bytes at `offset`. Raises: Damaged."""
    if not memory:
        return
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            while memory:
                count = os.preadv(fd, [memory[:PIECE_BYTES]], offset)
                if not count:
                    raise Damaged(path, "it is shorter than its own seal says")
                memory, offset = memory[count:], offset + count
        finally:
            os.close(fd)
    except OSError as error:
        raise Damaged(path, f"reading it failed ({error.strerror})") from None


def resolve(place: str | Path) -> list[Path]:
    """The checkpoint files of a run folder (or its checkpoints folder), newest first; a file is itself.

    Raises: UsageError where there is nothing.
    """
    place = Path(place)
    try:
        if place.is_file():
            return [place]
        if not place.exists():
            raise UsageError(f"There is no {place}.", "Give a run folder, or a checkpoint file.")
        folder = place / "checkpoints" if (place / "checkpoints").is_dir() else place
        found = sorted((p for p in folder.glob("step-*.h5") if step_of(p) >= 0), key=step_of, reverse=True)
    except OSError as error:
        raise UsageError(
            f"{place} cannot be read: {error.strerror}.", "Give a run folder, or a checkpoint file."
        ) from None
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
