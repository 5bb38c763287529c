"""Sentence pairs: plain text, encoded once, read through the page cache, in batches of about equal length.

A folder holds train.en and train.de, valid.en and valid.de, test.en and test.de: UTF-8, a sentence a line, line n
of one file the translation of line n of the other; and vocabulary.model, which `slowmo data vocab` writes.
What is encoded lies in its folder `encoded`, under a name made of the checksums of text and vocabulary, so that
neither can change unnoticed.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from slowmo_mpi.errors import SlowmoError

if TYPE_CHECKING:
    from slowmo_mpi.data.vocabulary import Vocabulary

SOURCE, TARGET = "en", "de"
ENCODED_TOGETHER = 20_000  # pairs in memory as text
LOCK_S = 3600.0  # for another process that encodes; 4.5 million pairs take minutes


class Scan(NamedTuple):
    """What one pass over a file's bytes tells."""

    lines: int
    checksum: str


def scan(file: Path) -> Scan:
    """Count and checksum a file's lines. Raises SlowmoError when it cannot be read or is empty."""
    checksum, count, last = xxhash.xxh3_128(), 0, b"\n"
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                checksum.update(block)
                count += block.count(b"\n")
                last = block[-1:]
    except OSError as error:
        raise SlowmoError(
            f"{file} cannot be read: {error.strerror}.",
            f"Set task.data to a folder with train.{SOURCE}, train.{TARGET}, valid.{SOURCE}, ...: a sentence a line.",
        ) from error
    count += last != b"\n"
    if not count:
        raise SlowmoError(f"{file} is empty.", "Put a sentence on each of its lines.")
    return Scan(count, checksum.hexdigest())


def count_lines(file: Path) -> int:
    """The number of its lines. Raises SlowmoError as `scan` does."""
    return scan(file).lines


def lines(file: Path) -> Iterator[str]:
    """The file's lines without their ends; a line ends at \\n and nowhere else. Raises SlowmoError if not UTF-8."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise SlowmoError(
                    f"{file}, line {number}, is not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}.",
                    f"Mend the line, or convert the file: iconv -f LATIN1 -t UTF-8 {file}",
                ) from None


class Pairs:
    """The encoded sentence pairs of one split, memory-mapped.

    `fingerprint` names text and vocabulary. Tokens come without begin and end of the sentence.
    """

    def __init__(self, tokens: npt.NDArray[np.integer], ends: npt.NDArray[np.int64], fingerprint: str):
        """tokens: source and target of the first pair, of the second, ...; ends: where each of those sentences ends,
        after a 0, int64 (2n + 1,)."""
        self._tokens, self._ends, self.fingerprint = tokens, ends, fingerprint

    def __len__(self) -> int:
        return (len(self._ends) - 1) // 2

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of source and target, int64 (n, 2)."""
        return np.diff(self._ends).reshape(-1, 2)

    def source(self, index: int) -> npt.NDArray[np.integer]:
        return self._tokens[self._ends[2 * index] : self._ends[2 * index + 1]]

    def target(self, index: int) -> npt.NDArray[np.integer]:
        return self._tokens[self._ends[2 * index + 1] : self._ends[2 * index + 2]]


