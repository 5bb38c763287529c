"""Where the ranks are: hosts, cores, GPUs; hosts that look the same are one line."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..comm import Communicator
from ..comm.placement import count, fold, hosts, numbers, ranges, who
from .checks import Finding, conclude

CPUS = Path("/sys/devices/system/node")
BUS = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class Seat:
    """What only the rank itself can say. numa: nodes of its cores; threads: OMP_NUM_THREADS, 0 where it is not set."""

    numa: str = ""
    threads: int = 0
    gpu: str = ""
    bus: str = ""
    gpu_numa: int = -1
    cpus: int = 1


def ranks(comm: Communicator) -> Finding:
    """The table of all ranks, and what is strange about it."""
    seats = comm.gather(_seat(comm))
    places = comm.places
    warnings = list(comm.warnings)
    taking_turns = [h[0].host for h in hosts(places) if len(h) > seats[h[0].rank].cpus]
    if taking_turns:
        warnings.append(f"more ranks than cores on {fold(taking_turns)}, so they take turns")
    crowded = [p for p in places if seats[p.rank].threads > len(numbers(p.cores))]
    if crowded:
        threads, cores = seats[crowded[0].rank].threads, len(numbers(crowded[0].cores))
        warnings.append(f"{who(crowded)}: OMP_NUM_THREADS is {threads}, and there are {count(cores, 'core')}")
    far = [p for p in places if seats[p.rank].gpu_numa >= 0 and not _near(seats[p.rank])]
    if far:
        seat = seats[far[0].rank]
        warnings.append(f"{who(far)}: cores of NUMA node {seat.numa}, but a GPU of node {seat.gpu_numa}")
    claims = sorted({p.claim.launcher if p.claim else "no launcher" for p in places})
    renumbered = [p for p in places if p.claim and p.claim.rank != p.rank]
    if renumbered:
        warnings.append(f"{', '.join(claims)} numbers ranks otherwise than MPI, whose numbers count: {who(renumbered)}")
    found = f"{count(comm.size, 'rank')} on {_hosts(comm)}, started by {', '.join(claims)}"
    data = [
        {**asdict(p), "claim": asdict(p.claim) if p.claim else None, **asdict(seats[p.rank])} for p in places
    ]  # fmt: skip
    return conclude(found, (), warnings, _table(comm, seats), data)


def _hosts(comm: Communicator) -> str:
    number = len({p.leader for p in comm.places})
    return f"{count(number, 'host')}, {fold(dict.fromkeys(p.host for p in comm.places))}"


def _near(seat: Seat) -> bool:
    return not seat.numa or seat.gpu_numa in numbers(seat.numa)


def _seat(comm: Communicator) -> Seat:
    mine = os.sched_getaffinity(0)
    nodes = {
        int(folder.name.removeprefix("node")): (folder / "cpulist").read_text().strip()
        for folder in CPUS.glob("node[0-9]*")
    }
    numa = ranges(node for node, cores in nodes.items() if mine & set(numbers(cores)))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    seat = {"numa": numa, "threads": int(threads) if threads.isdigit() else 0, "cpus": os.cpu_count() or 1}
    if comm.device.type != "cuda":
        return Seat(**seat)  # type: ignore[arg-type]
    about = torch.cuda.get_device_properties(comm.device)
    domain, bus, device = (getattr(about, f"pci_{part}_id", -1) for part in ("domain", "bus", "device"))
    address = f"{domain:04x}:{bus:02x}:{device:02x}.0" if bus >= 0 else ""
    file = BUS / address / "numa_node"
    gpu_numa = int(file.read_text()) if address and file.exists() else -1
    return Seat(**seat, gpu=about.name, bus=address, gpu_numa=gpu_numa)  # type: ignore[arg-type]


def _table(comm: Communicator, seats: list[Seat]) -> list[str]:
    """A line per kind of rank; hosts with the same kinds together."""
    kinds: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for host in hosts(comm.places):
        rows: dict[str, list[int]] = {}
        for place in host:
            seat = seats[place.rank]
            where = f"{seat.gpu} at {seat.bus}" if seat.gpu else "CPU"
            text = f"{where}, core{'s' if len(numbers(place.cores)) > 1 else ''} {place.cores}"
            text += f", NUMA {seat.numa}" if seat.numa else ""
            text += f", {count(seat.threads, 'thread')}" if seat.threads else ""
            rows.setdefault(text, []).append(place.local_rank)
        layout = tuple((ranges(local), text) for text, local in rows.items())
        kinds.setdefault(layout, []).append(host[0].leader)
    lines = []
    for layout, leaders in kinds.items():
        here = [p for p in comm.places if p.leader in leaders]
        names = fold(dict.fromkeys(p.host for p in here))
        for local, text in layout:
            of = [p.rank for p in here if p.local_rank in numbers(local)]
            each = f", {len(numbers(local))} each" if len(leaders) > 1 and len(of) > len(leaders) else ""
            lines.append(f"rank{'s' if len(of) > 1 else ''} {ranges(of)} on {names}{each}: {text}")
    return lines
