"""A Slurm cluster of its own, on hosts of the laboratory (netlab.py): real daemons, real queue, nodes that can be lost.

    with Cluster(nodes=4) as cluster:
        job = cluster.submit(["sbatch", "--parsable", "job.sh"])
        cluster.power_off("h3")
        print(cluster.wait(job)["JobState"])

One munged, one slurmctld and a slurmd on every host h1, h2, ...; h1 is the login node too. Key, configuration, state
and logs lie in the lab's folder and no port is open outside the lab, so that a Slurm of the machine's own neither
disturbs nor is disturbed, and nothing stays when the lab is gone. It needs root, iproute2, and Debian's slurm-wlm and
munge (tried with Slurm 22.05).

Slurm's clocks are made to tick faster than a site's:

- A requeued job waits as long as a job step's credential lives: AuthInfo's cred_expire, 120 s unless the site says
  otherwise (squeue: BeginTime). Here CREDENTIAL_S.
- A node that does not answer is down after SlurmdTimeout, 300 s on most sites. Here NODE_TIMEOUT_S.
- What cannot be changed: limits are in minutes, and slurmctld looks at them every 30 s. So --signal's warning comes up
  to a minute early. A job that does not heed it is given ten minutes more (OverTimeLimit): on a busy machine the start
  alone may take a minute.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from netlab import FOREIGN, INTERFACE, Lab
from netlab import requirements as lab_requirements

from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.launch import end_with_parent

SLOTS = 8  # of a node; more than the machine has cores, since several stories run at once
CREDENTIAL_S = 5
NODE_TIMEOUT_S = 20  # shorter, and a busy machine passes for a dead node
DAEMON_NICE = -10  # the ranks of several jobs fill the cores, and the daemons have to answer
START_S = 30  # for the daemons
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
SLURM_CONF = """\
ClusterName=slowmo
SlurmctldHost={login}({login_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential_s}
CredType=cred/munge
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
PropagatePrioProcess=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,defer_batch=0
ReturnToService=2
SlurmdTimeout={node_timeout_s}
KillWait=20
OverTimeLimit=10
MinJobAge=86400
SlurmdParameters=config_overrides
TmpFS={folder}/tmp-%n
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


class Cluster:
    """Slurm on so many hosts, `nodes`, with links of this rate, from `with` to its end."""

    def __init__(self, nodes: int = 4, rate: str = "none"):
        self.lab = Lab(nodes, rate)
        self.nodes = [f"h{k}" for k in range(1, nodes + 1)]
        self.folder = self.lab.folder / "slurm"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        requirements()
        self.lab.__enter__()
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lab.__exit__()  # ends every process on its hosts
        for daemon in self._daemons.values():
            daemon.wait()

    def _make(self) -> None:
        self.folder.mkdir(mode=0o755)
        for name in ("state", *(f"{kind}-{node}" for kind in ("spool", "tmp") for node in self.nodes)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        where = zip(self.nodes, self.lab.addresses, strict=True)
        text = SLURM_CONF.format(
            login=self.nodes[0], login_address=self.lab.addresses[0], folder=self.folder, credential_s=CREDENTIAL_S,
            node_timeout_s=NODE_TIMEOUT_S,
            nodes="\n".join(f"NodeName={n} NodeHostname={n} NodeAddr={a} CPUs={SLOTS} State=UNKNOWN" for n, a in where),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        # Unused; a lab's host has no /sys/fs/cgroup.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
        self._start("munged", 0, ["munged", "--foreground", *words])
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged's socket")
        self._start("slurmctld", 0, ["slurmctld", "-D"])
        for node in self.nodes:
            self._start(node, self.nodes.index(node), ["slurmd", "-D", "-N", node])
        self._until(lambda: self.states() == dict.fromkeys(self.nodes, "IDLE"), "idle nodes")

    def environment(self) -> dict[str, str]:
        """What reaches this Slurm and no other, and nothing of a job around us."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith((*FOREIGN, "SBATCH_", "SQUEUE_"))}
        path = f"{kept.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # the latter for slurmd, and for ip
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def run(
        self, words: Sequence[str], node: int = 0, timeout: float = 60, env: Mapping[str, str] | None = None, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node (the login node), and keep what it prints."""
        return subprocess.run(
            self.lab.on(node, words), env=self.environment() | dict(env or {}), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=False, **how,
        )  # fmt: skip

    def ask(self, *words: str) -> str:
        """What a command of Slurm's prints. Raises: SlowmoError where it fails."""
        done = self.run(words)
        if done.returncode:
            raise SlowmoError(f"`{' '.join(words)}` says: {' '.join(done.stderr.split())}.", self.last_words())
        return done.stdout

    def submit(self, words: Sequence[str], **how: Any) -> str:
        """Run a command that submits a job and prints its number last; that number."""
        done = self.run(words, **how)
        if done.returncode or not done.stdout.strip():
            raise SlowmoError(f"No job was submitted: {done.stdout} {done.stderr}.", "")
        return done.stdout.split()[-1]

    def states(self) -> dict[str, str]:
        """Node -> IDLE, MIXED, DOWN, DOWN*, ..."""
        done = self.run(["sinfo", "--Node", "--noheader", "--format=%N %T", "--partition=main"])
        return {k: v.upper() for k, v in (line.split() for line in done.stdout.splitlines())}

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job`, as it stands; of a job array its first task."""
        fields = self.ask("scontrol", "--oneliner", "show", "job", job).splitlines()[0].split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, states: Collection[str] = ENDED, limit_s: float = 120) -> dict[str, str]:
        """The job, once it is in one of these states."""
        self._until(lambda: self.job(job)["JobState"] in states, f"job {job} to be {' or '.join(states)}", limit_s)
        return self.job(job)

    def kill(self, node: str) -> None:
        """SIGKILL to all of the node's processes: slurmd, the jobs' steps, the ranks; peers see connections close.

        Not for the login node, where slurmctld runs.
        """
        for pid in self._processes(node):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._daemons.pop(node).wait()

    def kill_ranks(self, node: str, job: str) -> None:
        """SIGKILL to what the job's steps run on this node; Slurm itself stays."""
        for pid in self._processes(node):
            try:
                if f"SLURM_JOB_ID={job}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
            except OSError:  # it has ended meanwhile
                continue

    def power_off(self, node: str) -> None:
        """The same with the link cut first: nobody hears of it, as when a node loses its power."""
        self._link(node, "down")
        self.kill(node)

    def slow_down(self, node: str, rate: str) -> None:
        """Let the node send at this rate only; the cluster's links have to be limited."""
        self.lab.limit(self.nodes.index(node), rate)

    def power_on(self, node: str) -> None:
        """Give it back; returns when Slurm has it again."""
        self._link(node, "up")
        self._start(node, self.nodes.index(node), ["slurmd", "-D", "-N", node])
        self._until(lambda: self.states()[node] in ("IDLE", "MIXED", "ALLOCATED"), f"{node} to be back")

    def last_words(self) -> str:
        """The end of slurmctld's log."""
        log = self.folder / "slurmctld.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.exists() else ""

    def _start(self, name: str, node: int, words: list[str]) -> None:
        def first() -> None:
            end_with_parent(signal.SIGKILL)
            os.nice(DAEMON_NICE)

        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                self.lab.on(node, words), env=self.environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                process_group=0, preexec_fn=first,
            )  # fmt: skip

    def _processes(self, node: str) -> list[int]:
        inode = f"net:[{Path(f'/run/netns/{self.lab.name}-{node}').stat().st_ino}]"
        found = []
        for path in Path("/proc").glob("[0-9]*/ns/net"):
            try:
                if os.readlink(path) == inode:
                    found.append(int(path.parts[2]))
            except OSError:  # it has ended meanwhile
                continue
        return found

    def _link(self, node: str, state: str) -> None:
        words = ["ip", "-n", f"{self.lab.name}-{node}", "link", "set", INTERFACE, state]
        subprocess.run(words, env=self.environment(), check=True)

    def _until(self, true: Callable[[], bool], what: str, limit_s: float = START_S) -> None:
        deadline = time.monotonic() + limit_s
        while not true():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    said = (self.folder / f"{name}.out").read_text(errors="replace")[-2000:]
                    raise SlowmoError(f"The daemon of {name} has ended with {daemon.returncode}: {said}", "")
            if time.monotonic() > deadline:
                raise SlowmoError(f"{limit_s:g} s were not enough for {what}.", self.last_words())
            time.sleep(0.1)


def requirements() -> None:
    """Raises: UsageError where no cluster can be made."""
    lab_requirements()
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing:
        raise UsageError(
            f"A Slurm cluster needs {', '.join(missing)}, which is not here.", "Type `apt-get install slurm-wlm munge`."
        )
