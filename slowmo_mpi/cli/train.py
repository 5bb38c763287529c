"""slowmo train."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import sysconfig
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DONE, INTERRUPTED, SlowmoError, UsageError
from .progress import Progress
from .say import config_argument, note, say

if TYPE_CHECKING:
    from ..comm import Endpoint
    from ..config import Config

SPEAKING_S = 5.0  # what the rank that speaks is given before the others end the job
TOLD_CHARACTERS = 400  # of an exception's text; some of torch's go on for pages


@click.command()
@config_argument
@click.option("-n", "--ranks", type=click.IntRange(1), help="Start so many ranks with mpirun on this machine.")
@click.option("--simulate", type=click.IntRange(1), metavar="N", help="N ranks in this one process, without MPI.")
@click.option("--json", "as_json", is_flag=True, help="Print the last evaluation as JSON on stdout.")
def train(config: str, overrides: tuple[str, ...], ranks: int | None, simulate: int | None, as_json: bool) -> int:
    """Train what CONFIG describes, and leave a run folder.

    Under mpirun or srun each rank runs this command; alone it is one rank; with -n it starts mpirun itself.
    The run folder holds manifest.json, config.toml, metrics.jsonl and model.pt (the averaged model's
    state_dict).

    \b
    Example:
      slowmo train my.toml -n 4
      mpirun -n 4 slowmo train my.toml --set slowmo.tau=12
      srun --mpi=pmix -n 32 slowmo train my.toml
      slowmo train my.toml --simulate 8
    """
    from .. import config as configuration
    from ..comm.launcher import launched

    if ranks and simulate:
        raise UsageError("-n and --simulate exclude each other.", "Type one of them.")
    claim = launched()
    if claim is not None and claim.size > 1 and (ranks or simulate):
        raise UsageError(
            f"{claim.launcher} has started {claim.size} of this command already; -n and --simulate would "
            "multiply them.",
            "Leave out -n, or leave out mpirun.",
        )
    # What can be known to be wrong is refused before MPI starts, where one process can speak for all.
    settings = configuration.load(config, overrides)
    from ..topology import for_algorithm

    size = ranks or simulate or (claim.size if claim else 1)
    for_algorithm(settings.base.algorithm, settings.base.topology, size)
    if ranks:
        from ..launch import run

        flags = [f"--set={o}" for o in overrides] + (["--json"] if as_json else [])
        return run(ranks, ["train", *flags, "--", config])

    from .. import tasks

    tasks.check_options(settings.task.name, settings.task.options)
    return _simulated(settings, simulate, as_json) if simulate else _rank(settings, as_json)


def _simulated(settings: Config, ranks: int, as_json: bool) -> int:
    from ..comm import simulate
    from ..runlog import make_folder
    from ..train import train

    folder = make_folder(settings)

    def program(comm: Endpoint) -> dict[str, Any]:
        return train(settings, comm, folder, Progress() if comm.rank == 0 else None)

    try:
        last = simulate(ranks, program)[0]
    except BaseException as error:
        code = _failed(error, getattr(error, "rank", 0), ranks, folder)
        if code == INTERRUPTED:
            os._exit(code)  # a rank's thread may still be inside torch, and Python would abort on the way out
        return code
    _finish(folder, last, as_json)
    return DONE


def _rank(settings: Config, as_json: bool) -> int:
    """One rank's run. An exception here ends the whole job, told once, by the first rank that fails.

    MPI_Abort hands the exit code to the launcher: Open MPI's mpirun and MPICH's end with it.
    """
    from ..comm import Communicator
    from ..comm.launcher import launched
    from ..launch import end_with_parent
    from ..runlog import make_folder
    from ..train import train

    if launched() is not None:
        end_with_parent()  # mpirun killed by SIGKILL would leave its ranks training
    comm = Communicator(timeout=settings.comm.timeout)
    folder: Path | None = None
    try:
        folder = Path(comm.gather(str(make_folder(settings)) if comm.rank == 0 else "")[0])
        last = train(settings, comm, folder, Progress() if comm.rank == 0 else None)
        if comm.rank == 0:
            _finish(folder, last, as_json)
    except BaseException as error:
        code = _failed(error, comm.rank, comm.size, folder)
        if comm.size > 1:
            comm.abort(code)  # the others would wait for this rank
        return code
    return DONE


def _failed(error: BaseException, rank: int, ranks: int, folder: Path | None) -> int:
    """Tell what went wrong, unless another rank is telling it; the exit code to end with."""
    from ..runlog import claim_error

    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    told = error if isinstance(error, SlowmoError) else _told(error, rank, ranks, folder)
    if claim_error(folder, "".join(traceback.format_exception(error))):
        with contextlib.suppress(OSError):  # stderr may be closed, and the job must end all the same
            say(told)
            sys.stderr.flush()
    else:
        time.sleep(SPEAKING_S)
    return told.exit_code


def _told(error: BaseException, rank: int, ranks: int, folder: Path | None) -> SlowmoError:
    """Any other exception in one line: rank, what, and the line of the user's own code that led to it."""
    what = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    frames = traceback.extract_tb(error.__traceback__)
    ours = (str(Path(__file__).parents[1]), sysconfig.get_path("stdlib"), "site-packages", "<frozen")
    theirs = [f for f in frames if not any(place in f.filename for place in ours)]
    where = "".join(f" ({f.filename}, line {f.lineno}, in {f.name})" for f in (theirs or frames)[-1:])
    who = f"Rank {rank} of {ranks}" if ranks > 1 else "The run"
    return SlowmoError(
        f"{who} failed: {what[:TOLD_CHARACTERS]}{where}.",
        f"The traceback is in {folder / 'error.txt'}." if folder else "",
    )


def _finish(folder: Path, last: dict[str, Any], as_json: bool) -> None:
    metrics = ", ".join(
        f"{k} {v:.4g}" for k, v in last.items() if k not in ("kind", "step", "epoch", "time_s", "consensus")
    )
    note(f"done in {last['time_s']:.0f} s{': test ' + metrics if metrics else ''}")
    note(f"run folder: {folder} (manifest.json, config.toml, metrics.jsonl, model.pt)")
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **last}))
