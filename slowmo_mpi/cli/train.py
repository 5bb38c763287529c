"""slowmo train."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import sysconfig
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DONE, INTERRUPTED, STOPPED_EARLY, SlowmoError, UsageError
from .progress import NOT_METRICS, Progress, spread_of
from .say import config_argument, note, say

if TYPE_CHECKING:
    from ..comm import Endpoint
    from ..config import Config
    from ..start import Start
    from ..stopping import Wish

SPEAKING_S = 5.0  # what the rank that speaks is given before the others end the job
TOLD_CHARACTERS = 400  # of an exception's text; some of torch's go on for pages


@click.command()
@config_argument
@click.option("-n", "--ranks", type=click.IntRange(1), help="Start so many ranks with mpirun on this machine.")
@click.option("--simulate", type=click.IntRange(1), metavar="N", help="N ranks in this one process, without MPI.")
@click.option(
    "--resume",
    metavar="RUN|FILE|auto",
    help="Go on: in run folder RUN from its newest whole checkpoint; from checkpoint FILE in a new run folder; auto: "
    "in the newest run of this name that did not come to its end, or start where there is none.",
)
@click.option(
    "--allow-changed",
    "allowed",
    multiple=True,
    metavar="SECTION.KEY",
    help="With --resume: this key may differ from the checkpoint's; may be repeated.",
)
@click.option("--trace", is_flag=True, help="Write each rank's time line, trace/rank-N.json, for ui.perfetto.dev.")
@click.option("--json", "as_json", is_flag=True, help="Print the last evaluation as JSON on stdout.")
def train(
    config: str,
    overrides: tuple[str, ...],
    ranks: int | None,
    simulate: int | None,
    resume: str | None,
    allowed: tuple[str, ...],
    trace: bool,
    as_json: bool,
) -> int:
    """Train what CONFIG describes, and leave a run folder.

    Under mpirun or srun each rank runs this command; alone it is one rank; with -n it starts mpirun itself.
    The run folder holds manifest.json, config.toml, metrics.jsonl, checkpoints/ and model.pt (the averaged
    model's state_dict).

    SIGUSR1, SIGUSR2, SIGTERM or run.stop_after end a run early: all ranks stop after the same step and write a
    checkpoint, and the exit code is 75, run again.

    \b
    Example:
      slowmo train my.toml -n 4
      mpirun -n 4 slowmo train my.toml --set slowmo.tau=12
      srun --mpi=pmix -n 32 slowmo train my.toml
      slowmo train my.toml --simulate 8
      slowmo train my.toml -n 4 --resume runs/my-20261122-190448
      srun --mpi=pmix slowmo train my.toml --resume auto
    """
    from .. import config as configuration
    from ..comm.launcher import launched

    if ranks and simulate:
        raise UsageError("-n and --simulate exclude each other.", "Type one of them.")
    claim = launched()
    if claim is not None and claim.size != 1 and (ranks or simulate):
        raise UsageError(
            f"{claim.launcher} has started {claim.size or 'several'} of this command already; -n and --simulate would "
            "multiply them.",
            "Leave out -n, or leave out mpirun.",
        )
    # What can be known to be wrong is refused before MPI starts, where one process can speak for all.
    settings = configuration.load(config, overrides)
    from ..topology import for_algorithm

    size = ranks or simulate or (claim.size if claim else 1)
    if size and (per_worker := settings.run.ranks_per_worker()):  # aprun does not tell how many there are
        for_algorithm(settings.base.algorithm, settings.base.topology, max(1, size // per_worker))
    if allowed and not resume:
        raise UsageError("--allow-changed says something of --resume, which is missing.", "Add --resume RUN.")
    if resume and resume != "auto" and not Path(resume).exists():
        raise UsageError(f"There is no {resume} to go on from.", "Give a run folder, a checkpoint file, or auto.")
    if ranks:
        from ..launch import run
        from ..start import LAUNCHED

        os.environ[LAUNCHED] = str(time.time())
        flags = [f"--set={o}" for o in overrides] + ["--json"] * as_json + ["--trace"] * trace
        flags += [f"--allow-changed={k}" for k in allowed] + ([f"--resume={resume}"] if resume else [])
        return run(ranks, ["train", *flags, "--", config])

    from .. import tasks
    from ..stopping import Wish

    job = Job(settings, Wish(configuration.seconds(settings.run.stop_after)), resume or "", allowed, trace)
    with job.wish.listening():  # torch is imported below, and a signal may come before it is
        tasks.check_options(settings.task.name, settings.task.options)
        return _simulated(job, simulate, as_json) if simulate else _rank(job, as_json)


@dataclass
class Job:
    """What a rank is to do. folder: the run folder, once it is known. start: the phases of a real rank's start."""

    settings: Config
    wish: Wish
    resume: str
    allowed: tuple[str, ...]
    trace: bool
    folder: Path | None = None
    start: Start | None = None

    def run(self, comm: Endpoint) -> dict[str, Any]:
        """Find what to go on from and the run folder, and train."""
        from ..checkpoint.write import together
        from ..resume import AUTO, checkpoint_of, unfinished
        from ..runlog import make_folder, set_error_aside
        from ..train import train

        if self.start is not None:
            with contextlib.suppress(ImportError):
                import torch._dynamo  # noqa: F401  an optimizer does it when it is made: as many files again as torch
            self.start.mark("imports")
        place, checkpoint = Path(self.resume) if self.resume else None, None
        if self.resume == AUTO:
            place = together(comm, lambda: unfinished(self.settings), only=0)[0]
        if place is not None:
            checkpoint = checkpoint_of(place, self.settings, self.allowed, comm, note)
        if place is not None and place.is_dir():
            folder = checkpoint.path.parent.parent if checkpoint else place
            if comm.rank == 0:
                set_error_aside(folder)
        else:
            folder = together(comm, lambda: make_folder(self.settings), only=0)[0]
        self.folder = folder
        show = Progress() if comm.rank == 0 else None
        return train(self.settings, comm, folder, show, checkpoint, self.wish, self.trace, self.start)


def _simulated(job: Job, ranks: int, as_json: bool) -> int:
    from ..comm import simulate

    try:
        last = simulate(ranks, job.run)[0]
    except BaseException as error:
        code = _failed(error, getattr(error, "rank", 0), ranks, job.folder)
        if code == INTERRUPTED:
            os._exit(code)  # a rank's thread may still be inside torch, and Python would abort on the way out
        return code
    return _finish(job, last, as_json)


def _rank(job: Job, as_json: bool) -> int:
    """One rank's run. An exception here ends the whole job, told once, by the first rank that fails.

    MPI_Abort hands the exit code to the launcher: Open MPI's mpirun and MPICH's end with it.
    """
    from ..comm import Communicator
    from ..comm.launcher import launched
    from ..launch import end_with_parent
    from ..start import Start

    if launched() is not None:
        end_with_parent()  # mpirun killed by SIGKILL would leave its ranks training
    job.start = Start()
    job.start.mark("imports")
    comm = Communicator(timeout=job.settings.comm.timeout)
    job.start.mark("MPI")
    try:
        last = job.run(comm)
        code = _finish(job, last, as_json) if comm.rank == 0 else STOPPED_EARLY if "stopped" in last else DONE
        job.wish.ignore()
        comm.barrier()  # some launchers end a job as soon as one rank ends with another code than 0
    except BaseException as error:
        code = _failed(error, comm.rank, comm.size, job.folder)
        if comm.size > 1:
            comm.abort(code)  # the others would wait for this rank
    return code


def _failed(error: BaseException, rank: int, ranks: int, folder: Path | None) -> int:
    """Tell what went wrong, unless another rank is telling it; the exit code to end with."""
    from ..runlog import claim_error

    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    told = error if isinstance(error, SlowmoError) else _told(error, rank, ranks, folder)
    if folder is None and rank > 0:
        time.sleep(1.0 + rank / 10)  # most such errors are everybody's, and rank 0 tells them and ends the job
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


def _finish(job: Job, last: dict[str, Any], as_json: bool) -> int:
    """Tell how it ended, on rank 0; the exit code."""
    folder = job.folder
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **last}))
    if "stopped" in last:
        note(f"stopped after step {last['step']} ({last['stopped']}), with a checkpoint; go on with --resume {folder}")
        return STOPPED_EARLY
    hidden = {key for keys in spread_of(last).values() for key in keys}.union(NOT_METRICS)
    metrics = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k not in hidden)
    note(f"done in {last['time_s']:.0f} s{': test ' + metrics if metrics else ''}")
    note(f"run folder: {folder} (manifest.json, config.toml, metrics.jsonl, model.pt, checkpoints)")
    return DONE
