"""How much of a gossip exchange hides behind the gradient, by who makes the messages progress."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ..bases import OSGP, SGP
from ..comm import Endpoint
from ..comm.progress import Hooks, Thread
from ..errors import UsageError
from .common import Bench, Sample
from .report import OK, Column, Report, report, spread
from .training import Training

ABOUT = (
    "time of a step; computation: forward, backward and optimizer, nothing communicated; exchange: one of the model",
    "+ hooks, + thread: the computation with those who poll, and nothing under way",
    "sgp: the exchange waited for; osgp: beside the gradient, moved on by nobody, by hooks, or by a thread",
    "hidden: (computation + exchange - step) / min(computation, exchange)",
    "polls: per step, during forward and backward; gaps: between them as long as the message is under way",
)
WAYS = ("nobody", "hooks", "thread")


class _Polls:
    """Stands in for `comm.poll` inside `with`: lets those of one kind poll, and notes the gaps between their polls."""

    def __init__(self, comm: Endpoint, way: str):
        self._comm, self._way, self._poll = comm, way, comm.poll
        self.gaps_s: list[float] = []
        self.polls = self.steps = 0
        self._last_s = 0.0

    def __call__(self) -> None:
        kind = "thread" if threading.current_thread().name == "progress" else "hooks"
        if kind == self._way and self._comm.busy:
            self._note()
            self.polls += 1
            self._poll()

    def __enter__(self) -> None:
        self.steps += 1
        self._last_s = time.perf_counter()
        vars(self._comm)["poll"] = self

    def __exit__(self, *_: object) -> None:
        del vars(self._comm)["poll"]
        if self._comm.busy:
            self._note()

    def _note(self) -> None:
        now = time.perf_counter()
        self.gaps_s.append(now - self._last_s)
        self._last_s = now

    def merged(self) -> dict[str, float | None]:
        """Over all ranks: polls per step, the median gap and the longest. Collective."""
        median = statistics.median(self.gaps_s) if self.gaps_s else 0.0
        everybody = self._comm.gather((self.polls / max(1, self.steps), median, max(self.gaps_s, default=0.0)))
        polls, medians, longest = zip(*everybody, strict=True)
        return {
            "polls_per_step": statistics.fmean(polls),
            "gap_median_s": statistics.median(medians) if any(polls) else None,
            "gap_max_s": max(longest) if any(polls) else None,
        }


def measure(bench: Bench, model: str, parameters: int, batch: int, image: int, graph: str, steps: int) -> Report:
    """A row per variant. Raises: UsageError on one rank."""
    comm = bench.comm
    if comm.size < 2:
        raise UsageError("An exchange needs 2 ranks, and there is 1.", "Type `slowmo bench overlap -n 2`.")
    if not comm.allows_threads:
        bench.tell("this MPI allows no thread to poll; what needs one is left out")
    ways = [way for way in WAYS if way != "thread" or comm.allows_threads]

    def training(base: SGP | None = None) -> Training:
        settings: dict[str, Any] = {"tau": 0, "progress": "hooks"} if base else {}
        return Training(bench, (model, parameters), batch, image, base, **settings)

    bench.tell(f"overlap, {model}: making the models")
    alone = {"computation": training(), "computation + hooks": training()}
    if "thread" in ways:
        alone["computation + thread"] = training()
    Hooks(alone["computation + hooks"].model, comm)
    sgp = training(SGP(graph))
    osgp = {f"osgp, {way}": training(OSGP(graph)) for way in ways}  # type: ignore[arg-type]
    polls = {f"osgp, {way}": _Polls(comm, way) for way in ways}

    def block(name: str, trained: Training) -> Callable[[], Sample]:
        def run() -> Sample:
            with _Polling(comm) if "thread" in name else nullcontext():
                return trained.block(steps, lambda: polls.get(name, nullcontext()))

        run()  # warms it up
        return run

    trained = {**alone, "sgp": sgp, **osgp}
    variants = {name: block(name, t) for name, t in trained.items()}
    variants = {"exchange": _exchanges(bench, sgp, steps), **variants}
    for p in polls.values():
        p.gaps_s.clear()
        p.polls = p.steps = 0
    bench.tell(f"overlap, {model}: measuring")
    taken = bench.alternate(variants)
    on_cpu = comm.device.type == "cpu"  # a GPU's sums differ from run to run
    ok = {"exchange": True}
    for group in (alone, {"sgp": sgp}, osgp):
        alike = not on_cpu or bench.all(len({t.fingerprint() for t in group.values()}) == 1)
        ok |= {name: t.is_right(same=False) and alike for name, t in group.items()}

    computation_s, exchange_s = taken["computation"].median(), taken["exchange"].median()
    rows = []
    for name, t in taken.items():
        row: dict[str, Any] = {"what": name, **t.spread(), "ok": ok[name]}
        if name in alone and name != "computation":
            row["cost"] = t.median() / computation_s - 1
        if name == "sgp" or name in osgp:
            row["hidden"] = (computation_s + exchange_s - t.median()) / min(computation_s, exchange_s)
        rows.append(row | (polls[name].merged() if name in polls else {}))
    columns = [
        Column("what", "what"), *spread("ms", 1e3, ".2f"), Column("hidden", "hidden", ".1%"),
        Column("cost", "cost of polling", "+.1%"), Column("polls_per_step", "polls", ".1f"),
        Column("gap_median_s", "median gap ms", ".2f", 1e3), Column("gap_max_s", "longest gap ms", ".2f", 1e3), OK,
    ]  # fmt: skip
    z = sgp.worker.state.z if sgp.worker else []
    sent = sum(v.numel() * v.element_size() for v in z)
    about = [f"{model}, {sgp.parameters:,} parameters ({sent / 1e6:.1f} MB), batch {batch} a rank; {graph} graph; "
             f"blocks of {steps} steps", *ABOUT]  # fmt: skip
    return report(bench, "overlap", about, columns, rows)


class _Polling:
    """A progress thread for as long as `with` lasts; a worker's own lives on, and would disturb the other variants."""

    def __init__(self, comm: Endpoint):
        self._comm = comm

    def __enter__(self) -> None:
        self._thread = Thread(self._comm)

    def __exit__(self, *_: object) -> None:
        self._thread.close()


def _exchanges(bench: Bench, trained: Training, steps: int) -> Callable[[], Sample]:
    """Exchanges of as many bytes as the model has, one after the other, waited for."""
    comm, worker = bench.comm, trained.worker
    assert worker is not None and isinstance(worker.base, SGP)
    graph = worker.base.graph
    mine = worker.state.packet().bytes
    memory = [
        torch.empty_like(mine) for _ in range(max(len(graph.receives(k, comm.rank)) for k in range(graph.period)))
    ]

    def run() -> Sample:
        start = bench.now()
        for k in range(steps):
            to, sources = ([p for p, _ in edges(k, comm.rank)] for edges in (graph.sends, graph.receives))
            comm.exchange(mine, to, sources, memory[: len(sources)], "bench").wait()
        return {"s": (bench.now() - start) / steps}

    return run
