"""slowmo bench."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

from ..errors import DONE, FAULT_FOUND

ALGORITHMS = "auto,doubling,halving,ring,two-level,mpi,mpi-blocking"
BASES = "allreduce,local,dpsgd,sgp,osgp"
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@click.group()
def bench() -> None:
    """Measure what the ranks do with each other: messages, all-reduces, gossip, overlap, whole steps.

    Alone a benchmark starts its ranks with mpirun; under mpirun or srun it uses those there are. Variants
    alternate, and every result is checked: exit code 3 where one is wrong.

    \b
    Example:
      slowmo bench allreduce -n 4 --against gloo
      srun --mpi=pmix -n 8 slowmo bench step --rate 10gbit --json
    """


def _parsed(function: str, *more: Any) -> Callable[[Any, Any, Any], Any]:
    """A callback that gives what is typed to a function of bench/common.py."""

    def callback(_context: Any, _parameter: Any, text: str | None) -> Any:
        return getattr(import_module("slowmo_mpi.bench.common"), function)(text, *more)

    return callback


def _common(ranks: int, seconds: float) -> Decorator:
    """The options of every benchmark."""
    options = [
        click.option("-n", "--ranks", type=click.IntRange(1), default=ranks, show_default=True,
                     help="Ranks to start where no launcher did."),
        click.option("--rate", "rate_bit_s", metavar="RATE", callback=_parsed("parse_rate"),
                     help="The wire's, to compare with: 1gbit, 10gbit, or bits per second."),
        click.option("--repeat", type=click.IntRange(1), default=11, show_default=True,
                     help="Repetitions of everything, in turns."),
        click.option("--seconds", type=click.FloatRange(0), default=seconds, show_default=True,
                     help="After so long no new repetition, beyond three; of every line's size."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ]  # fmt: skip

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _sizes(default: str) -> Decorator:
    return click.option(
        "--sizes", default=default, show_default=True, metavar="BYTES,...", callback=_parsed("parse_sizes"),
        help="Of a vector; Ki, Mi and Gi are understood.",
    )  # fmt: skip


def _model(default: str, batch: int) -> Decorator:
    """What is trained."""
    options = [
        click.option("--model", type=click.Choice(["resnet18", "resnet50", "mlp"]), default=default, show_default=True),
        click.option("--parameters", type=click.IntRange(1), default=1_000_000, show_default=True, help="Of the mlp."),
        click.option("--batch", type=click.IntRange(2), default=batch, show_default=True, help="Samples a rank."),
        click.option("--image", type=click.IntRange(1), default=32, show_default=True, help="Pixels a side."),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@bench.command()
@_sizes("4,64,1Ki,16Ki,256Ki,1Mi,4Mi,16Mi,64Mi")
@_common(ranks=2, seconds=2)
def p2p(**options: Any) -> int:
    """Latency and bandwidth between rank 0 and rank 1, beside plain MPI.

    \b
    Example:
      slowmo bench p2p
      srun --mpi=pmix -N 2 -n 2 slowmo bench p2p --sizes 4,1Mi --rate 10gbit
    """
    return _measure("p2p", **options)


@bench.command()
@_sizes("4,1Ki,64Ki,1Mi,16Mi,100Mi")
@click.option("--algorithms", default=ALGORITHMS, show_default=True, metavar="NAME,...",
              callback=_parsed("parse_names", ALGORITHMS.split(","), "all-reduce"))  # fmt: skip
@click.option("--against", type=click.Choice(["gloo"]), help="Also torch.distributed, in the same processes.")
@_common(ranks=2, seconds=5)
def allreduce(**options: Any) -> int:
    """All-reduces of many sizes by every algorithm; mpi-blocking is the library's MPI_Allreduce.

    \b
    Example:
      slowmo bench allreduce -n 4 --against gloo
      srun --mpi=pmix -n 32 slowmo bench allreduce --sizes 64Ki,100Mi --algorithms auto,mpi --json
    """
    return _measure("allreduce", **options)


@bench.command()
@_sizes("4,1Ki,64Ki,1Mi,16Mi,100Mi")
@click.option("--graphs", default="exponential,ring,exponential-two-peer", show_default=True, metavar="GRAPH,...",
              callback=lambda _context, _parameter, text: tuple(text.split(",")),
              help="Families of `slowmo topology list`.")  # fmt: skip
@_common(ranks=2, seconds=5)
def gossip(**options: Any) -> int:
    """Gossip exchanges that are waited for, on several graphs.

    \b
    Example:
      slowmo bench gossip -n 4 --graphs exponential,ring
    """
    return _measure("gossip", **options)


@bench.command()
@_model("resnet18", batch=16)
@click.option("--graph", default="exponential", show_default=True, help="Of `slowmo topology list`.")
@click.option("--steps", type=click.IntRange(1), default=4, show_default=True, help="Of a repetition.")
@_common(ranks=2, seconds=60)
def overlap(**options: Any) -> int:
    """How much of a gossip exchange hides behind the gradient, by who polls, and what polling costs.

    \b
    Example:
      slowmo bench overlap -n 4 --model resnet18 --batch 8
    """
    return _measure("overlap", **options)


@bench.command()
@click.option("--lengths", default="64Ki,1Mi,16Mi", show_default=True, metavar="N,...",
              callback=_parsed("parse_sizes", 1), help="Numbers in the vector.")  # fmt: skip
@_common(ranks=1, seconds=5)
def outer(**options: Any) -> int:
    """The outer step's arithmetic beside a copy of as many bytes, on every rank's device.

    \b
    Example:
      slowmo bench outer --lengths 25Mi
    """
    return _measure("outer", **options)


@bench.command()
@_model("resnet18", batch=16)
@click.option("--bases", default=BASES, show_default=True, metavar="NAME,...",
              callback=_parsed("parse_names", BASES.split(","), "base"))  # fmt: skip
@click.option("--slowmo", type=click.IntRange(0), default=12, show_default=True, metavar="TAU",
              help="Every base also with SlowMo of this tau; 0: not.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=12, show_default=True,
              help="Of a repetition, made whole rounds of tau.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="What our messages are rounded to.")  # fmt: skip
@click.option("--against", type=click.Choice(["ddp"]), help="Also DistributedDataParallel over gloo.")
@_common(ranks=2, seconds=120)
def step(**options: Any) -> int:
    """Whole training steps by every base, with and without SlowMo, and where their time goes.

    \b
    Example:
      slowmo bench step -n 4 --bases allreduce,sgp --slowmo 12 --against ddp
    """
    return _measure("step", **options)


def _measure(name: str, ranks: int, rate_bit_s: float, repeat: int, seconds: float, as_json: bool, **own: Any) -> int:
    """Start the ranks, or be one: measure, print on rank 0; the exit code."""
    from ..comm.launcher import launched
    from ..launch import end_with_parent, run

    if launched() is None:
        return run(ranks, sys.argv[1:])  # where there is a launcher, -n says nothing

    end_with_parent()  # mpirun killed by SIGKILL would leave its ranks measuring
    from ..bench.common import Bench
    from ..comm import Communicator
    from ..train import set_threads

    comm = Communicator()
    measured = import_module(f"slowmo_mpi.bench.{name}").measure(
        Bench(comm, rate_bit_s, repeat, seconds, set_threads(0, comm)), **own
    )
    if comm.rank == 0:
        click.echo(measured.json() if as_json else measured.text())
    comm.barrier()
    return DONE if measured.ok else FAULT_FOUND
