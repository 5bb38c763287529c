"""The seal: text at the head of a checkpoint from which every byte of the file can be proved, before HDF5 sees it.

It lies in HDF5's user block, which HDF5 skips:

    slowmo-mpi checkpoint FORMAT LENGTH CHECKSUM\\n      64 characters; LENGTH and CHECKSUM are those of the JSON
    {"size": ..., "block": ..., "slabs": [[dataset, rank, start, [[offset, length], ...], checksum], ...],
     "rest": ..., "shards": [[file, size, checksum of its JSON], ...]}\\n
    zeros to the end of the block

`slabs` are the large pieces that ranks wrote; `rest` is the checksum of all other bytes behind the block (HDF5's own
structures, attributes, small data, padding). So one changed bit anywhere is noticed, and which piece it hit is known.
Checksums are XXH3 (128 bits; https://xxhash.com), in hexadecimal. Offsets and lengths are in bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ..errors import SlowmoError

FORMAT = 2
MAGIC = b"slowmo-mpi checkpoint "
FIRST_LINE_BYTES = 80
PIECE_BYTES = 8 << 20


class Damaged(SlowmoError):
    """A file is not a complete, unchanged checkpoint of a format that is known here."""

    def __init__(self, path: Path, fault: str):
        super().__init__(f"{path} is not usable: {fault}.", "Give another; `slowmo checkpoint verify` proves one.")
        self.path, self.fault = path, fault


@dataclass(frozen=True)
class Slab:
    """What one rank wrote of one dataset: the (offset, length) of its bytes in the file, and their checksum.

    start: which byte of the dataset (of the rank's row, where it has rows) is the first of them.
    """

    dataset: str
    rank: int
    start: int
    extents: list[tuple[int, int]]
    checksum: str


@dataclass(frozen=True)
class Seal:
    """What the block says: see above. `size` is the file's length in bytes."""

    size: int
    block: int
    rest: str
    slabs: list[Slab] = field(default_factory=list)
    shards: list[tuple[str, int, str]] = field(default_factory=list)

    def text(self) -> bytes:
        """The block's beginning, first line included."""
        slabs = [[s.dataset, s.rank, s.start, s.extents, s.checksum] for s in self.slabs]
        body = json.dumps(asdict(self) | {"slabs": slabs}).encode() + b"\n"
        first = b"%s%d %d %s" % (MAGIC, FORMAT, len(body), checksum(body).encode())
        return first.ljust(FIRST_LINE_BYTES - 1) + b"\n" + body


def block_bytes(pieces: int, name_bytes: int, align: int) -> int:
    """A user block that holds the seal of so many slabs or shards: a power of two, and no less than `align`."""
    room = max(512, align, FIRST_LINE_BYTES + 400 + pieces * (160 + name_bytes))
    return 1 << (room - 1).bit_length()


def checksum(data: Any) -> str:
    """XXH3-128 of anything with a buffer, in hexadecimal."""
    return str(xxhash.xxh3_128(data).hexdigest())


def checksum_of(file: int, extents: Iterable[tuple[int, int]]) -> str:
    """The same of pieces of an open file (a descriptor), in order. Raises: EOFError where it is too short."""
    digest = xxhash.xxh3_128()
    for offset, length in extents:
        end = offset + length
        while offset < end:
            data = os.pread(file, min(PIECE_BYTES, end - offset), offset)
            if not data:
                raise EOFError
            digest.update(data)
            offset += len(data)
    return str(digest.hexdigest())


def rest_of(total: int, block: int, slabs: Iterable[Slab]) -> Iterator[tuple[int, int]]:
    """Everything behind the block that is in no slab, as (offset, length), in order."""
    position = block
    for offset, length in sorted((o, n) for s in slabs for o, n in s.extents):
        if offset > position:
            yield position, offset - position
        position = max(position, offset + length)
    if total > position:
        yield position, total - position


def seal(path: Path, block: int, slabs: list[Slab], shards: list[tuple[str, int, str]]) -> str:
    """Write the seal of a file whose slabs are all written, and put it on the disk; the checksum of its JSON."""
    fd = os.open(path, os.O_RDWR)
    try:
        total = os.fstat(fd).st_size
        text = Seal(total, block, checksum_of(fd, rest_of(total, block, slabs)), slabs, shards).text()
        assert len(text) <= block
        os.pwrite(fd, text, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    return checksum(text[FIRST_LINE_BYTES:])


def proved(path: Path) -> Seal:
    """The seal of a file whose structure is proved: size, format, and all bytes that are in no slab.

    Raises: Damaged, with the fault. Only then may HDF5 open the file: its library can crash on damaged structures.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise Damaged(path, error.strerror or "it cannot be opened") from None
    try:
        found, block = _parse(path, fd)
        if checksum_of(fd, rest_of(found.size, found.block, found.slabs)) != found.rest:
            raise Damaged(path, "its structure (HDF5's own, or the attributes) was changed since it was written")
        if block.strip(b"\0"):
            raise Damaged(path, "bytes behind its seal were changed since it was written")
        return found
    except EOFError:
        raise Damaged(path, "it is shorter than its own seal says") from None
    except OSError as error:
        raise Damaged(path, f"reading it failed ({error.strerror})") from None
    finally:
        os.close(fd)


def _parse(path: Path, fd: int) -> tuple[Seal, bytes]:
    size = os.fstat(fd).st_size
    first = os.pread(fd, FIRST_LINE_BYTES, 0)
    words = first[len(MAGIC) :].split()
    if not first:
        raise Damaged(path, "it is empty")
    if not first.startswith(MAGIC):
        kind = "an HDF5 file of something else" if first.startswith(b"\x89HDF\r\n\x1a\n") else "no checkpoint"
        raise Damaged(path, f"it is {kind}, or its first bytes were changed")
    if len(words) != 3 or not words[0].isdigit() or not words[1].isdigit() or first[-1:] != b"\n":
        raise Damaged(path, "its first line was cut off or changed")
    if int(words[0]) != FORMAT:
        raise Damaged(path, f"it has format {int(words[0])}, and this version of slowmo-mpi reads format {FORMAT}")
    body = os.pread(fd, min(int(words[1]), size), FIRST_LINE_BYTES)
    told = b"%s%d %d %s" % (MAGIC, FORMAT, len(body), checksum(body).encode())
    if first != told.ljust(FIRST_LINE_BYTES - 1) + b"\n":
        raise Damaged(path, "its seal was cut off or changed")
    raw = json.loads(body)
    raw["slabs"] = [Slab(n, r, s, [(o, b) for o, b in extents], c) for n, r, s, extents, c in raw["slabs"]]
    raw["shards"] = [(name, n, c) for name, n, c in raw["shards"]]
    found = Seal(**raw)
    if size != found.size:
        raise Damaged(path, f"it has {size:,} bytes, and was written with {found.size:,}")
    behind = FIRST_LINE_BYTES + len(body)
    return found, os.pread(fd, found.block - behind, behind)


def identity(path: Path) -> str:
    """The checksum of a file's seal, as its first line tells it."""
    with path.open("rb") as file:
        return file.read(FIRST_LINE_BYTES).split()[-1].decode()


def damaged_slabs(path: Path, slabs: Iterable[Slab]) -> Iterator[Slab]:
    """Those slabs of a proved file whose bytes are not what was written."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise Damaged(path, error.strerror or "it cannot be opened") from None
    try:
        for slab in slabs:
            try:
                good = checksum_of(fd, slab.extents) == slab.checksum
            except (EOFError, OSError):
                good = False
            if not good:
                yield slab
    finally:
        os.close(fd)
