"""A joint subword vocabulary of two languages: byte-pair encoding, learned and applied by sentencepiece."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from slowmo_mpi.data.text import count_lines, lines
from slowmo_mpi.errors import SlowmoError, UsageError

PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3
"""The entries that are no text: padding, anything not in the vocabulary, a sentence's begin and its end."""

LEARNED_FROM = 8_000_000
"""Lines that a vocabulary is learned from at most; of more, every second, third, ... is taken."""

LONGEST = 2**30
"""Bytes of a line; sentencepiece would pass over those of more than 4192 without a word."""


class Vocabulary:
    """What turns text into tokens and back.

    `fingerprint` is a checksum of the file's bytes. Raises SlowmoError when the file is missing, or is not one
    that `learn` wrote.
    """

    def __init__(self, file: Path):
        try:
            model = file.read_bytes()
        except FileNotFoundError:
            raise SlowmoError(f"There is no vocabulary {file}.", f"Type: slowmo data vocab {file.parent}") from None
        except OSError as error:
            raise SlowmoError(f"{file} cannot be read: {error.strerror}.", "Mend that first.") from None
        self.file, self.fingerprint = file, xxhash.xxh3_128_hexdigest(model)
        hint = f"Delete it, and type: slowmo data vocab {file.parent}"
        pieces = _sentencepiece().SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise SlowmoError(f"{file} is not a sentencepiece model.", hint) from error
        self._pieces = pieces
        special = [self._pieces.pad_id(), self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id()]
        if special != [PAD, UNKNOWN, BEGIN, END]:
            raise SlowmoError(
                f"{file} numbers padding, unknown, begin and end {special}, where "
                f"{[PAD, UNKNOWN, BEGIN, END]} was expected.",
                hint,
            )

    def __len__(self) -> int:
        return len(self._pieces)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without begin and end; none for a text of spaces. Uses this process's cores."""
        threads = len(os.sched_getaffinity(0))
        return self._pieces.encode(list(texts), num_threads=threads)

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of tokens."""
        return self._pieces.decode([list(row) for row in tokens], num_threads=1)


def learn(files: Sequence[Path], size: int, out: Path) -> int:
    """Learn one vocabulary of `size` entries from the lines of all `files`, and write it to `out`; the lines used.

    The same lines give the same bytes. Text is taken as it is, without Unicode normalisation, so that what is
    decoded can be held against the references. Raises UsageError when the text does not give so many entries,
    SlowmoError when a file cannot be read or is not UTF-8.
    """
    counts = [count_lines(file) for file in files]
    every = -(-sum(counts) // LEARNED_FROM)
    model = io.BytesIO()
    faults: list[SlowmoError] = []  # sentencepiece would wrap it in words of its own

    def chosen() -> Iterator[str]:
        try:
            for file in files:
                yield from islice(lines(file), 0, None, every)
        except SlowmoError as error:
            faults.append(error)
            raise

    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=chosen(), model_writer=model, model_type="bpe", vocab_size=size,
            character_coverage=0.9999, normalization_rule_name="identity",
            pad_id=PAD, unk_id=UNKNOWN, bos_id=BEGIN, eos_id=END, max_sentence_length=LONGEST, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        if faults:
            raise faults[0] from None
        reason = str(error).rpartition("] ")[2].strip()
        if not reason:  # nothing behind the condition that failed: that there are sentences, that they have letters
            names = " and ".join(map(str, files))
            raise UsageError(f"There is no text in {names}.", "Put a sentence on each line.") from None
        raise UsageError(
            f"No vocabulary of {size:,} entries can be learned from {sum(counts):,} lines: {reason}",
            "Give another --size, or more text.",
        ) from None
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.write_bytes(model.getvalue())
        temporary.replace(out)
    except OSError as error:
        raise SlowmoError(f"{out} cannot be written: {error}.", "Choose a folder that you may write to.") from error
    return sum(-(-count // every) for count in counts)


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise SlowmoError(
            f"Translation needs the package sentencepiece, and Python cannot import it: {error}.",
            "Type: pip install 'slowmo-mpi[translation]'",
        ) from error
    return sentencepiece
