"""A laboratory: hosts with a slow network, on one machine.

    python benchmarks/netlab.py --hosts 4 --rate 1gbit -- python benchmark.py
    python benchmarks/netlab.py --hosts 2 --rate 1gbit --check

Every host is a network namespace with a host name of its own. All hang on one switch (a bridge in a namespace of its
own, so that nothing of the lab is ever seen outside), and both ends of every link are limited to the rate: so much a
host sends, so much it receives, at the same time. Ranks are placed host by host; each finds in its environment

    SLOWMO_NETLAB_HOSTS, SLOWMO_NETLAB_RATE_BIT_S     the lab (rate 0: no limit)
    MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME, TP_SOCKET_IFNAME
                                                      for torch.distributed beside MPI, in the same process

Several runs in one lab:

    with Lab(hosts=4, rate="1gbit") as lab:
        lab.run([sys.executable, "benchmark.py"], ranks_per_host=1, timeout=60, capture=True)

It needs root, and `ip` and `tc` (iproute2). At the end everything is gone, however the program ended; what a run that
was killed with SIGKILL has left, the next one (or --clean) removes. Tried with Open MPI 5.0 and 4.1 and MPICH 4.0; what
MPI has beside TCP is switched off between hosts.

How true the wire is, measured with --check and one TCP connection on 2 cores:

- 100mbit to 2.5gbit carry 0.956 of the rate: what headers leave of packets of 1500 bytes (1448 / 1514). The kernel
  hands packets of up to 64 KB on, and counts the headers of every segment all the same. Real Ethernet's gaps and
  checksums, which would make it 0.941, are not counted. With segmentation switched off, 1gbit carries 0.4.
- 10gbit carries 0.8 to 0.95 of it, as far as two cores can keep up; none, 12 to 15 Gbit/s.
- After a pause the first 2 ms' worth goes at once (250 KB at 1gbit), so a transfer can look 2 ms too fast.
- There is no latency of the wire's own, and the hosts share the machine's cores.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from slowmo_mpi.errors import INTERRUPTED, SlowmoError, UsageError
from slowmo_mpi.launch import end_with_parent, find_mpirun, mpirun_version

NETWORK = "10.77.0."  # the hosts see no other, so it is free there
MAX_HOSTS = 100
INTERFACE = "e0"
MASTER_PORT = 29500
TIMED_OUT = 124  # as of timeout(1)
LAB = re.compile(r"(slowmo-(\d+)-(\d+)-\d+)(?:-.*)?")  # process id, when that process was started, serial number
FOREIGN = ("OMPI_", "PMIX_", "PRTE_", "ORTE_", "PMI_", "HYDRA_", "SLURM_", "PBS_", "LSB_")  # of a job around us
ENTER = """\
#!/bin/sh
# Stands in for ssh: enter ADDRESS COMMAND runs the command on the lab's host of this address.
while [ "${1#-}" != "$1" ]; do shift; done
host=h${1##*.}
shift
exec ip netns exec @LAB@-$host unshare --uts sh -c '
  hostname "$0"
  mount --bind "@FOLDER@/hosts" /etc/hosts
  exec sh -c "$*"' $host "$@"
"""
_serial = itertools.count()


class Lab:
    """The hosts h1 to hN at `addresses`, from `with` to its end."""

    def __init__(self, hosts: int, rate: str = "1gbit"):
        if not 1 <= hosts <= MAX_HOSTS:
            raise UsageError(f"--hosts {hosts} cannot be made.", f"Give 1 to {MAX_HOSTS}.")
        self.hosts = hosts
        self.rate_bit_s = rate_bit_s(rate)
        self.addresses = [f"{NETWORK}{k}" for k in range(1, hosts + 1)]
        self.name = f"slowmo-{os.getpid()}-{_started(os.getpid())}-{next(_serial)}"
        self.folder = Path(tempfile.gettempdir()) / self.name
        self.enter = self.folder / "enter"
        self._runs = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Lab:
        requirements()
        clean()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) == signal.SIG_DFL:
                    self._handlers[number] = signal.signal(number, _stop)
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        main = threading.current_thread() is threading.main_thread()
        numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} if main else set()
        before = {n: signal.signal(n, signal.SIG_IGN) for n in numbers}  # nothing shall interrupt this
        _remove(self.name)
        for number, handler in (before | self._handlers).items():
            signal.signal(number, handler)

    def _make(self) -> None:
        self.folder.mkdir(mode=0o755)
        names = [f"h{k}" for k in range(1, self.hosts + 1)]
        # The IPv6 form is what PyTorch's rendezvous looks up, and complains where there is no answer.
        lines = [f"{a} {n}\n::ffff:{a} {n}\n" for a, n in zip(self.addresses, names, strict=True)]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        self.enter.write_text(ENTER.replace("@LAB@", self.name).replace("@FOLDER@", str(self.folder)))
        self.enter.chmod(0o755)

        switch = f"{self.name}-switch"
        _batch(["ip"], [f"netns add {switch}", *(f"netns add {self.name}-{n}" for n in names)])
        wires = ["link add name bridge type bridge", "link set bridge addrgenmode none up"]
        for n in names:
            wires += [
                f"link add name {n} type veth peer name {INTERFACE} netns {self.name}-{n}",
                f"link set {n} addrgenmode none master bridge up",
            ]
        _batch(["ip", "-n", switch], wires)
        for n, address in zip(names, self.addresses, strict=True):
            # addrgenmode none: no IPv6 address, that nobody might choose it.
            up = [f"addr add {address}/24 dev {INTERFACE}", "link set lo up"]
            _batch(["ip", "-n", f"{self.name}-{n}"], [*up, f"link set {INTERFACE} addrgenmode none up"])
            if self.rate_bit_s:
                _batch(["tc", "-n", f"{self.name}-{n}"], [_limit(INTERFACE, self.rate_bit_s)])
        if self.rate_bit_s:
            _batch(["tc", "-n", switch], [_limit(n, self.rate_bit_s) for n in names])

    def limit(self, host: int, rate: str) -> None:
        """From now on host 0, 1, ... sends at another rate; as `Lab(rate=)`, of a lab that has one."""
        _batch(["tc", "-n", f"{self.name}-h{host + 1}"], [_limit(INTERFACE, rate_bit_s(rate), "replace")])

    def on(self, host: int, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on host 0, 1, ..., in the same process."""
        return [str(self.enter), self.addresses[host], "exec " + shlex.join(command)]

    def run(
        self,
        program: Sequence[str],
        ranks_per_host: int = 1,
        *,
        mpirun: str | None = None,
        timeout: float | None = None,
        capture: bool = False,
        mca: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `program` as MPI ranks, so many on every host; `capture` keeps what it prints.

        Raises: subprocess.TimeoutExpired, after all ranks have been ended.
        """
        found = shutil.which(mpirun or find_mpirun())
        if found is None:
            raise UsageError(f"There is no {mpirun}.", "Give the path of an mpirun.")
        mpirun = os.path.abspath(found)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        environment |= {
            "PATH": f"{Path(mpirun).parent}:{_path()}",
            "SLOWMO_NETLAB_HOSTS": str(self.hosts),
            "SLOWMO_NETLAB_RATE_BIT_S": str(self.rate_bit_s),
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(MASTER_PORT + self._runs % 1000),  # the last run's may still be closing
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "TP_SOCKET_IFNAME": INTERFACE,
        }
        self._runs += 1
        flags, more = self._launcher(mpirun, ranks_per_host, mca or {})
        command = self.on(0, [mpirun, *flags, "-n", str(self.hosts * ranks_per_host), *program])
        pipe = subprocess.PIPE if capture else None
        child = subprocess.Popen(
            command, env=environment | more | dict(env or {}), text=True,
            stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe,
            process_group=0,  # a terminal's Ctrl-C comes to us alone
            preexec_fn=lambda: end_with_parent(signal.SIGTERM),
        )  # fmt: skip
        try:
            out, err = child.communicate(timeout=timeout)
        finally:
            if child.poll() is None:
                child.terminate()
            _end(_namespaces(self.name), patience_s=3)
            child.wait()
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    def _launcher(self, mpirun: str, ranks: int, mca: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Flags and environment of this MPI's mpirun that make it use the hosts, and nothing but the wire between."""
        version = mpirun_version(mpirun)
        hosts = ",".join(f"{a}:{ranks}" for a in self.addresses)
        if not re.search("Open ?(MPI|RTE)", version):
            if mca:
                raise UsageError(f"--mca is for Open MPI, and {mpirun} is none.", "Try --env.")
            flags = ["-launcher", "ssh", "-launcher-exec", str(self.enter), "-localhost", self.addresses[0]]
            wire = {"FI_PROVIDER": "tcp", "FI_TCP_IFACE": INTERFACE, "UCX_TLS": "tcp,self"}
            return [*flags, "-hosts", hosts], wire
        old = " 4." in version
        local = [] if ranks == 1 else ["vader" if old else "sm"]
        settings = {
            "pml": "ob1",  # UCX would find ways around the wire
            "btl": ",".join(["tcp", "self", *local]),
            "btl_tcp_if_include": INTERFACE,
            "mpi_yield_when_idle": "1",
            **mca,
        }
        flags = ["--host", hosts, "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
        flags += ["--mca", "plm_rsh_agent"] if old else ["--prtemca", "plm_ssh_agent"]
        flags += [str(self.enter), *(word for item in settings.items() for word in ("--mca", *item))]
        return flags, {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def rate_bit_s(text: str) -> int:
    """ "100mbit", "2.5gbit" -> bits per second; "none" -> 0."""
    if text == "none":
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text.lower())
    rate = round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]]) if found else 0
    if rate < 1_000_000:
        raise UsageError(f"{text!r} is no rate of a network of today.", "Give 100mbit, 1gbit, 10gbit or none.")
    return rate


