"""Writing a checkpoint: all ranks together, one file, complete or not at all.

    1  every rank tells the checksums of its vectors; what is the same on all ranks will be written once, by all of
       them together, (d,); what differs, one row per rank, (ranks, d)
    2  rank 0 makes NAME.part with all its structure and small data, and has the disk reserve the whole of it
    3  every rank writes its slabs, collectively through MPI-IO, syncs, and reads them back; in the layout "shards" it
       does so with a file of its own
    4  rank 0 seals the file (seal.py), syncs, checks it as a reader would, renames it, syncs the folder

Whatever fails on any rank is an error on all of them, and leaves what was there before as it was.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..comm import Endpoint
from ..errors import SlowmoError
from . import hdf5
from .files import WRITE_BYTES, Beginning, Syncing, opened, sync, write_at
from .seal import Slab, block_bytes, checksum, damaged_slabs, identity, proved, seal
from .tree import Packed, dtype_of, to_stored

T = TypeVar("T")
BLOCK_BYTES = 4096
ALIGN_LIMIT_BYTES = 16 << 20
PART = ".part"  # behind the name of a file that is being written
SHARDS = ".shards-"  # see shards_of


@dataclass(frozen=True)
class Dataset:
    """One vector in the file. rows[r]: what rank r writes, of its vector `source[r]` at `target[r]` in its row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: list[slice]
    target: list[slice]

    def slab(self, rank: int) -> int:
        """Elements that `rank` writes."""
        return self.source[rank].stop - self.source[rank].start

    def first_byte(self, rank: int) -> int:
        """Where in the dataset (in its row) that begins."""
        return self.target[rank].start * dtype_of(self.dtype).itemsize


@dataclass(frozen=True)
class Told:
    """What a rank tells the others of a vector."""

    name: str
    dtype: str
    numel: int
    checksum: str
    share: tuple[int, int] | None
    total: int


def write(
    path: Path, packed: Packed, host: dict[str, Tensor], attributes: dict[str, Any], tables: dict[str, Any],
    comm: Endpoint, parallel: bool,
) -> None:  # fmt: skip
    """Write `path`, on all ranks together. Returns once it is on the disk, whole, under its name.

    packed.text: this rank's tree; host: its vectors, contiguous on the CPU, in types HDF5 knows.
    attributes: of the file's root, from rank 0; tables: rank 0's small datasets, numpy arrays or lists of text.
    Raises: SlowmoError, the same on all ranks.
    """
    vectors = packed.vectors
    told = [
        Told(n, str(v.dtype).removeprefix("torch."), v.numel, checksum(_memory(host[n])), _pair(v.share), v.total)
        for n, v in vectors.items()
    ]
    everybody = comm.gather((told, packed.text, packed.fault))
    for *_, fault in everybody:
        if fault is not None:
            raise SlowmoError(*fault)
    plan = datasets([t for t, *_ in everybody])
    texts = [text for _, text, _ in everybody]
    part = path.with_name(path.name + PART)
    needed = sum(d.slab(r) * dtype_of(d.dtype).itemsize for d in plan for r in range(comm.size))
    token, each = "", partial(together, comm, path=path)
    try:
        align, token = each(lambda: (_place(path.parent, needed), uuid.uuid4().hex[:8]), only=0)[0]
        if parallel:
            block = block_bytes(len(plan) * comm.size, max(len(d.name) for d in plan), align)
            make = lambda: _create(part, plan, texts, attributes, tables, block, align)  # noqa: E731
            extents = each(make, only=0)[0]
            each(lambda: _touch(part))
            slabs = each(lambda: _fill(part, plan, host, told, comm, extents, striped=align > BLOCK_BYTES))
            flat = [slab for mine in slabs for slab in mine]
            each(lambda: seal(part, block, flat, []), only=0)
        else:
            folder = path.with_name(shards_of(path) + token)
            each(folder.mkdir, only=0)
            mine = lambda: _shard(folder / f"rank-{comm.rank:05}.h5", plan, host, told, comm.rank, align)  # noqa: E731
            shards = each(mine)
            make_index = lambda: _index(part, plan, texts, attributes, tables, shards, folder)  # noqa: E731
            each(make_index, only=0)
        each(lambda: _commit(part, path), only=0)
    except SlowmoError:
        if comm.rank == 0:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
                shutil.rmtree(path.with_name(shards_of(path) + token), ignore_errors=True)
        raise


