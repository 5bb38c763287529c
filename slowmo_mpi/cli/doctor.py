"""slowmo doctor."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..comm.placement import count, fold
from ..errors import DONE, FAULT_FOUND, SlowmoError
from .say import ERASE_LINE, note, say

if TYPE_CHECKING:
    from ..comm.launcher import Watchdog
    from ..doctor.checks import Check, Finding

WAIT_S = 60.0  # of one rank for another
CHECK_S = 240.0  # of a check; then the job is ended
LAST_S = 15.0  # for rank 0 to end the job, where another rank is not reached


@click.command()
@click.option(
    "-n", "--ranks", type=click.IntRange(1), default=2, show_default=True,
    help="Ranks to start where no launcher did.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(ranks: int, as_json: bool) -> int:
    """Check this machine: MPI, launcher, every host and rank, the network between them, GPUs, disks, HDF5.

    Alone it starts two ranks with mpirun; under mpirun or srun it examines the ranks there are: whether all
    pairs of hosts reach each other, versions that differ, where each rank runs, hosts whose link is slow,
    clocks, limits, scratch space, and a collective write. No check waits for ever. Exit code 3 when one finds a fault.

    \b
    Example:
      slowmo doctor
      srun --mpi=pmix -n 8 slowmo doctor
      mpirun -n 8 slowmo doctor --json
    """
    from ..comm.launcher import launched

    if launched() is not None:
        return _examine(as_json)
    from ..launch import find_mpirun, mpirun_version, run

    try:
        mpirun = find_mpirun()
        os.environ["SLOWMO_LAUNCHER"] = f"{mpirun_version(mpirun)} ({mpirun})"
    except SlowmoError as error:
        say(error)
        return FAULT_FOUND
    return run(ranks, ["doctor", *(["--json"] if as_json else [])])


def _examine(as_json: bool) -> int:
    """One rank's part of it."""
    from ..comm.launcher import Watchdog, check_world, launched, load_mpi

    claim = launched()
    with Watchdog() as watchdog:  # before MPI starts
        world = load_mpi().COMM_WORLD

        from ..comm import Communicator
        from ..comm.mpi import library_version
        from ..doctor.checks import FAULT, Check, Finding, together
        from ..doctor.reach import reach

        check_world(claim, world.Get_size(), library_version())
        report = _Report(world.Get_rank(), as_json, watchdog)
        if started := os.environ.get("SLOWMO_LAUNCHER"):
            report.add(Check("launcher", Finding("ok", started)))
        report.begins("reach")
        host = (claim and claim.node) or socket.gethostname()
        finding = reach(world, host, report.waits_for)
        report.waits_for([])
        if finding is not None:
            report.add(Check("reach", finding))
        if finding is None or finding.result == FAULT:  # whatever comes next would hang
            if world.Get_rank() > 0:
                time.sleep(LAST_S)
            report.end()
            world.Abort(FAULT_FOUND)
        comm = Communicator(timeout=WAIT_S)
        try:
            for name, check in _checks():
                report.begins(name)
                report.add(together(comm, name, check))
            comm.barrier()
        except SlowmoError as error:
            say(SlowmoError(f"The check of {report.name} ended: {error.message}", error.hint))
            report.end()
            comm.abort(FAULT_FOUND)
        return report.end(whole=True)


def _checks() -> list[tuple[str, Callable[[Any], Finding]]]:
    from ..doctor import hosts, links, messages, ranks, storage

    return [
        ("versions", hosts.versions), ("ranks", ranks.ranks), ("sums", messages.sums),
        ("CUDA-aware MPI", messages.cuda_aware), ("links", links.links), ("clocks", hosts.clocks),
        ("limits", hosts.limits), ("scratch", storage.scratch), ("this folder", storage.folder),
        ("parallel HDF5", storage.hdf5),
    ]  # fmt: skip


class _Report:
    """What is shown while it goes on and at the end, by rank 0; and the end of a check that does not end."""

    def __init__(self, rank: int, as_json: bool, watchdog: Watchdog):
        self.rank, self.as_json, self.watchdog = rank, as_json, watchdog
        self.name, self.who = "", f"Rank {rank} on {socket.gethostname()}"
        self.checks: list[Check] = []
        self._terminal = rank == 0 and ("SLOWMO_TERMINAL" in os.environ or sys.stderr.isatty())

    def begins(self, name: str) -> None:
        """The next check."""
        self.name = name
        self._watch()
        if self._terminal:
            click.echo(f"{ERASE_LINE}checking {name}", nl=False, err=True, color=True)

    def waits_for(self, hosts: list[str]) -> None:
        """Whose messages are missing: MPI may end a rank that cannot connect, with words of its own."""
        missing = f"{fold(hosts[:8])}{', ...' if len(hosts) > 8 else ''}"
        self._watch(f"slowmo: {self.who} was ended while it waited for a message from {missing}.\n" if hosts else "")

    def _watch(self, last_words: str = "") -> None:
        told = f"slowmo: {self.who} did not come to an end of the check of {self.name}: the job is ended.\n"
        self.watchdog.watch((CHECK_S + 5.0 * (self.rank > 0), told, True), last_words=last_words)

    def add(self, check: Check) -> None:
        """What it found."""
        self.checks.append(check)
        if self.rank == 0 and not self.as_json:
            self._erase()
            click.echo(f"{check.finding.result:<8} {check.name:<15} {check.finding.found}")
            for line in check.finding.more:
                click.echo(f"{'':<24} {line}")
            sys.stdout.flush()

    def end(self, whole: bool = False) -> int:
        """The verdict; the exit code. whole: all checks were made."""
        self.watchdog.watch()
        results = [check.finding.result for check in self.checks]
        faults, warnings = results.count("fault"), results.count("warning")
        ready = whole and not faults
        if self.rank == 0 and self.as_json:
            report = {"ready": ready, "checks": [check.as_dict() for check in self.checks]}
            click.echo(json.dumps(report, indent=2))
        elif self.rank == 0:
            self._erase()
            note(f"{'ready' if ready else 'not ready'}: {count(faults, 'fault')}, {count(warnings, 'warning')}")
        sys.stdout.flush()
        return DONE if ready else FAULT_FOUND

    def _erase(self) -> None:
        if self._terminal:
            click.echo(ERASE_LINE, nl=False, err=True, color=True)