def open_pairs(folder: Path, split: str, vocabulary: Vocabulary) -> Pairs:
    """The pairs of `split` in `folder`, encoded first where that has not been done; one process of a host does it.

    Raises SlowmoError when a file is missing, empty or not UTF-8, when there are not as many lines in one language
    as in the other, or when `folder`/encoded cannot be written or read.
    """
    files = [folder / f"{split}.{language}" for language in (SOURCE, TARGET)]
    scans = [scan(file) for file in files]
    if scans[0].lines != scans[1].lines:
        raise SlowmoError(
            f"{files[0]} has {scans[0].lines:,} lines and {files[1].name} {scans[1].lines:,}; line n of one must be "
            "the translation of line n of the other.",
            "Mend the files: a sentence that has no translation is an empty line.",
        )
    key = xxhash.xxh3_128_hexdigest("\n".join([*(s.checksum for s in scans), vocabulary.fingerprint]).encode())
    place = folder / "encoded" / f"{split}-{key}"
    try:
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            with _locked(place.parent / f".{split}.lock"):
                if not place.exists():
                    _encode(files, vocabulary, place)
        tokens, ends = (np.load(place / name, mmap_mode="r") for name in ("tokens.npy", "ends.npy"))
        if len(ends) != 2 * scans[0].lines + 1 or ends[-1] != len(tokens):
            raise ValueError("its two files do not belong together")
    except OSError as error:
        raise SlowmoError(
            f"The encoded text cannot be kept in {place.parent}: {error.strerror or error}.",
            "Copy the data to a folder that you may write to, with room for it.",
        ) from error
    except ValueError as error:
        raise SlowmoError(f"{place} is damaged: {error}.", f"Type: rm -r {place}") from error
    return Pairs(tokens, ends, key)


def _encode(files: list[Path], vocabulary: Vocabulary, place: Path) -> None:
    """Write tokens.npy and ends.npy; `place` is there once they are whole and on the disk."""
    kind = np.uint16 if len(vocabulary) <= 1 << 16 else np.int32
    parts, lengths = [], [np.zeros(1, np.int64)]
    source, target = (lines(file) for file in files)
    while texts := list(itertools.islice(source, ENCODED_TOGETHER)):
        sides = vocabulary.encode(texts), vocabulary.encode(list(itertools.islice(target, ENCODED_TOGETHER)))
        sentences = [sentence for pair in zip(*sides, strict=True) for sentence in pair]
        lengths.append(np.fromiter(map(len, sentences), np.int64, len(sentences)))
        parts.append(np.fromiter(itertools.chain.from_iterable(sentences), kind, int(lengths[-1].sum())))
    temporary = place.with_name(f".{place.name}.{os.getpid()}-{time.time_ns()}")
    temporary.mkdir()
    try:
        for name, array in (("tokens", np.concatenate(parts)), ("ends", np.cumsum(np.concatenate(lengths)))):
            with (temporary / f"{name}.npy").open("wb") as stream:
                np.save(stream, array)
                stream.flush()
                os.fsync(stream.fileno())
        try:
            temporary.rename(place)
        except OSError:
            if not place.exists():  # else another host has done the same meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of `file`, which ends with the process that holds it.

    Where the file system has no locks two processes may encode the same; each renames a whole folder into place.
    """
    with file.open("w") as stream:
        end = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise SlowmoError(
                        f"Another process has held {file} for {LOCK_S / 60:.0f} minutes.",
                        f"See who: fuser {file}",
                    ) from None
                time.sleep(0.05)
                continue
            except OSError:
                pass
            break
        yield


def compose(
    lengths: npt.NDArray[np.int64], max_tokens: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Put sentence pairs of about equal length together: (order, ends), batch i is order[ends[i]:ends[i + 1]].

    lengths: int64 (n, 2), of source and target. A batch's sentences times its longest sentence are at most
    `max_tokens` (a longer sentence is a batch of its own). Every pair is in one batch; `seed` says which of equal
    length come together, and the order of the batches.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed])))
    shuffled = generator.permutation(len(lengths))
    longest, shortest = lengths.max(axis=1), lengths.min(axis=1)
    order = shuffled[np.lexsort((shortest[shuffled], longest[shuffled]))]
    sorted_lengths = np.maximum(longest[order], 1)
    bounds = [0]
    while bounds[-1] < len(order):
        first = bounds[-1]
        window = sorted_lengths[first : first + max(1, max_tokens // int(sorted_lengths[first]))]
        fitting = np.count_nonzero(np.arange(1, len(window) + 1) * window <= max_tokens)
        bounds.append(first + max(1, int(fitting)))
    batches = generator.permutation(len(bounds) - 1)
    starts, sizes = np.asarray(bounds[:-1])[batches], np.diff(bounds)[batches]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    within = np.arange(len(order)) - np.repeat(ends[:-1], sizes)
    return order[np.repeat(starts, sizes) + within], ends