def datasets(everybody: list[list[Told]]) -> list[Dataset]:
    """Who writes what, from what every rank has told; the same on every rank."""
    ranks = len(everybody)
    named = [{t.name: t for t in told} for told in everybody]
    plan = []
    for name in sorted({t.name for told in everybody for t in told}):
        mine = [n.get(name) for n in named]
        first = next(t for t in mine if t is not None)
        if first.share is not None:
            here = [slice(*t.share) if t and t.share else slice(0, 0) for t in mine]
            source = [slice(0, h.stop - h.start) for h in here]
            plan.append(Dataset(name, first.dtype, (first.total,), source, here))
        elif all(t is not None and (t.numel, t.checksum, t.dtype) == (first.numel, first.checksum, first.dtype)
                 for t in mine):  # fmt: skip
            each = -(-first.numel // ranks)
            here = [slice(min(r * each, first.numel), min((r + 1) * each, first.numel)) for r in range(ranks)]
            plan.append(Dataset(name, first.dtype, (first.numel,), here, here))
        else:
            if any(t is not None and t.dtype != first.dtype for t in mine):
                raise SlowmoError(f"{name} has different types on different ranks.", "Build the same optimizer on all.")
            here = [slice(0, t.numel if t else 0) for t in mine]
            plan.append(Dataset(name, first.dtype, (ranks, max(h.stop for h in here)), here, here))
    return plan


def shards_of(path: Path) -> str:
    """The name of the folder of a file's shards, before a token: a.h5 has a.shards-..., and a.x has a.x.shards-..."""
    return (path.stem if path.suffix == ".h5" else path.name) + SHARDS


def remove(path: Path) -> None:
    """Delete a checkpoint, and its shards after it. Missing ones are no fault."""
    path.unlink(missing_ok=True)
    for folder in path.parent.glob(f"{glob.escape(shards_of(path))}*"):
        shutil.rmtree(folder, ignore_errors=True)


# ---- the file ----
def _create(
    path: Path, plan: list[Dataset], texts: list[str], attributes: dict[str, Any], tables: dict[str, Any],
    block: int, align: int,
) -> dict[str, list[tuple[int, int]]]:  # fmt: skip
    """Rank 0: the file with all but the slabs, and room for those on the disk. Where each row lies: (offset, bytes)."""
    h5py, beginning = hdf5.load(), Beginning()
    with _new_file(beginning, block, align) as file:
        _describe(h5py, file, texts, attributes, tables)
        extents = {d.name: _allocate(h5py, file, d.name, d.dtype, d.shape, align) for d in plan}
    beginning.store(path)
    return extents


def _new_file(beginning: Beginning, block: int, align: int) -> Any:
    h5py = hdf5.load()
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_alignment(align, align)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, beginning)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_userblock(block)
    return h5py.File(h5py.h5f.create(b"beginning", h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access))


def _describe(h5py: Any, file: Any, texts: list[str], attributes: dict[str, Any], tables: dict[str, Any]) -> None:
    for key, value in attributes.items():
        file.attrs[key] = value
    file.create_dataset("state", data=texts, dtype=h5py.string_dtype())
    file.create_dataset("w", data=[float(json.loads(text)["w"]) for text in texts])  # for readers without JSON
    for name, value in tables.items():
        text = isinstance(value, list)
        file.create_dataset(name, data=value, dtype=h5py.string_dtype() if text else None)


def _allocate(h5py: Any, file: Any, name: str, dtype: str, shape: tuple[int, ...], align: int) -> list[tuple[int, int]]:
    """Make a dataset whose place in the file is fixed now; the (offset, bytes) of its rows.

    Contiguous; where the file system has stripes, one chunk per row, since HDF5 aligns each chunk to them.
    """
    stored = to_stored(torch.empty(0, dtype=dtype_of(dtype))).numpy().dtype
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    row = shape[-1] * stored.itemsize
    chunked = len(shape) == 2 and shape[0] > 1 and BLOCK_BYTES < align <= row < 1 << 32
    if chunked:
        creation.set_chunk((1, shape[1]))
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    made = h5py.h5d.create(
        file.id, name.encode(), h5py.h5t.py_create(stored), h5py.h5s.create_simple(shape), creation, lcpl=links
    )
    if str(stored) != dtype:
        h5py.Dataset(made).attrs["type"] = dtype
    rows = shape[0] if len(shape) == 2 else 1
    if chunked:
        base = 0 if _chunks_count_the_block() else file.userblock_size
        return [(base + made.get_chunk_info_by_coord((r, 0)).byte_offset, row) for r in range(rows)]
    start = made.get_offset()
    return [(start + r * row, row) for r in range(rows)]


@cache
def _chunks_count_the_block() -> bool:
    """Whether this HDF5 tells where a chunk lies in the file (1.10 tells where it lies behind the user block)."""
    block = 1 << 20
    with _new_file(Beginning(), block, 1) as file:
        made = file.create_dataset("probe", (1,), chunks=(1,), data=[0])
        return bool(made.id.get_chunk_info(0).byte_offset >= block)


