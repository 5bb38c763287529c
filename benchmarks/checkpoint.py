"""How fast checkpoints are written, how long they hold training up, and how fast they load.

    python benchmarks/checkpoint.py [--ranks 2 4] [--repeats 5] [--parameters 25.6e6] [--out benchmarks/NAME]

Starts its ranks itself. Writes OUT.json with every measurement and OUT.md with the tables. What is compared takes
turns (A B C, A B C, ...), after one turn that is not counted; ratios are taken within a turn.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp

from slowmo_mpi import SGP, Checkpoints, Communicator, SlowMo, saved
from slowmo_mpi.checkpoint import files, hdf5, write
from slowmo_mpi.checkpoint.read import Checkpoint
from slowmo_mpi.checkpoint.store import Store
from slowmo_mpi.checkpoint.tree import Share
from slowmo_mpi.launch import find_mpirun, mpirun_command, mpirun_version

HERE = Path(__file__).resolve().parent
WRITERS = {
    "dd": "`dd`, one process",
    "dds": "`dd`, a process per rank",
    "parallel": "slowmo-mpi, one file",
    "shards": "slowmo-mpi, a file per rank",
    "dcp": "torch.distributed.checkpoint",
    "torch.save": "`torch.save`",
}
OURS = ("parallel", "shards")
STALLS = (1, 2)  # ranks, with all cores for both: one leaves the second core to the writer, two leave none
LAPS = ("none", "synchronous", "asynchronous")
LAP_STEPS = 12
COMPUTE_S = 0.12
RATE_TARGET, STALL_TARGET = 0.9, 0.05
NOTES = """\
How each number was read. Everything older is put on the disk (`sync`), all ranks meet, the clock starts, all write, all
meet, the clock stops. Counted are the bytes of the files that are there then. `dd` writes as many zeros as the tensors
have bytes (`bs=8M conv=fsync`). Numbers are medians over the turns (smallest to largest); ratios are medians of the
ratios within one turn. What each does until the clock stops:

- slowmo-mpi: copies the momentum's tensors into one vector, hashes all (XXH3), reserves the room, writes (the fsync
  begins meanwhile), reads all back and hashes it again, seals, renames, fsyncs the folder. One file, or one per rank
  and an index.
- torch.distributed.checkpoint (gloo, `FileSystemWriter` as it comes): a file per rank, fsynced, and an index, fsynced
  and renamed last. CRC-32 of zip, which torch.load does not check; no read-back, no fsync of the folder.
- `torch.save`: a file per rank, fsynced and renamed. CRC-32 of zip as above; no read-back, no fsync of the folder,
  nothing that ties the ranks' files together.
- `dd`: no checksums, no read-back, no fsync of the folder; its data is one buffer of zeros.

The last three have their tensors laid out before the clock starts; ours starts from the worker.
"""


# ---- what every rank does ----
def resnet50() -> list[int]:
    """The elements of ResNet-50's 161 tensors."""
    sizes, inputs = [64 * 3 * 49, 64, 64], 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            wide = 4 * width
            sizes += [inputs * width, width, width, 9 * width * width, width, width, width * wide, wide, wide]
            sizes += [inputs * wide, wide, wide] if block == 0 else []
            inputs = wide
    return [*sizes, 2048 * 1000, 1000]


