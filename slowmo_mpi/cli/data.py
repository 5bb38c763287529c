"""slowmo data: make data ready for training."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..units import size
from .data_vocab import vocab
from .say import note

PACK_TIMEOUT_S = 86_400.0  # ranks end their shares of a slow file system hours apart


@click.group()
def data() -> None:
    """Make data ready for training: pack images into one file, learn a vocabulary.

    \b
    Example:
      slowmo data pack data/imagenet data/imagenet.h5 -n 8
      slowmo data vocab data/wmt16
    """


data.add_command(vocab)


@data.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-n", "--ranks", type=click.IntRange(1), default=1, help="Ranks to start where no launcher did.")
def pack(folder: Path, file: Path, ranks: int) -> int:
    """Pack FOLDER/train/CLASS/*.JPEG and FOLDER/val/CLASS/*.JPEG into FILE.

    FILE is HDF5, and task.data of the task imagenet takes it in place of the folder: a parallel file system is quick
    with one large file and slow with a million small ones. Images are copied as they are, by all ranks together, and
    read back at the end. Those that do not decode are named and left out; more than one in a hundred is an error.
    What was begun and killed goes on when the same is typed again.

    \b
    Example:
      slowmo data pack data/imagenet data/imagenet.h5 -n 8
      srun --mpi=pmix -n 64 slowmo data pack /datasets/imagenet $SCRATCH/imagenet.h5
    """
    from ..comm.launcher import launched
    from ..launch import end_with_parent, run

    if launched() is None and ranks > 1:
        return run(ranks, sys.argv[1:])
    from ..comm import Communicator, simulate
    from ..data import pack as packing

    if launched() is None:
        done = simulate(1, lambda comm: packing.pack(folder, file, comm, note))[0]
    else:
        end_with_parent()  # mpirun killed by SIGKILL would leave its ranks packing
        comm = Communicator(timeout=PACK_TIMEOUT_S)
        done = packing.pack(folder, file, comm, note)
        if comm.rank > 0:
            return 0
    images = " + ".join(f"{count:,} {split}" for split, count in done.images.items())
    broken = f", {done.broken} broken left out" if done.broken else ""
    click.echo(f"{file}: {images} images of {done.classes} classes, {size(done.bytes)}{broken}")
    rates = [(done.copied_bytes, done.copy_s, "copied"), (done.bytes, done.verify_s, "read back")]
    note("; ".join(f"{verb} {size(n)} in {s:.1f} s, {size(n / max(s, 1e-9))}/s" for n, s, verb in rates))
    return 0
