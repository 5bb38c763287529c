"""slowmo doctor."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click

from ..errors import FAULT_FOUND

if TYPE_CHECKING:
    from ..doctor import Check


@click.command()
@click.option(
    "-n", "--ranks", type=click.IntRange(1), default=2, show_default=True,
    help="Ranks to start where no launcher did.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(ranks: int, as_json: bool) -> int:
    """Check this machine: MPI, launcher, ranks really joined, messages, GPUs, parallel HDF5, disk.

    Alone it starts two ranks with mpirun; under mpirun or srun it examines the ranks there are. Exit
    code 3 when a check finds a fault.

    \b
    Example:
      slowmo doctor
      srun --mpi=pmix -n 8 slowmo doctor
    """
    from ..comm.launcher import launched
    from ..doctor import FAULT, WARNING, Check, examine, without_ranks

    if launched() is None:
        from ..launch import run

        checks = without_ranks()
        if not as_json:
            _print(checks)
        if checks[0].result == FAULT:
            if as_json:
                click.echo(json.dumps([c.as_dict() for c in checks]))
            return FAULT_FOUND
        os.environ["SLOWMO_LAUNCHER"] = json.dumps([c.as_dict() for c in checks])
        return run(ranks, ["doctor", *(["--json"] if as_json else [])])

    from ..comm import Communicator

    comm = Communicator(timeout=60.0)
    examined = examine(comm)
    if comm.rank == 0:
        if as_json:
            before = [Check(**c) for c in json.loads(os.environ.get("SLOWMO_LAUNCHER", "[]"))]
            click.echo(json.dumps([c.as_dict() for c in before + examined], indent=2))
        else:
            _print(examined)
            faults = sum(c.result == FAULT for c in examined)
            warnings = sum(c.result == WARNING for c in examined)
            click.echo(f"{'ready' if not faults else 'not ready'}: {faults} faults, {warnings} warnings", err=True)
    comm.barrier()
    return FAULT_FOUND if any(c.result == FAULT for c in examined) else 0


def _print(checks: list[Check]) -> None:
    for c in checks:
        click.echo(f"{c.result:<8} {c.name:<16} {c.found}")