def trained(comm: Communicator, parameters: float, tau: int, steps: int) -> SlowMo:
    """A worker in mid-round, not in the first: z and momentum differ from rank to rank, and no vector is zero."""
    sizes = resnet50()
    model = torch.nn.ParameterList(
        torch.nn.Parameter(0.01 * torch.randn(max(1, round(n * parameters / sum(sizes))))) for n in sizes
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    worker = SlowMo(model, optimizer, comm, SGP(), tau=tau)
    torch.manual_seed(comm.rank)
    for p in model.parameters():
        p.grad = 0.01 * torch.randn_like(p)  # for good: SGP and SGD leave it as it is
    for _ in range(steps):
        worker.step()
    return worker


def tensors_of(worker: SlowMo) -> dict[str, torch.Tensor]:
    """What our checkpoints hold of this rank, for writers that take named tensors; no two ranks share a name."""
    tree = worker.state_dict()
    named = {f"{key}/{kind}": vector for key in ("z", "anchor", "u") for kind, vector in tree[key].items()}
    named |= {f"momentum/{name}": state["momentum_buffer"] for name, state in tree["optimizer"]["state"].items()}
    # torch.save would write all of the memory that a part is a part of
    return {f"{worker.comm.rank}/{n}": t.part.clone() if isinstance(t, Share) else t for n, t in named.items()}


def meet(comm: Communicator) -> float:
    """The time when every rank is here. Unlike comm.barrier() it leaves the core to those that still work."""
    request = comm.mpi.Ibarrier()
    while not request.Test():
        time.sleep(0.001)
    return time.perf_counter()


def rates(comm: Communicator, options: argparse.Namespace) -> dict[str, Any]:
    """Every writer in turn, and loading what ours wrote."""
    worker = trained(comm, options.parameters, tau=4, steps=6)
    tensors = tensors_of(worker)
    total = sum(comm.gather(sum(t.nbytes for t in tensors.values())))
    store = torch.distributed.FileStore(str(options.folder / "gloo"), comm.size)
    torch.distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    ours = {x: Checkpoints(worker, options.folder / x, layout=x, asynchronous=False) for x in OURS}
    writers: dict[str, Callable[[Path], Any]] = {
        "dd": lambda folder: dd(folder / "raw", total) if comm.rank == 0 else None,
        "dds": lambda folder: dd(folder / f"raw-{comm.rank}", total // comm.size),
        "parallel": lambda folder: ours["parallel"].save(),
        "shards": lambda folder: ours["shards"].save(),
        "dcp": lambda folder: dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder)),
        "torch.save": lambda folder: torch_save(tensors, folder / f"rank-{comm.rank}.pt"),
    }
    clock = Clock()
    found: dict[str, list[Any]] = {name: [] for name in WRITERS}
    for repeat in range(1 + options.repeats):
        for name, action in writers.items():
            folder = options.folder / name
            folder.mkdir(exist_ok=True)
            os.sync()
            start = meet(comm)
            clock.parts.clear()
            path = action(folder)
            parts = dict(clock.parts)
            turn: dict[str, Any] = {"s": meet(comm) - start}
            files = [p for p in folder.rglob("*") if p.is_file()]
            turn |= {"bytes": sum(p.stat().st_size for p in files), "files": len(files)}
            if name in OURS:
                turn |= {"parts": parts | {"other": turn["s"] - sum(parts.values())}, "load": load(comm, worker, path)}
            found[name].append(turn)
            tell(comm, f"turn {repeat}: {name} {turn['bytes'] / turn['s'] / 1e6:.0f} MB/s")
            meet(comm)
            if comm.rank == 0:
                shutil.rmtree(folder)
            meet(comm)
    return {"bytes": total, "cores": len(os.sched_getaffinity(0)), "turns": {k: v[1:] for k, v in found.items()}}


def dd(path: Path, count: int) -> None:
    words = ["dd", "if=/dev/zero", f"of={path}", "bs=8M", f"count={count}", "iflag=count_bytes", "conv=fsync"]
    subprocess.run([*words, "status=none"], check=True)


def torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load(comm: Communicator, worker: SlowMo, path: Path) -> dict[str, float]:
    """Resuming from a file of which this machine's memory holds nothing, step by step, in seconds."""
    os.sync()
    for file in path.parent.rglob("*.h5"):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    times = [meet(comm)]
    with Checkpoint(path) as checkpoint:
        times.append(meet(comm))
        checkpoint.prove(comm.rank, comm.size)
        times.append(meet(comm))
        saved.load(worker, checkpoint)
        times.append(meet(comm))
    return {name: times[i + 1] - times[i] for i, name in enumerate(("open", "prove", "load"))}


