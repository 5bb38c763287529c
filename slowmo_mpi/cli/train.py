"""slowmo train."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FAILED, INTERRUPTED, SlowmoError, UsageError
from .progress import Progress
from .say import config_argument, note, say

if TYPE_CHECKING:
    from ..comm import Endpoint
    from ..config import Config


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
    from ..comm.launcher import launched

    claim = launched()
    try:
        if ranks and simulate:
            raise UsageError("-n and --simulate exclude each other.", "Type one of them.")
        if claim is not None and (ranks or simulate) and claim.size > 1:
            raise UsageError(
                f"{claim.launcher} has started {claim.size} of this command already; -n and --simulate would "
                "multiply them.",
                "Leave out -n, or leave out mpirun.",
            )
        settings = _load(config, overrides, ranks or simulate or (claim.size if claim else 1))
        if ranks:
            from ..launch import run

            flags = [f"--set={o}" for o in overrides] + (["--json"] if as_json else [])
            return run(ranks, ["train", *flags, "--", config])
        comm = None if simulate else _communicator(settings)
    except SlowmoError as error:
        return _refuse(error, speaker=claim is None or claim.rank == 0)
    if simulate:
        return _simulated(settings, simulate, as_json)
    assert comm is not None
    return _rank(comm, settings, as_json)


def _load(path: str, overrides: tuple[str, ...], ranks: int) -> Config:
    """Read the configuration and refuse, before MPI starts, whatever can be known to be wrong."""
    from .. import config

    settings = config.load(path, overrides)
    if settings.base.algorithm in ("dpsgd", "sgp", "osgp"):
        from .. import topology

        topology.load(settings.base.topology, ranks)
    from .. import tasks

    tasks.check_options(settings.task.name, settings.task.options)
    return settings


def _communicator(settings: Config) -> Endpoint:
    from ..comm import Communicator

    return Communicator(timeout=settings.comm.timeout)


def _refuse(error: SlowmoError, speaker: bool) -> int:
    """Every rank has met the same error: one tells it, the others let it finish speaking."""
    if speaker:
        say(error)
    else:
        time.sleep(5.0)
    return error.exit_code


def _simulated(settings: Config, ranks: int, as_json: bool) -> int:
    from ..comm import simulate
    from ..runlog import claim_error, make_folder
    from ..train import train

    folder = make_folder(settings)

    def program(comm: Endpoint) -> dict[str, Any]:
        return train(settings, comm, folder, Progress() if comm.rank == 0 else None)

    try:
        results = simulate(ranks, program)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        told = _told(error, getattr(error, "rank", 0), ranks, folder)
        claim_error(folder, "".join(traceback.format_exception(error)))
        say(told)
        return told.exit_code
    _finish(folder, results[0], as_json)
    return 0


def _rank(comm: Endpoint, settings: Config, as_json: bool) -> int:
    """One rank's run. An exception here ends the whole job, told once, by the first rank that fails."""
    from ..runlog import claim_error, make_folder
    from ..train import train

    folder: Path | None = None
    try:
        name = comm.gather(str(make_folder(settings)) if comm.rank == 0 else "")[0]
        folder = Path(name)
        last = train(settings, comm, folder, Progress() if comm.rank == 0 else None)
        if comm.rank == 0:
            _finish(folder, last, as_json)
        return 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException as error:
        told = _told(error, comm.rank, comm.size, folder)
        code = told.exit_code
        if claim_error(folder, "".join(traceback.format_exception(error))):
            say(told)
        else:
            time.sleep(5.0)  # another rank is speaking and will end the job
    sys.stderr.flush()
    if comm.size > 1:
        comm.abort(code)
    return code


def _told(error: BaseException, rank: int, ranks: int, folder: Path | None) -> SlowmoError:
    """A SlowmoError as it is; anything else with its rank and place, the traceback being in the run folder."""
    if isinstance(error, SlowmoError):
        return error
    where = ""
    if error.__traceback__ is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({frame.filename}, line {frame.lineno}, in {frame.name})"
    told = SlowmoError(
        f"Rank {rank} of {ranks} failed: {type(error).__name__}: {error}{where}.",
        f"The traceback is in {folder / 'error.txt'}." if folder else "",
    )
    told.exit_code = FAILED
    return told


def _finish(folder: Path, last: dict[str, Any], as_json: bool) -> None:
    metrics = ", ".join(
        f"{k} {v:.4g}" for k, v in last.items() if k not in ("kind", "step", "epoch", "time_s", "consensus")
    )
    note(f"done in {last['time_s']:.0f} s{': test ' + metrics if metrics else ''}")
    note(f"run folder: {folder} (manifest.json, config.toml, metrics.jsonl, model.pt)")
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **last}))