def _touch(path: Path) -> None:
    """Find out whether this rank can write to the end of the file: one that fails in MPI-IO hangs the others there."""
    with opened(path, os.O_RDWR) as fd:
        last = os.fstat(fd).st_size - 1
        os.pwrite(fd, os.pread(fd, 1, last), last)


def _fill(
    path: Path, plan: list[Dataset], host: dict[str, Tensor], told: list[Told], comm: Any,
    extents: dict[str, list[tuple[int, int]]], striped: bool,
) -> list[Slab]:  # fmt: skip
    """Every rank: write its slabs into the one file, all in the same order, and have them on the disk.

    striped: on a file system with stripes MPI-IO's collective buffering knows which rank writes to which. Elsewhere it
    would only pass everything through one rank's memory: a slab is one contiguous run already.
    """
    h5py = hdf5.load()
    transfer = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    transfer.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE if striped else h5py.h5fd.MPIO_INDEPENDENT)
    failure: Exception | None = None
    mine = [_slab(d, host, told, comm.rank, extents[d.name]) for d in plan if d.slab(comm.rank)]
    with Syncing(path) as syncing, h5py.File(path, "r+", driver="mpio", comm=comm.mpi) as file:
        for d in plan:
            width = max(1, WRITE_BYTES // max(1, dtype_of(d.dtype).itemsize))
            for piece in range(-(-max(map(d.slab, range(comm.size))) // width)):  # as many calls on every rank
                here = slice(piece * width, (piece + 1) * width)
                try:
                    _write(h5py, file, d, host.get(d.name), comm.rank, here, transfer)
                except Exception as error:  # go on: the others are in calls that need us
                    failure = failure or error
                syncing.begin()
        if failure is None:
            _read_back(path, mine)
    if failure is not None:
        raise failure
    return mine


def _write(h5py: Any, file: Any, d: Dataset, vector: Tensor | None, rank: int, piece: slice, transfer: Any) -> None:
    """Write `piece` of this rank's slab of d; a rank without one takes part in the call with nothing."""
    source, target = d.source[rank], d.target[rank]
    start, stop = (min(x, d.slab(rank)) for x in (piece.start, piece.stop))
    on_disk = h5py.h5s.create_simple(d.shape)
    if vector is None or stop <= start:
        in_memory = h5py.h5s.create_simple((1,))
        in_memory.select_none()
        on_disk.select_none()
        data = torch.zeros(1, dtype=to_stored(torch.empty(0, dtype=dtype_of(d.dtype))).dtype).numpy()
    else:
        data = vector[source.start + start : source.start + stop].numpy()
        in_memory = h5py.h5s.create_simple(data.shape)
        at, count = (target.start + start,), (stop - start,)
        on_disk.select_hyperslab((rank, *at) if len(d.shape) == 2 else at, (1, *count) if len(d.shape) == 2 else count)
    file[d.name].id.write(in_memory, on_disk, data, dxpl=transfer)


def _read_back(path: Path, slabs: list[Slab]) -> None:
    """Make sure that the file has the slabs as they were meant."""
    for slab in damaged_slabs(path, slabs):
        raise OSError(errno.EIO, f"{slab.dataset} of rank {slab.rank} was read back otherwise than written", str(path))


def _slab(d: Dataset, host: dict[str, Tensor], told: list[Told], rank: int, rows: list[tuple[int, int]]) -> Slab:
    source, size = d.source[rank], dtype_of(d.dtype).itemsize
    offset, _ = rows[rank if len(d.shape) == 2 else 0]
    whole = next(t for t in told if t.name == d.name)
    part = host[d.name][source]
    digest = whole.checksum if len(part) == whole.numel else checksum(_memory(part))
    return Slab(d.name, rank, d.first_byte(rank), [(offset + d.first_byte(rank), len(part) * size)], digest)


# ---- one file per rank ----
def _shard(
    path: Path, plan: list[Dataset], host: dict[str, Tensor], told: list[Told], rank: int, align: int
) -> tuple[str, int, str]:
    """This rank's slabs in a file of its own, whole and on the disk: (name, bytes, the checksum of its seal)."""
    h5py, beginning = hdf5.load(), Beginning()
    block = block_bytes(len(plan), max(len(d.name) for d in plan), align)
    mine = [d for d in plan if d.slab(rank)]
    alone = {
        d.name: Dataset(d.name, d.dtype, (d.slab(rank),), [d.source[rank]], [slice(0, d.slab(rank))]) for d in mine
    }
    with _new_file(beginning, block, align) as file:
        extents = {d.name: _allocate(h5py, file, d.name, d.dtype, (d.slab(rank),), align) for d in mine}
    beginning.store(path)
    slabs = [
        replace(_slab(alone[d.name], host, told, 0, extents[d.name]), rank=rank, start=d.first_byte(rank)) for d in mine
    ]
    with opened(path, os.O_RDWR) as fd, Syncing(path) as syncing:
        for d in mine:
            write_at(fd, _memory(host[d.name][d.source[rank]]), extents[d.name][0][0])
            syncing.begin()
        _read_back(path, slabs)
    token = seal(path, block, slabs, [])
    return f"{path.parent.name}/{path.name}", path.stat().st_size, token


def _index(
    path: Path, plan: list[Dataset], texts: list[str], attributes: dict[str, Any], tables: dict[str, Any],
    shards: list[tuple[str, int, str]], folder: Path,
) -> None:  # fmt: skip
    """Rank 0: the file that shows the shards as one, by virtual datasets."""
    h5py, beginning = hdf5.load(), Beginning()
    block = block_bytes(len(shards), len(json.dumps(shards[0][0])), BLOCK_BYTES)
    with _new_file(beginning, block, BLOCK_BYTES) as file:
        _describe(h5py, file, texts, attributes, tables)
        for d in plan:
            stored = to_stored(torch.empty(0, dtype=dtype_of(d.dtype))).numpy().dtype
            layout = h5py.VirtualLayout(d.shape, stored)
            for rank, (name, _, _) in enumerate(shards):
                if count := d.slab(rank):
                    target = d.target[rank]
                    here = (rank, target) if len(d.shape) == 2 else target
                    layout[here] = h5py.VirtualSource(name, d.name, shape=(count,), dtype=stored)
            made = file.create_virtual_dataset(d.name, layout)
            if str(stored) != d.dtype:
                made.attrs["type"] = d.dtype
    beginning.store(path)
    sync(folder)
    seal(path, block, [], shards)


# ---- together, and for good ----
def _commit(part: Path, path: Path) -> None:
    """Rank 0: the complete file gets its name, in one step that a crash cannot split."""
    proved(part)
    found = identity(part)
    old = set(path.parent.glob(f"{glob.escape(shards_of(path))}*"))
    os.replace(part, path)
    sync(path.parent)
    assert identity(path) == found
    for folder in old - {path.parent / Path(s[0]).parent for s in proved(path).shards}:
        shutil.rmtree(folder, ignore_errors=True)  # of a former file of this name


def together(
    comm: Endpoint, action: Callable[[], T], only: int | None = None, path: Path | None = None
) -> list[T]:  # fmt: skip
    """Run `action` on every rank (or on rank `only`); what each gave. An error on one is the same error on all.

    path: what is being written, for errors that name no file.
    """
    result: Any = None
    fault: tuple[str, str] | None = None
    if only is None or comm.rank == only:
        try:
            result = action()
        except SlowmoError as error:
            fault = (error.message, error.hint)
        except Exception as error:
            fault = _told_fault(error, path)
    everybody = comm.gather((fault, result))
    for fault, _ in everybody:
        if fault is not None:
            raise SlowmoError(*fault)
    return [r for _, r in everybody]


def _told_fault(error: Exception, path: Path | None) -> tuple[str, str]:
    hint = "Checkpoints written before are as they were; mend this, then `slowmo train CONFIG --resume RUN`."
    where = (error.filename if isinstance(error, OSError) else None) or path
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    name = f" {os.fsdecode(where)}" if where else ""
    return f"The checkpoint{name} cannot be written: {reason or type(error).__name__}.", hint


def _place(folder: Path, needed: int) -> int:
    """Make sure of folder and space; the file system's stripe or block: 4 KiB on local disks, MiBs on Lustre."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} are free", str(folder))
    return min(max(BLOCK_BYTES, os.stat(folder).st_blksize), ALIGN_LIMIT_BYTES)


def _memory(t: Tensor) -> Any:
    return t.view(torch.uint8).numpy() if t.numel() else b""


def _pair(share: slice | None) -> tuple[int, int] | None:
    return None if share is None else (share.start, share.stop)


def leftovers(folder: Path) -> Iterator[Path]:
    """What a writer of step-*.h5 that was killed left behind: unfinished files, and shards that no file speaks of."""
    yield from folder.glob(f"step-*.h5{PART}")
    for shards in folder.glob(f"step-*{SHARDS}*"):
        index = folder / f"{shards.name.partition(SHARDS)[0]}.h5"
        if not index.exists():
            yield shards