def requirements() -> None:
    """Raises: UsageError where no lab can be made."""
    if os.geteuid() != 0:
        raise UsageError(
            "A lab needs root, to make network namespaces, and this is not root.",
            'Type `sudo env "PATH=$PATH" python benchmarks/netlab.py` and the same words.',
        )
    for tool in ("ip", "tc"):
        if not shutil.which(tool, path=_path()):
            raise UsageError(
                f"A lab needs `ip` and `tc`, and there is no `{tool}`.", "Type `apt-get install iproute2`."
            )


def clean() -> int:
    """Remove the labs whose process is gone; how many."""
    found = {LAB.fullmatch(p.name) for d in ("/run/netns", tempfile.gettempdir()) for p in Path(d).glob("slowmo-*")}
    dead = {m[1] for m in found if m and _started(int(m[2])) != int(m[3])}
    for name in dead:
        _remove(name)
    return len(dead)


def _limit(interface: str, rate: int, verb: str = "add") -> str:
    """tc's words. With a smaller bucket than these 2 ms of the rate, 1gbit came out as 0.89 of it."""
    burst_bytes = max(32_768, rate // 8 // 500)
    return f"qdisc {verb} dev {interface} root tbf rate {rate}bit burst {burst_bytes} latency 200ms"


def _remove(name: str) -> None:
    namespaces = _namespaces(name)
    _end(namespaces, patience_s=0)
    if namespaces:
        _batch(["ip", "-force"], [f"netns delete {path.name}" for path in namespaces])
    shutil.rmtree(Path(tempfile.gettempdir()) / name, ignore_errors=True)


def _namespaces(name: str) -> list[Path]:
    return list(Path("/run/netns").glob(f"{name}-*"))


def _end(namespaces: Iterable[Path], patience_s: float) -> None:
    """Wait so long for the processes in these namespaces to end, then kill them, and wait 10 s at most."""
    inodes = {f"net:[{path.stat().st_ino}]" for path in namespaces}
    deadline = time.monotonic() + patience_s
    while pids := [int(p.parts[2]) for p in Path("/proc").glob("[0-9]*/ns/net") if _link(p) in inodes]:
        if time.monotonic() >= deadline + 10:
            break
        if time.monotonic() >= deadline:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        time.sleep(0.02)


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # it has ended meanwhile
        return ""


def _started(pid: int) -> int | None:
    """When this process was started (a process id is given again, with another time), None if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # the latter for ip and tc


def _batch(command: list[str], lines: Iterable[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    words = [*command, "-batch", "-"]
    done = subprocess.run(words, input=text, capture_output=True, text=True, env={"PATH": _path()}, check=False)
    if done.returncode and "-force" not in command:
        raise SlowmoError(
            f"{shlex.join(command)} says: {' '.join(done.stderr.split())}.",
            "A container must be allowed to make network namespaces (CAP_SYS_ADMIN and CAP_NET_ADMIN).",
        )


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


RECEIVE = """
import socket, time
server = socket.create_server((ADDRESS, 29400))
server.settimeout(10)
print(flush=True)
link, _ = server.accept()
room, count, start = bytearray(1 << 20), 0, time.monotonic()
while (now := time.monotonic()) < start + 0.3:  # the bucket is full at first
    link.recv_into(room)
first = now
while (now := time.monotonic()) < first + 1.5:
    count += link.recv_into(room)
print(count * 8 / (now - first))
"""
SEND = """
import socket
link = socket.create_connection((ADDRESS, 29400))
try:
    while True:
        link.sendall(bytes(1 << 20))
except OSError:
    pass
"""
RANK = """
import socket
from mpi4py import MPI
comm = MPI.COMM_WORLD
library = " ".join(MPI.Get_library_version().strip(chr(0)).splitlines()[0].split()[:3]).strip(",")
host = socket.gethostname()
lines = comm.gather(f"rank {comm.rank} of {comm.size} on {host} ({socket.gethostbyname(host)}): {library}")
if lines:
    print(*lines, sep=chr(10), flush=True)
"""


def goodput_bit_s(lab: Lab, sender: int, receiver: int) -> float:
    """What one TCP connection carries from host to host."""
    words = [f"ADDRESS = {lab.addresses[receiver]!r}\n" + text for text in (RECEIVE, SEND)]
    receive, send = ([sys.executable, "-I", "-c", text] for text in words)
    with subprocess.Popen(lab.on(receiver, receive), stdout=subprocess.PIPE, text=True, process_group=0) as server:
        assert server.stdout is not None
        server.stdout.readline()
        with subprocess.Popen(lab.on(sender, send), process_group=0):
            return float(server.communicate()[0])


def check(lab: Lab, **run: Any) -> int:
    """Print what the lab is like; the exit code of its ranks."""
    code = lab.run([sys.executable, "-c", RANK], **run).returncode
    for sender, receiver in ((0, 1), (1, 0)) if lab.hosts > 1 else ():
        rate = goodput_bit_s(lab, sender, receiver)
        share = f", {rate / lab.rate_bit_s:.3f} of the rate" if lab.rate_bit_s else ""
        click.echo(f"one TCP connection h{sender + 1} -> h{receiver + 1}: {rate / 1e9:.3f} Gbit/s{share}")
    return code


@click.command(help=__doc__.split("\n\n", 1)[0], context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--hosts", default=2, show_default=True, help="So many hosts.")
@click.option("--rate", default="1gbit", show_default=True, help="Of every link: 100mbit, 1gbit, ..., or none.")
@click.option("--ranks-per-host", default=1, show_default=True, type=click.IntRange(1))
@click.option("--mpirun", help="The MPI to use.  [default: the one beside this Python]")
@click.option("--timeout", type=float, metavar="SECONDS", help="End the program after so long (exit code 124).")
@click.option("--mca", nargs=2, multiple=True, metavar="KEY VALUE", help="A setting of Open MPI.")
@click.option("--env", multiple=True, metavar="KEY=VALUE", help="A variable for every rank.")
@click.option("--check", "check_", is_flag=True, help="Print hosts, MPI and what a link carries.")
@click.option("--clean", "clean_", is_flag=True, help="Only remove what killed labs have left.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
def main(
    hosts: int, rate: str, check_: bool, clean_: bool, program: tuple[str, ...], env: tuple[str, ...],
    mca: tuple[tuple[str, str], ...], **run: Any,
) -> None:  # fmt: skip
    try:
        if clean_:
            requirements()
            click.echo(f"netlab: labs removed: {clean()}")
            return
        if not check_ and not program:
            raise UsageError("There is no program to run.", "Put it at the end: -- python benchmark.py, or --check.")
        for item in env:
            if "=" not in item:
                raise UsageError(f"--env {item} has no value.", f"Type --env {item}=VALUE.")
        run |= {"mca": dict(mca), "env": dict(item.split("=", 1) for item in env)}
        with Lab(hosts, rate) as lab:
            code = check(lab, **run) if check_ else lab.run(program, **run).returncode
        sys.exit(code if code >= 0 else 128 - code)
    except SlowmoError as error:
        click.echo(f"netlab: {error.message}\n  {error.hint}", err=True)
        sys.exit(error.exit_code)
    except subprocess.TimeoutExpired:
        click.echo(f"netlab: The program had not ended after {run['timeout']:g} s, and was stopped.", err=True)
        sys.exit(TIMED_OUT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