class Clock:
    """Where a save of ours spends its time on this rank: `parts`, in seconds.

    Time in a timed function that another one calls is the inner one's alone.
    """

    def __init__(self) -> None:
        self.parts: Counter[str] = Counter()
        self._inner = 0.0
        for owner, name, part in (
            (Store, "_copy", "copy"),
            (write, "checksum", "hash"),
            (files, "reserve", "reserve"),
            (write, "_write", "write"),  # one file: through HDF5 and MPI-IO
            (write, "write_at", "write"),  # a file per rank
            (files.Syncing, "__exit__", "rest of fsync"),  # which began while we wrote
            (write, "_read_back", "read back"),
            (Communicator, "gather", "wait for ranks"),
        ):
            self._time(owner, name, part)

    def _time(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*words: Any, **named: Any) -> Any:
            start, outer, self._inner = time.perf_counter(), self._inner, 0.0
            try:
                return function(*words, **named)
            finally:
                took = time.perf_counter() - start
                self.parts[part] += took - self._inner
                self._inner = outer + took

        setattr(owner, name, timed)


def stall(comm: Communicator, options: argparse.Namespace) -> dict[str, Any]:
    """Laps of a training loop, in turn without a checkpoint and with one of either kind at the start."""
    worker = trained(comm, options.parameters, tau=LAP_STEPS, steps=LAP_STEPS + LAP_STEPS // 2)  # one outer step a lap
    a, b = torch.rand(2, 700, 700)
    products = comm.gather(round(COMPUTE_S / min(timeit.repeat(lambda: torch.mm(a, a, out=b), number=1, repeat=50))))[0]
    kinds = {
        lap: Checkpoints(worker, options.folder / lap, keep=1, asynchronous=lap == "asynchronous") for lap in LAPS[1:]
    }
    found: dict[str, list[Any]] = {lap: [] for lap in LAPS}
    for repeat in range(1 + options.repeats):
        for name in LAPS:
            checkpoints, writing = kinds.get(name), 0
            os.sync()
            start = meet(comm)
            if checkpoints:
                checkpoints.save()
            blocked = time.perf_counter() - start
            for step in range(LAP_STEPS):
                for _ in range(products):
                    torch.mm(a, a, out=b)
                worker.step()
                if checkpoints and not checkpoints.poll():
                    writing = step + 1
            if checkpoints:
                checkpoints.wait()
            turn = {"s": meet(comm) - start, "blocked_s": max(comm.gather(blocked)), "writing_steps": writing}
            found[name].append(turn)
            tell(comm, f"turn {repeat}: {name} {turn['s']:.2f} s, blocked {turn['blocked_s']:.3f} s")
    return {
        "bytes": sum(p.stat().st_size for p in (options.folder / "synchronous").rglob("*.h5")),
        "cores": len(os.sched_getaffinity(0)),
        "layout": kinds["synchronous"].store.layout,
        "first_s": found["asynchronous"][0]["blocked_s"],
        "turns": {k: v[1:] for k, v in found.items()},
    }


def tell(comm: Communicator, text: str) -> None:
    if comm.rank == 0:
        print(f"{comm.size} rank(s), {text}", file=sys.stderr, flush=True)


def work(options: argparse.Namespace) -> None:
    """One rank of one measurement."""
    comm = Communicator()
    found = {"rates": rates, "stall": stall}[options.worker](comm, options)
    if comm.rank == 0:
        (options.folder / "found.json").write_text(json.dumps(found))


# ---- starting them, and the report ----
def measure(what: str, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement on its ranks, in a folder of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder or options.out.parent) as folder:
        words = [f"--worker={what}", f"--folder={folder}"]
        words += [f"--parameters={options.parameters}", f"--repeats={options.repeats}"]
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        command = mpirun_command(ranks, [sys.executable, __file__, *words])
        environment = {**os.environ, **root, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=True)
        return json.loads((Path(folder) / "found.json").read_text())


def machine(folder: Path) -> str:
    """Hardware and versions, in words."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu, family = (next(x.split(":")[1].strip() for x in info if x.startswith(k)) for k in ("model name", "cpu family"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    disk, kind = said("df", "--output=source,fstype", str(folder)).splitlines()[-1].split()
    h5py = hdf5.load()
    return (
        f"{os.cpu_count()} cores ({cpu}, family {family}), {memory:.0f} GB of memory, {kind} on {disk}; Linux "
        f"{platform.release()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{mpirun_version(find_mpirun())}, mpi4py {importlib.metadata.version('mpi4py')},\nh5py {h5py.__version__}, "
        f"HDF5 {h5py.version.hdf5_version}; slowmo-mpi at {said('git', 'describe', '--always', '--dirty')}, "
        f"{time.strftime('%Y-%m-%d')}. One thread per rank."
    )


def said(*words: str) -> str:
    return subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def spread(values: list[float], form: str = ",.0f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(head: str, lines: list[list[str]]) -> str:
    """In Markdown. head: the columns' names, with | between."""
    rule = "|".join("---" for _ in head.split("|"))
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def ratios(turns: dict[str, Any], name: str, other: str, of: Callable[[dict[str, Any]], float]) -> list[float]:
    """Turn by turn, `of` the one over `of` the other."""
    return [of(a) / of(b) for a, b in zip(turns[name], turns[other], strict=True)]


def rate(turn: dict[str, Any]) -> float:
    """MB/s."""
    return turn["bytes"] / turn["s"] / 1e6


def held(turn: dict[str, Any]) -> float:
    """How long training was blocked in save(), ms."""
    return 1e3 * turn["blocked_s"]


def rates_text(ranks: str, found: dict[str, Any]) -> str:
    turns, writing, parts, loading = found["turns"], [], [], []
    for name, label in WRITERS.items():
        against = [spread(ratios(turns, name, raw, rate), ".2f") for raw in ("dd", "dds")]
        files = [f"{turns[name][0]['bytes'] / 1e6:,.1f}", str(turns[name][0]["files"])]
        writing.append([label, spread([rate(x) for x in turns[name]]), *against, *files])
    names = list(dict.fromkeys(part for name in OURS for x in turns[name] for part in x["parts"]))
    for name in OURS:
        middle = [statistics.median(x["parts"].get(part, 0.0) for x in turns[name]) for part in names]
        every = [1e3 * x["s"] for x in turns[name]]
        parts.append([WRITERS[name], spread(every), *(f"{1e3 * s:.0f}" for s in middle)])
        steps = [[x["load"][step] for x in turns[name]] for step in ("open", "prove", "load")]
        steps.append([sum(x["load"].values()) for x in turns[name]])
        loading.append([WRITERS[name], *(spread(step, ".2f") for step in steps)])
    return "\n".join([
        f"### {ranks} ranks: {found['bytes'] / 1e6:,.1f} MB of tensors; cores that a rank may use: {found['cores']}\n",
        table("writer | MB/s | of one `dd` | of a `dd` per rank | MB | files", writing),
        "Where rank 0's time goes in ours, ms:\n", table(f"writer | all | {' | '.join(names)}", parts),
        "Loading, s; at first nothing of the files is in the page cache (a virtual machine's host may have them):\n",
        table("written as | open, prove the structure | prove the data | load into the worker | all", loading),
    ])  # fmt: skip


def stall_text(found: list[dict[str, Any]]) -> str:
    blocked, laps = [], []
    for case in found:
        turns = case["turns"]
        none, sync, late = (turns[lap] for lap in LAPS)
        who = f"{case['ranks']}, {case['cores']}"
        part = spread(ratios(turns, "asynchronous", "synchronous", held), ".1%")
        each = [spread([held(x) for x in sync]), spread([held(x) for x in late]), f"{1e3 * case['first_s']:,.0f}"]
        blocked.append([who, f"{case['bytes'] / 1e6:,.0f}", *each, part])
        extra = [spread([1e3 * (x["s"] - n["s"]) for x, n in zip(v, none, strict=True)]) for v in (sync, late)]
        steps = spread([float(x["writing_steps"]) for x in late])
        laps.append([who, spread([1e3 * x["s"] for x in none]), *extra, steps])
    return "\n".join([
        "Blocked in `save`, ms:\n",
        table("ranks, cores each | MB | synchronous | asynchronous | the first | of the synchronous", blocked),
        "The whole lap, ms:\n",
        table("ranks, cores each | no checkpoint | synchronous: more | asynchronous: more | steps meanwhile", laps),
        f"A lap is {LAP_STEPS} steps, each of {COMPUTE_S:g} s of matrix products, SGD's step and the exchange; one of\n"
        "them is an outer step. Laps without a checkpoint, with a synchronous and with an asynchronous one at their\n"
        "start take turns. Blocked: from calling `save` to its return, on the slowest rank. The first asynchronous\n"
        "save allocates the memory that it copies to, too; the medians are without it. More: the lap until its\n"
        "checkpoint is on the disk, less that turn's lap without one. Steps meanwhile: after so many the file was not\n"
        f"yet written ({LAP_STEPS}: the lap's end waited for it). Each save deletes the file before (keep = 1).\n"
        f"Layout: {found[0]['layout']}.\n",
    ])  # fmt: skip


def targets_text(found: dict[str, Any]) -> str:
    lines = []
    for ranks, case in found["rates"].items():
        for raw in ("dd", "dds"):
            ratio = statistics.median(ratios(case["turns"], "parallel", raw, rate))
            what = f"rate of one file, of {WRITERS[raw]}: {ranks} ranks"
            lines.append([what, f">= {RATE_TARGET}", f"{ratio:.2f}", "met" if ratio >= RATE_TARGET else "missed"])
    for case in found["stall"]:
        part = statistics.median(ratios(case["turns"], "asynchronous", "synchronous", held))
        what = f"blocked, of the synchronous write: {case['ranks']} rank(s) that may use {case['cores']} core(s) each"
        lines.append([what, f"< {STALL_TARGET:.0%}", f"{part:.1%}", "met" if part < STALL_TARGET else "missed"])
    return table("what | target | found | ", lines)


def markdown(found: dict[str, Any], options: argparse.Namespace) -> str:
    words = f"--ranks {' '.join(map(str, options.ranks))} --repeats {options.repeats}"
    words += f" --parameters {options.parameters:g} --out {os.path.relpath(options.out, HERE.parent)}"
    return "\n".join([
        "# Checkpoints: rate of writing, time that training is held up, time to load\n",
        f"    python benchmarks/checkpoint.py {words}\n",
        f"{found['machine']} All of it took {found['s']:.0f} s.\n",
        f"The state: SlowMo over SGP, SGD with momentum, {options.parameters:,.0f} float32 parameters in tensors as\n"
        "ResNet-50's 161, in mid-round. z and momentum of every rank are written, anchor and slow momentum once.\n",
        "## Targets\n", targets_text(found),
        "## Writing and loading\n", *(rates_text(*case) for case in found["rates"].items()), NOTES,
        "## Training meanwhile\n", stall_text(found["stall"]),
        "What is not claimed: anything about other disks, network file systems, several machines or GPUs.\n",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="for the rates")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parameters", type=float, default=25.6e6)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; default: beside the results")
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), default=HERE / "checkpoint")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # what we measure as one of the ranks
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    start = time.perf_counter()
    found: dict[str, Any] = {"machine": machine(options.folder or options.out.parent)}
    found["rates"] = {str(n): measure("rates", n, options) for n in options.ranks}
    found["stall"] = [{"ranks": n} | measure("stall", n, options) for n in STALLS]
    found["s"] = time.perf_counter() - start
    report = markdown(found, options)
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
