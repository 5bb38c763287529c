"""slowmo data vocab."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", type=click.IntRange(5), default=32768, show_default=True, help="Entries of the vocabulary.")
def vocab(folder: Path, size: int) -> None:
    """Learn the joint vocabulary of train.en and train.de, byte-pair encoding, for the task wmt16.

    Writes vocabulary.model into FOLDER, which sentencepiece reads. The same text gives the same bytes.

    \b
    Example:
      slowmo data vocab data/wmt16
      slowmo data vocab data/catalogs --size 8000
    """
    from ..data.text import SOURCE, TARGET
    from ..data.vocabulary import learn

    out = folder / "vocabulary.model"
    if out.exists():
        raise UsageError(f"There is a vocabulary {out} already.", f"To learn another, type: rm {out}")
    lines = learn([folder / f"train.{language}" for language in (SOURCE, TARGET)], size, out)
    click.echo(f"{out}: {size:,} entries, learned from {lines:,} lines")
