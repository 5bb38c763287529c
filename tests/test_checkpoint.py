"""Checkpoints: to go on is to go on bit for bit, on another number of ranks too as far as that can be; and faults.

Files that were damaged after they were written are in test_checkpoint_damage.py.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import real
from torch import nn
from worlds import Real, Simulated

from slowmo_mpi import DPSGD, OSGP, SGP, AllReduce, Checkpoints, Local, SlowMo, SlowmoError, simulate
from slowmo_mpi.bases import Base
from slowmo_mpi.checkpoint import files, hdf5, store, write
from slowmo_mpi.checkpoint.read import Checkpoint
from slowmo_mpi.comm import Endpoint

STEPS = 9
TAU = 4
POSITIONS = (4, 6)  # a round's boundary; in a round, where OSGP(delay=3) has a message of age 2 in flight
BASES = [AllReduce(), Local(), DPSGD(), SGP(), OSGP(), OSGP(delay=3)]
OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),  # has its state before the first step
    (torch.optim.Adafactor, {}),  # its states are rows and columns
]


def names(value: object) -> str | None:
    if isinstance(value, Base):
        return f"{type(value).__name__}{getattr(value, 'delay', '')}"
    if isinstance(value, tuple) and value and isinstance(value[0], type):
        return "-".join([value[0].__name__, *value[1]])
    return None


def layouts() -> list[str]:
    """Those that can be had on real ranks; CI must have both."""
    able = hdf5.writes_together()
    assert able or not os.environ.get("SLOWMO_CI"), "this h5py is serial; bin/setup builds one for parallel HDF5"
    return ["parallel", "shards"] if able else ["shards"]


@pytest.fixture(params=["parallel", "shards"])
def layout(request: pytest.FixtureRequest) -> str:
    """Each layout, for a test on real ranks."""
    if request.param not in layouts():
        pytest.skip("this h5py is serial")
    return request.param


class Net(nn.Module):
    """What real models have: batch-norm, dropout, channels-last, two dtypes; a frozen, a scalar, an idle parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.brief = nn.Linear(16, 5, dtype=torch.bfloat16)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.idle = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)
        x = self.brief(x.bfloat16()).float().tanh()
        return self.out(self.dropout(self.frozen(x))) * self.scale


class Run:
    """A loop as a user writes it: two groups with rates of their own, a schedule, all three random streams."""

    def __init__(self, comm: Endpoint, base: Base, slow: dict, kind: Any = torch.optim.SGD, arguments: Any = None,
                 seed: int = 0):  # fmt: skip
        torch.manual_seed(100 * seed + comm.rank)
        model = Net()
        first = [*model.conv.parameters(), *model.norm.parameters()]
        rest = [p for p in model.parameters() if all(p is not q for q in first)]
        arguments = {"momentum": 0.9} if arguments is None else arguments
        self.optimizer = kind([{"params": first, "lr": 0.02}, {"params": rest}], lr=0.01, **arguments)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.7)
        self.worker = SlowMo(model, self.optimizer, comm, base, **slow)
        torch.manual_seed(100 * seed + 50 + comm.rank)
        self.processes = hasattr(comm, "mpi")  # simulated ranks have numpy's and Python's streams in common
        if self.processes:
            np.random.seed(100 * seed + comm.rank)
            random.seed(100 * seed + comm.rank)

    def train(self, until: int) -> Run:
        for k in range(self.worker.state.step, until):
            x = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1000 * k + self.worker.comm.rank))
            if self.processes:
                x += np.random.rand() + random.random()
            self.optimizer.zero_grad()
            self.worker.model(x).square().mean().backward()
            self.worker.step()
            self.schedule.step()
        return self

    def extra(self) -> dict:
        return {"schedule": self.schedule.state_dict()}

    def load(self, path: Path) -> Run:
        self.schedule.load_state_dict(self.worker.load(path)["schedule"])
        return self

    def end(self) -> dict[str, Any]:
        """Everything at the end, and what the random streams would give next."""
        draws = torch.rand(4)
        others = (np.random.rand(), random.random()) if self.processes else ()
        return snapshot(self.worker) | {"draws": bits(draws), "other draws": others}


def bits(value: Any) -> Any:
    """A tensor as its type, shape and bytes, so that NaN is NaN and -0 is not 0."""
    if not isinstance(value, torch.Tensor):
        return value
    return (
        str(value.dtype),
        tuple(value.shape),
        value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes(),
    )


def snapshot(worker: SlowMo) -> dict[str, Any]:
    """All that moves the trajectory, by name."""
    s = worker.state
    numbers = ("step", "round", "phase", "begun", "w", "rate_sums", "last_rates", "peak_rates")
    found: dict[str, Any] = {n: copy.copy(getattr(s, n)) for n in numbers}
    found |= {f"z {i}": bits(z) for i, z in enumerate(s.z)}
    found |= {f"anchor {i}": bits(x.x0) for i, x in enumerate(s.slow)} | {
        f"u {i}": bits(x.u) for i, x in enumerate(s.slow)
    }
    if s.late is not None:
        found |= {"late rates": s.late.rates} | {f"late {i}": bits(mean) for i, mean in enumerate(s.late.wait())}
    found |= {f"{kind} {name}": bits(e) for kind, errors in s.errors.items() for name, e in errors.items()}
    flight = s.in_flight
    found["flight"] = flight and (flight.phase, flight.age, flight.sent, bits(flight.packet.bytes))
    for name, p in worker.model.named_parameters():
        found[f"model {name}"] = (bits(p), p.stride())
        for key, value in worker.optimizer.state.get(p, {}).items():
            found[f"optimizer {name} {key}"] = bits(value)
    found |= {f"model {name}": bits(b) for name, b in worker.model.named_buffers()}
    for i, group in enumerate(worker.optimizer.param_groups):
        found |= {f"group {i} {k}": v for k, v in group.items() if k != "params"}
    return found


def differ(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what is not the same, or not in both."""
    return sorted(n for n in a.keys() | b.keys() if n not in a or n not in b or a[n] != b[n])


# ---- going on bit for bit ----
def cases(base: Base) -> list[dict]:
    """Settings of SlowMo that fit the base: all of buffers x sharded, and without slow state, and without average."""
    found: list[dict] = [
        {"tau": TAU, "buffers": buffers, "sharded": sharded}
        for buffers, sharded in itertools.product(("reset", "maintain", "average"), (False, True))
    ]
    found += [{"tau": TAU, "wire": torch.bfloat16}, {"tau": TAU, "average": "delayed", "beta": 0.3}]
    if base.communicates:
        found += [{"tau": 0, "wire": torch.float16}, {"tau": TAU, "average": "none", "buffers": "maintain"}]
        found += [{"tau": 0}]
    more = ({}, {"gamma": "last", "alpha": 0.7}, {"beta": 0.0}, {"alpha": 1.1, "beta": 0.8})
    return [more[i % len(more)] | s for i, s in enumerate(found)]


def goes_on(comm: Endpoint, folder: str, kinds: list[str], base: Base, kind, arguments: dict, settings: list[dict]):
    """Per setting and position: what differs between a run that was never interrupted and one that was resumed."""
    told = []
    for i, slow in enumerate(settings):
        here = Path(folder) / str(i)
        run = Run(comm, base, slow, kind, arguments)
        layout, late = kinds[i % len(kinds)], bool(i // 2 % 2)
        checkpoints = Checkpoints(run.worker, here, keep=9, layout=layout, asynchronous=late)
        ages = []
        for at in POSITIONS:
            checkpoints.save(run.train(at).extra())
            ages.append(run.worker.state.in_flight.age if run.worker.state.in_flight else 0)
        assert max(ages) > 0 or base != OSGP(delay=3)
        whole = run.train(STEPS).end()
        checkpoints.wait()
        if not i and kind is torch.optim.SGD:  # to save is to change nothing
            told.append((slow, "unsaved", differ(whole, Run(comm, base, slow, kind, arguments).train(STEPS).end())))
        for at in POSITIONS:
            other = Run(comm, base, slow, kind, arguments, seed=7)
            strange = differ(snapshot(other.worker), whole)
            assert {"z 0", "z 1", "model norm.running_mean", "model frozen.weight"} <= set(strange), strange
            resumed = other.load(here / f"step-{at:08}.h5").train(STEPS).end()
            told.append((slow | {"layout": layout}, at, differ(whole, resumed)))
    return told


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=names)
@pytest.mark.parametrize("base", BASES, ids=names)
@pytest.mark.parametrize("world", ["mpi-2", "mpi-4", "simulated-3"], indirect=True)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    world: Real | Simulated, base: Base, optimizer: tuple, tmp_path: Path
) -> None:
    """On two ranks every other setting, with the next optimizer the rest; elsewhere each optimizer has one."""
    place = OPTIMIZERS.index(optimizer) + BASES.index(base)
    settings = cases(base)[place % 2 :: 2] if world.ranks == 2 else [cases(base)[place % len(cases(base))]]
    kinds = layouts() if isinstance(world, Real) else ["auto"]
    kinds = kinds[place % len(kinds) :] + kinds[: place % len(kinds)]
    for rank, told in enumerate(world.run(goes_on, str(tmp_path), kinds, base, *optimizer, settings)):
        assert len(told) == 2 * len(settings) + (optimizer[0] is torch.optim.SGD)
        for slow, at, different in told:
            assert not different, f"rank {rank}, {slow}, from step {at}: {different}"


def goes_back(comm: Endpoint, base: Base, settings: list[dict]):
    """The same with `state_dict`: what differs in a new worker, and in the old one, which goes back in time."""
    told = []
    for slow, at in itertools.product(settings, POSITIONS):
        run = Run(comm, base, slow).train(at)
        tree, schedule = copy.deepcopy(run.worker.state_dict()), copy.deepcopy(run.schedule.state_dict())
        whole = run.train(STEPS).end()
        for other in (Run(comm, base, slow, seed=7).train(3), run):  # both have messages in flight by now
            other.worker.load_state_dict(tree)
            other.schedule.load_state_dict(schedule)
            told.append((slow, at, other is run, differ(whole, other.train(STEPS).end())))
    return told


@pytest.mark.parametrize("base", BASES, ids=names)
@pytest.mark.parametrize("world", ["mpi-2", "mpi-3", "simulated-1", "simulated-4"], indirect=True)
def test_a_state_dict_goes_into_a_new_worker_and_back_into_the_old_one(world: Real | Simulated, base: Base) -> None:
    for rank, told in enumerate(world.run(goes_back, base, cases(base)[1::2] + cases(base)[:1])):
        assert len(told) == 4 * (len(cases(base)) // 2 + 1)
        for slow, at, same, different in told:
            assert not different, f"rank {rank}, {slow}, from step {at}, the same worker: {same}: {different}"


# ---- another number of ranks ----
def leg(comm: Endpoint, folder: str, base: Base, slow: dict, until: int, layout: str) -> dict[str, Any]:
    """Go on from the newest of the folder, if there is one, until a step, and save there."""
    run = Run(comm, base, slow, torch.optim.AdamW, {"amsgrad": True}, seed=until)
    checkpoints = Checkpoints(run.worker, folder, keep=99, layout=layout)
    told: dict[str, Any] = {"extra": None, "rng": bits(torch.get_rng_state())}
    if list(Path(folder).glob("step-*.h5")):
        extra = checkpoints.load()
        run.schedule.load_state_dict(extra["schedule"])
        told |= {"extra": extra["of"], "rng kept": bits(torch.get_rng_state()) == told["rng"]}
    told["at start"] = state(run.worker)
    run.train(until)
    told["at end"] = state(run.worker)
    with run.worker.averaged():
        told["average"] = [z.clone() for z in run.worker.state.z]
    checkpoints.save(run.extra() | {"of": [comm.rank, comm.size]})
    checkpoints.wait()
    return told


def state(worker: SlowMo) -> dict[str, Any]:
    """Copies of what an elastic resume is about."""
    s = worker.state
    parameters = dict(worker.model.named_parameters())
    w = s.w + (s.in_flight.sent if s.in_flight else 0.0)
    return {
        "at": (s.step, s.round), "w": w, "z": [z.clone() for z in s.z],
        "anchor": [x.x0.clone() for x in s.slow], "u": [x.u.clone() for x in s.slow],
        "rates": (s.rate_sums, s.peak_rates, [g["lr"] for g in worker.optimizer.param_groups]),
        "optimizer": {
            f"{n} {k}": v.clone() for n, p in parameters.items() for k, v in worker.optimizer.state.get(p, {}).items()
        },
        "statistics": {n: b.clone() for n, b in worker.model.named_buffers()},
        "frozen": bits(worker.model.frozen.weight),
    }  # fmt: skip


def raw(path: Path, name: str) -> list[torch.Tensor]:
    """The vectors of a group of datasets as they lie in the file, by type: bfloat16 first."""
    with Checkpoint(path) as checkpoint:
        return [checkpoint.vector(n, 0) for n in sorted(checkpoint.datasets) if n.split("/")[0] == name]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("base", [AllReduce(), DPSGD(), OSGP(delay=3)], ids=names)
def test_the_number_of_ranks_may_change_at_a_rounds_boundary(
    real_worlds: dict[int, Real], base: Base, sharded: bool, tmp_path: Path
) -> None:
    """4, 2, 3, 1 and 4 ranks: all go on from the saved anchor and slow momentum, and from the optimizers' mean."""
    slow = {"tau": TAU, "buffers": "maintain", "sharded": sharded}
    kinds = itertools.cycle(layouts())
    before: list[dict[str, Any]] = []
    for i, ranks in enumerate((4, 2, 3, 1, 4)):
        world = real(real_worlds, ranks) if ranks > 1 else Simulated(1)
        layout = next(kinds) if ranks > 1 else "auto"
        got = world.run(leg, str(tmp_path), base, slow, TAU * (i + 1), layout)
        if before:
            path = tmp_path / f"step-{TAU * i:08}.h5"
            anchor, u = raw(path, "anchor"), raw(path, "u")
            starts = [g["at start"] for g in got]
            assert u[1].abs().max() > 0
            for j in range(2):
                for slot, saved in (("anchor", anchor), ("u", u)):
                    shares = [s[slot][j] for s in starts]
                    for found in [torch.cat(shares)] if sharded else shares:
                        assert torch.equal(found, saved[j])
                for s in starts:
                    assert torch.equal(s["z"][j], anchor[j].to(s["z"][j].dtype))
            for rank, (g, s) in enumerate(zip(got, starts, strict=True)):
                assert s["at"] == (TAU * i, i) and s["w"] == 1
                assert s["rates"] == before[0]["at end"]["rates"] == before[-1]["at end"]["rates"]
                assert g["extra"] == [rank % len(before), len(before)]
                assert g["rng kept"] or ranks == len(before)
                for slot in ("optimizer", "statistics"):
                    old = [b["at end"][slot] for b in before]
                    assert s[slot].keys() == old[0].keys() and s[slot]
                    for name, value in s[slot].items():
                        mean = torch.stack([o[name].double() for o in old]).mean(0).to(value.dtype)
                        torch.testing.assert_close(value, mean, rtol=1e-2 if value.dtype == torch.bfloat16 else 3e-7,
                                                   atol=0)  # fmt: skip
                        assert torch.equal(value, starts[0][slot][name])
                assert s["frozen"] == before[0]["at end"]["frozen"]
        before = got


@pytest.mark.parametrize("world", ["mpi-3", "simulated-1"], indirect=True)
def test_another_number_of_ranks_in_the_middle_of_a_round_is_refused(
    world: Real | Simulated, real_worlds: dict[int, Real], tmp_path: Path
) -> None:
    slow = {"tau": TAU}
    real(real_worlds, 2).run(leg, str(tmp_path), SGP(), slow, TAU + 2, "auto")
    for message in world.run(message_of, leg, str(tmp_path), SGP(), slow, 2 * TAU, "auto"):
        assert "in the middle of a round" in message and "written by 2 ranks" in message, message


def message_of(comm: Endpoint, program: Callable[..., Any], *args: Any) -> str:
    """The SlowmoError that a program ends with on this rank; "" where it does not."""
    try:
        program(comm, *args)
    except SlowmoError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("until", [1, 2, 6, 8])
@pytest.mark.parametrize("base", BASES[2:], ids=names)
@pytest.mark.parametrize("world", ["simulated-4"], indirect=True)
def test_without_rounds_other_ranks_go_on_from_the_average_messages_in_flight_included(
    world: Simulated, base: Base, until: int, tmp_path: Path
) -> None:
    """At steps 1 and 2 what OSGP(delay=3) has in flight is everybody's same initial z."""
    old = world.run(leg, str(tmp_path), base, {"tau": 0}, until, "auto")
    for got in simulate(3, leg, str(tmp_path), base, {"tau": 0}, until + 2, "auto"):
        start = got["at start"]
        assert start["at"] == (until, 0) and start["w"] == 1
        for z, average in zip(start["z"], old[0]["average"], strict=True):
            rough = 2**-7 if z.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(z, average, rtol=rough, atol=rough)
        assert any(not torch.equal(start["z"][1], o["at end"]["z"][1]) for o in old)


def alike(comm: Endpoint, folder: str, steps: int):
    """Every rank trains on the same data with OSGP(delay=3): z is the same everywhere, what is in flight is older."""
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, OSGP(delay=3), tau=0)
    if not steps:
        worker.load(folder)
        return worker.state.z[0].clone()
    for _ in range(steps):
        model.zero_grad()
        model(torch.arange(12.0).view(2, 6)).square().mean().backward()
        worker.step()
    worker.save(Path(folder) / "step-1.h5")
    with worker.averaged():
        return worker.state.z[0].clone()


def test_workers_that_are_alike_still_have_older_messages_in_flight(tmp_path: Path) -> None:
    (average, *_) = simulate(2, alike, str(tmp_path), 2)
    with Checkpoint(tmp_path / "step-1.h5") as checkpoint:
        assert len(checkpoint.datasets["z/float32"][1]) == 1
        assert not torch.allclose(checkpoint.vector("z/float32", 0), average)
    for z in simulate(3, alike, str(tmp_path), 0):
        torch.testing.assert_close(z, average)


# ---- what the user stores with it ----
def small(comm: Endpoint, seed: int = 0, width: int = 3, **slow: Any) -> SlowMo:
    """A worker of a few numbers, for tests of the file."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return SlowMo(model, optimizer, comm, SGP(), **({"tau": 4} | slow))


def train_small(worker: SlowMo, steps: int) -> SlowMo:
    """Each rank on data of its own."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(worker.state.step * 100 + worker.comm.rank)
        worker.optimizer.zero_grad()
        x = torch.randn(4, worker.model[0].in_features, generator=generator)
        worker.model(x).square().mean().backward()
        worker.step()
    return worker


def belongings(rank: int) -> dict[str, Any]:
    """One of everything that may be stored, other on every rank."""
    return {
        "nothing": None, "yes": True, "no": False, "whole": 2**70 + rank, "text": 'Ünï "quoted"\n\0/$', "empty": "",
        "numbers": [0.1 + rank, -0.0, math.inf, -math.inf, math.nan, 1e-320],
        "nested": {"tuple": (1, (2.5, [None, {"deep": ()}])), "list": [[], {}], "": "no name", "a/b": 1},
        "by number": {1: "one", (2, "x"): [2], None: 0, 2.5: 1.0}, "dollar": {"$tensor": 1, "$tuple": [2]},
        "bytes": bytes(range(256)), "no bytes": b"",
        "array": np.arange(6.0).reshape(2, 3).T + rank, "bits": np.array([True, False]), "0-d": np.array(3, np.int16),
        "unsigned": np.array([2**64 - 1 - rank], np.uint64), "no numbers": np.zeros((0, 2), np.float32),
        "scalars": [np.float64(0.1), np.float32(rank), np.int64(-5), np.bool_(True), np.uint8(200)],
        "tensors": {
            "empty": torch.zeros(3, 0), "0-d": torch.tensor(1.5 + rank), "bool": torch.tensor([[True], [False]]),
            "bfloat16": torch.randn(5).bfloat16(), "half": torch.tensor([math.nan, -0.0]).half(),
            "complex": torch.randn(2, 2, dtype=torch.complex64), "conjugate": torch.randn(3, dtype=torch.cfloat).conj(),
            "uint8": torch.arange(rank + 1, dtype=torch.uint8), "int64": torch.tensor([2**62 + rank]),
            "double": torch.randn(3, dtype=torch.float64), "transposed": torch.arange(6).view(2, 3).t(),
            "slice": torch.arange(10.0)[::3], "expanded": torch.ones(1).expand(4), "grown": nn.Parameter(torch.ones(2)),
            "uint16": torch.tensor([65535], dtype=torch.uint16), "float8": torch.ones(3).to(torch.float8_e4m3fn),
        },
    } | ({} if rank else {"rank 0's": [torch.ones(7, dtype=torch.int8)]})  # fmt: skip


def unlike(a: Any, b: Any, place: str = "") -> list[str]:
    """Places where two trees differ in type or bits."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and bits(a.resolve_conj()) == bits(b)
        return [] if same else [place]
    if type(a) is not type(b):
        return [f"{place}: {type(a)}, {type(b)}"]
    if isinstance(a, dict):
        found = [] if list(a) == list(b) and list(map(type, a)) == list(map(type, b)) else [f"{place}: {a} {b}"]
        return found + [x for k in a.keys() & b.keys() for x in unlike(a[k], b[k], f"{place}/{k}")]
    if isinstance(a, list | tuple):
        found = [] if len(a) == len(b) else [place]
        return found + [x for i, (c, d) in enumerate(zip(a, b, strict=False)) for x in unlike(c, d, f"{place}/{i}")]
    if isinstance(a, np.ndarray | np.generic):
        return [] if (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) else [place]
    return [] if repr(a) == repr(b) else [f"{place}: {a!r} {b!r}"]


def stores(comm: Endpoint, folder: str, kinds: list[str]) -> list[str]:
    """What of the belongings comes back otherwise, by each way of writing."""
    worker, mine = small(comm), belongings(comm.rank)
    found = []
    for kind, late in itertools.product(kinds, (False, True)):
        checkpoints = Checkpoints(worker, Path(folder) / f"{kind}{late}", layout=kind, asynchronous=late)
        path = checkpoints.save(mine)
        checkpoints.wait()
        for back in (checkpoints.load(), checkpoints.load(path), worker.load(str(path))):
            found += unlike(mine, back, f"{kind} {late}")
    worker.save(f"{folder}/whole.h5", extra=mine)
    found += unlike(mine, worker.load(f"{folder}/whole.h5"), "worker.save")
    worker.save(f"{folder}/none.h5")
    return found + unlike({}, worker.load(f"{folder}/none.h5"), "nothing")


@pytest.mark.parametrize("world", ["mpi-2", "simulated-3"], indirect=True)
def test_extra_comes_back_as_it_was(world: Real | Simulated, tmp_path: Path) -> None:
    kinds = layouts() if isinstance(world, Real) else ["auto"]
    assert world.run(stores, str(tmp_path), kinds) == [[]] * world.ranks


@pytest.mark.parametrize(
    "thing, words",
    [
        (object(), "type object (extra/deep/1/here)"), (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex128), "torch.complex128"), ({1, 2}, "type set"),
        (1j, "type complex"),
        (np.array(["text"]), "type ndarray"), (np.array([1j]), "type ndarray"),
        (np.array([1.0], ">f8"), "a numpy array of >f8"), (print, "type builtin_function"),
        (Path("x"), "type PosixPath"),
    ],
    ids=lambda x: x.split()[-1] if isinstance(x, str) else "",
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_by_its_place(thing: object, words: str, tmp_path: Path) -> None:
    def program(comm: Endpoint) -> list[str]:
        worker, extra = small(comm), {"deep": [1, {"here": thing}]}
        checkpoints = Checkpoints(worker, tmp_path)
        return [
            message_of(comm, lambda _: checkpoints.save(extra)),
            message_of(comm, lambda _: worker.save(tmp_path / "x.h5", extra)),
        ]

    for message in itertools.chain.from_iterable(simulate(2, program)):
        assert words in message and "(extra/deep/1/here)" in message, message
    assert not list(tmp_path.iterdir())


# ---- beside the training ----
@contextlib.contextmanager
def held_up() -> Iterator[tuple[threading.Event, list[str]]]:
    """While in the block, writing waits for the event; the list tells what is being written and what was."""
    go, told, real_write = threading.Event(), [], store.write

    def slowly(path: Path, *args: Any) -> None:
        told.append(f"begins {path.stem}")
        assert go.wait(60)
        real_write(path, *args)
        told.append(f"ends {path.stem}")

    store.write = slowly
    try:
        yield go, told
    finally:
        go.set()
        store.write = real_write


def trains_on(comm: Endpoint, folder: str, layout: str) -> dict[str, Any]:
    """Save at step 3 and train to the end while the writing is held up: what the file has of step 3, or not."""
    run = Run(comm, OSGP(delay=3), {"tau": TAU}, torch.optim.Adam, {}).train(3)
    checkpoints = Checkpoints(run.worker, folder, layout=layout)
    then, extra = snapshot(run.worker), {"changes": torch.ones(2), "list": [1]}
    with held_up() as (go, told):
        path = checkpoints.save(run.extra() | extra)
        run.train(STEPS)
        extra["changes"].zero_()
        extra["list"].append(2)
        busy, was_there, whole = not checkpoints.poll(), path.exists(), run.end()
        go.set()
        checkpoints.wait()
    other = Run(comm, OSGP(delay=3), {"tau": TAU}, torch.optim.Adam, {}, seed=3)
    back = other.worker.load(path)
    other.schedule.load_state_dict(back["schedule"])
    same = bits(back["changes"]) == bits(torch.ones(2)) and back["list"] == [1]
    different = differ(then, snapshot(other.worker)), differ(whole, other.train(STEPS).end())
    return {"told": told, "busy": busy, "was there": was_there, "extra": same, "differ": different}


@pytest.mark.parametrize("world", ["mpi-2", "mpi-4"], indirect=True)
def test_the_file_holds_the_state_at_the_call_whatever_is_done_while_it_is_written(
    world: Real, layout: str, tmp_path: Path
) -> None:
    wanted = ["begins step-00000003", "ends step-00000003"]
    for told in world.run(trains_on, str(tmp_path), layout):
        assert told == {"told": wanted, "busy": True, "was there": False, "extra": True, "differ": ([], [])}


def saves_twice(comm: Endpoint, folder: str) -> tuple[list[str], list[str], bool]:
    """What was written when the first save returned, when the second did, and whether that one is there at last."""
    worker = train_small(small(comm), 1)
    checkpoints = Checkpoints(worker, folder)
    with held_up() as (go, told):
        first = checkpoints.save()
        while not told:
            time.sleep(0.001)
        at_first = list(told)
        train_small(worker, 1)
        threading.Timer(0.3, go.set).start()
        second = checkpoints.save()
        at_second = [t for t in told if t.startswith("ends")] if first.exists() else []
        checkpoints.wait()
    return at_first, at_second, second.exists()


@pytest.mark.parametrize("world", ["mpi-2"], indirect=True)
def test_a_second_save_waits_for_the_first(world: Real, tmp_path: Path) -> None:
    for told in world.run(saves_twice, str(tmp_path)):
        assert told == (["begins step-00000001"], ["ends step-00000001"], True)


def fails_beside(comm: Endpoint, folder: str, how: str) -> tuple[str, int, str]:
    """The error of a save that cannot be done, as it is told by each call; training and later saves go on."""
    worker = train_small(small(comm), 1)
    checkpoints = Checkpoints(worker, Path(folder) / "file" / "below")
    checkpoints.save()
    train_small(worker, 2)

    def poll() -> None:
        while not checkpoints.poll():
            time.sleep(0.001)

    ask = {"wait": checkpoints.wait, "poll": poll, "save": checkpoints.save}[how]
    message = message_of(comm, lambda _: ask())
    checkpoints.folder = Path(folder) / how
    path = checkpoints.save()
    checkpoints.wait()
    with Checkpoint(path) as checkpoint:
        checkpoint.prove()
    return message, worker.state.step, message_of(comm, lambda _: checkpoints.wait())


@pytest.mark.parametrize("world", ["mpi-3"], indirect=True)
def test_what_goes_wrong_beside_the_training_is_told_on_all_ranks_by_the_next_call(world: Real, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for how in ("wait", "poll", "save"):
        got = world.run(fails_beside, str(tmp_path), how)
        assert got == [got[0]] * 3
        message, step, after = got[0]
        assert "cannot be written: Not a directory" in message and str(tmp_path / "file") in message
        assert step == 3 and not after


# ---- the folder ----
def keeps(comm: Endpoint, folder: str, keep: int, keep_every: int, kind: str) -> list[list[str]]:
    """The names in the folder after each of 7 saves."""
    worker = small(comm)
    checkpoints = Checkpoints(worker, folder, keep=keep, keep_every=keep_every, layout=kind, asynchronous=False)
    seen = []
    for _ in range(7):
        checkpoints.save()
        checkpoints.wait()
        train_small(worker, 1)
        comm.barrier()
        seen.append(sorted(p.name for p in Path(folder).iterdir()))
        comm.barrier()
    return seen


@pytest.mark.parametrize(
    "keep, keep_every, wanted",
    [
        (1, 0, [{k} for k in range(7)]),
        (2, 0, [{0}, {0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}, {5, 6}]),
        (1, 3, [{0}, {0, 1}, {0, 2}, {0, 3}, {0, 3, 4}, {0, 3, 5}, {0, 3, 6}]),
        (9, 1, [set(range(k + 1)) for k in range(7)]),
    ],
)
@pytest.mark.parametrize("world", ["simulated-2", "mpi-2"], indirect=True)
def test_keep_and_keep_every_say_which_stay(world, keep: int, keep_every: int, wanted: list, tmp_path: Path) -> None:
    for kind in layouts() if isinstance(world, Real) else ["auto"]:
        folder = tmp_path / kind
        for steps, found in zip(wanted, world.run(keeps, str(folder), keep, keep_every, kind)[0], strict=True):
            whole = [name for name in found if name.endswith(".h5")]
            assert whole == [f"step-{k:08}.h5" for k in sorted(steps)]
            shards = [name.partition(".shards-")[0] for name in found if name not in whole]
            assert shards == ([] if kind == "parallel" else [f"step-{k:08}" for k in sorted(steps)])


def test_what_a_killed_writer_left_is_removed_and_what_others_put_there_is_not(tmp_path: Path) -> None:
    """Also a checkpoint that `save` put under a name of its own, beside a former one of the same stem."""

    def begins(comm: Endpoint) -> None:
        worker = train_small(small(comm), 1)
        checkpoints = Checkpoints(worker, tmp_path)
        checkpoints.save()
        worker.save(tmp_path / "mine.h5")
        worker.save(tmp_path / "mine.ckpt")

    simulate(2, begins)
    others = {"notes.part", "film.shards-1", "best.h5", "model.pt", "step-best.txt", "step-00000009.h5.mine"}
    for name in others:
        (tmp_path / name).write_text("dear")
    before = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    (tmp_path / "step-00000007.h5.part").write_bytes(b"half")
    orphan = tmp_path / "step-00000007.shards-0badc0de"
    orphan.mkdir()
    (orphan / "rank-00000.h5").write_bytes(b"half")

    def goes_on(comm: Endpoint) -> tuple[int, ...]:
        worker = small(comm)
        checkpoints = Checkpoints(worker, tmp_path)
        after = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
        checkpoints.load()
        for name in ("mine.h5", "mine.ckpt"):
            worker.load(tmp_path / name)
        return after ^ before, worker.state.step

    assert simulate(2, goes_on) == [(set(), 1)] * 2


def test_a_copy_under_a_name_without_a_step_stays(tmp_path: Path) -> None:
    def program(comm: Endpoint) -> None:
        worker = small(comm)
        checkpoints = Checkpoints(worker, tmp_path, keep=1)
        path = checkpoints.save()
        if comm.rank == 0:
            shutil.copy(path, tmp_path / "step-best.h5")
        train_small(worker, 1)
        checkpoints.save()

    simulate(2, program)
    assert sorted(p.name for p in tmp_path.glob("*.h5")) == ["step-00000001.h5", "step-best.h5"]


def test_who_goes_back_in_time_goes_on_from_there_and_not_from_what_was_later(tmp_path: Path) -> None:
    def program(comm: Endpoint) -> int:
        worker = small(comm)
        checkpoints = Checkpoints(worker, tmp_path, keep=2, keep_every=2)
        for _ in range(3):
            train_small(worker, 2)
            checkpoints.save()
        checkpoints.load(tmp_path / "step-00000002.h5")
        train_small(worker, 1)
        checkpoints.save()
        other = small(comm)
        other.load(tmp_path)
        return other.state.step

    assert simulate(2, program) == [3, 3]
    assert sorted(p.name for p in tmp_path.glob("*.h5")) == ["step-00000002.h5", "step-00000003.h5"]


def test_who_forgets_to_load_loses_nothing(tmp_path: Path) -> None:
    def program(comm: Endpoint) -> None:
        worker = small(comm)
        checkpoints = Checkpoints(worker, tmp_path, keep=1)
        for _ in range(3):
            train_small(worker, 2)
            checkpoints.save()
        Checkpoints(train_small_to(small(comm), 1), tmp_path, keep=1).save()

    def train_small_to(worker: SlowMo, steps: int) -> SlowMo:
        train_small(worker, steps)
        return worker

    simulate(2, program)
    assert sorted(p.name for p in tmp_path.glob("*.h5")) == ["step-00000001.h5", "step-00000006.h5"]


def refused_on_one(comm: Endpoint, path: str) -> str:
    """What each rank is told where one alone gives something that cannot be stored, asynchronously."""
    checkpoints = Checkpoints(small(comm), path)
    try:
        checkpoints.save({"it": object() if comm.rank == 1 else 3})
        checkpoints.wait()
    except SlowmoError as error:
        return error.message
    return ""


@pytest.mark.parametrize("world", ["mpi-2", "simulated-3"], indirect=True)
def test_what_one_rank_cannot_store_is_told_on_all(world: Real | Simulated, tmp_path: Path) -> None:
    told = world.run(refused_on_one, str(tmp_path))
    assert all("cannot hold a value of type object (extra/it)" in message for message in told), told
    assert not list(tmp_path.iterdir())


def test_another_kind_of_optimizer_is_refused(tmp_path: Path) -> None:
    def program(comm: Endpoint) -> None:
        small(comm).save(tmp_path / "a.h5")
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        SlowMo(model, torch.optim.Adam(model.parameters()), comm, SGP(), tau=4).load(tmp_path / "a.h5")

    with pytest.raises(SlowmoError, match="buffers of SGD, and the optimizer is Adam"):
        simulate(2, program)


# ---- faults when writing ----
@contextlib.contextmanager
def limited(limit: int) -> Iterator[None]:
    """No file of this process may become longer (Python ignores the signal): a disk that is full for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def crowded() -> Iterator[None]:
    """This process can open no other file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def broken(module: Any, name: str, code: int) -> Iterator[None]:
    """While in the block, a function fails as the system's do."""
    kept = getattr(module, name)

    def fails(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    setattr(module, name, fails)
    try:
        yield
    finally:
        setattr(module, name, kept)


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no room for the head": (lambda: limited(3000), "File too large"),
    "no room for the data": (lambda: limited(200_000), "File too large"),
    "no descriptors": (crowded, "Too many open files"),
    "full disk": (lambda: broken(files, "reserve", errno.ENOSPC), "No space left on device"),
    "disk error": (lambda: broken(os, "fsync", errno.EIO), "Input/output error"),
    "no rename": (lambda: broken(os, "replace", errno.EACCES), "Permission denied"),
    "no seal": (lambda: broken(write, "seal", errno.EDQUOT), os.strerror(errno.EDQUOT)),
}


def cannot_write(comm: Endpoint, folder: str, layout: str, fault: str, on: list[int]) -> tuple[str, bool, bool]:
    """(the error of a second save under a fault on some ranks, only the first is there, and all is well)."""
    worker = train_small(small(comm, width=20_000), 1)
    checkpoints = Checkpoints(worker, folder, layout=layout, asynchronous=False)
    first = checkpoints.save()
    train_small(worker, 1)
    with FAULTS[fault][0]() if comm.rank in on else contextlib.nullcontext():
        message = message_of(comm, lambda _: checkpoints.save())
    comm.barrier()  # rank 0 tidies up
    names = {p.name.partition(".shards-")[0] for p in Path(folder).iterdir()}
    alone = names == {first.name, *([first.stem] if layout == "shards" else [])}
    comm.barrier()
    second = checkpoints.save()
    other = small(comm, width=20_000, seed=1)
    well = True
    for path, step in ((first, 1), (second, 2)):
        with Checkpoint(path) as checkpoint:
            checkpoint.prove()
        other.load(path)
        well = well and other.state.step == step
    return message, alone, well


@pytest.fixture(scope="module")
def frail() -> Iterator[Real]:
    """Two ranks of their own, which must come to a good end after all that."""
    world = real({}, 2)
    yield world
    job = world._job
    world.stop()
    assert job is None or job.returncode == 0


@pytest.mark.parametrize(
    "fault, on",
    [
        *((fault, on) for fault in list(FAULTS)[:2] for on in ([0, 1], [0], [1])),
        ("no descriptors", [1]), ("full disk", [0, 1]), ("full disk", [0]), ("disk error", [1]), ("disk error", [0]),
        ("no rename", [0]), ("no seal", [0]),
    ],
)  # fmt: skip
def test_a_fault_on_any_rank_is_an_error_on_all_and_leaves_what_was_there(
    frail: Real, layout: str, fault: str, on: list[int], tmp_path: Path
) -> None:
    fails(frail, tmp_path, layout, fault, on)


@pytest.mark.parametrize("fault", ["full disk", "no seal"])
def test_one_rank_that_cannot_write_its_shard_is_an_error_on_all(frail: Real, fault: str, tmp_path: Path) -> None:
    fails(frail, tmp_path, "shards", fault, [1])


def fails(world: Real, folder: Path, layout: str, fault: str, on: list[int]) -> None:
    got = world.run(cannot_write, str(folder), layout, fault, on)
    assert len({message for message, *_ in got}) == 1
    for message, alone, well in got:
        assert message.startswith("The checkpoint") and "cannot be written" in message, message
        assert FAULTS[fault][1] in message and str(folder) in message, message
        assert alone and well


def overwrites(comm: Endpoint, folder: str, fault: str) -> tuple[str, list[int], int]:
    """The error of a save onto a former file, the steps that load before and after one that works, and its folders."""
    path, worker, other = Path(folder) / "x.h5", train_small(small(comm), 1), small(comm, seed=1)
    worker.save(path)
    train_small(worker, 1)
    with FAULTS[fault][0]() if comm.rank == 0 else contextlib.nullcontext():
        message = message_of(comm, lambda _: worker.save(path))
    steps = []
    for _ in range(2):
        other.load(path)
        steps.append(other.state.step)
        worker.save(path)
    return message, steps, len([p for p in Path(folder).iterdir() if p != path])


@pytest.mark.parametrize("fault", ["no room for the head", "no seal", "no rename"])
@pytest.mark.parametrize("ranks", ["real", "simulated"])
def test_a_fault_leaves_the_former_file_of_that_name(frail: Real, ranks: str, fault: str, tmp_path: Path) -> None:
    got = (frail if ranks == "real" else Simulated(2)).run(overwrites, str(tmp_path), fault)
    for message, steps, folders in got:
        assert FAULTS[fault][1] in message and steps == [1, 2]
        assert folders == (0 if ranks == "real" and "parallel" in layouts() else 1)


def nowhere(comm: Endpoint, folder: str) -> list[str]:
    """The errors of both ways to write into a place that takes nothing."""
    worker = train_small(small(comm, width=20_000), 1)
    kinds = layouts() if hasattr(comm, "mpi") else ["auto"]
    found = [
        message_of(comm, lambda _, k=kind: Checkpoints(worker, folder, layout=k, asynchronous=False).save())
        for kind in kinds
    ]
    return [*found, message_of(comm, lambda _: worker.save(Path(folder) / "x.h5"))]


@pytest.mark.parametrize("world", ["mpi-2", "simulated-2"], indirect=True)
@pytest.mark.parametrize("below", ["", "below", "below/that"])
def test_a_folder_that_is_a_file_is_named(world: Real | Simulated, below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    got = world.run(nowhere, str(tmp_path / "file" / below))
    for message in got[0]:
        assert str(tmp_path / "file") in message and ("Not a directory" in message or "File exists" in message), message
    assert all(g == got[0] for g in got)
    assert (tmp_path / "file").read_text() == "dear"


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory, with options; skips where only root may and we are not."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    "options, words",
    [("ro,size=9m", "Read-only file system"), ("size=256k", "are free"), ("size=968k", "No space left on device")],
)
def test_a_disk_that_is_full_or_read_only(frail: Real, mounted, options: str, words: str) -> None:
    """The largest has room for the data, but not for what HDF5 puts around it."""
    folder = mounted(options)
    got = frail.run(nowhere, str(folder))
    for message in got[0]:
        assert words in message and str(folder) in message, message
    assert got[1] == got[0] and not list(folder.iterdir())


# ---- the file as others see it ----
READER = """
import json, sys
import h5py, numpy as np

def parameter(vector, i):  # of a flat vector, by the tables in layout/
    start, shape, strides = file["layout/start"][i], *(json.loads(file[f"layout/{k}"][i]) for k in ("shape", "strides"))
    data = vector[start:]
    return np.lib.stride_tricks.as_strided(data, shape, [data.itemsize * s for s in strides]).tolist()

with h5py.File(sys.argv[1], "r") as file:
    found = {k: v.item() if hasattr(v, "item") else v for k, v in file.attrs.items()}
    ranks, found["w"] = found["ranks"], file["w"][:].tolist()
    for i, name in enumerate(file["layout/name"].asstr()):
        kind = file["layout/vector"].asstr()[i]
        for group in ("z", "anchor", "u"):
            data = file[group][kind]
            rows = [data[r] if data.ndim == 2 else data[:] for r in range(ranks)]
            found[f"{group} {name}"] = [parameter(row, i) for row in rows]
    virtual = {n: file[n].is_virtual for n in ("z/float32", "anchor/float32", "u/float32")}
    found["sources"] = {n: [s.file_name for s in file[n].virtual_sources()] for n in virtual if virtual[n]}
assert not any(name.startswith("slowmo") for name in sys.modules)
print(json.dumps(found))
"""


def made(comm: Endpoint, folder: str, layout: str, sharded: bool) -> dict[str, list]:
    """z, anchor and u of each parameter, of which a file was written in the middle of a round."""
    worker = train_small(small(comm, tau=2, sharded=sharded), 3)
    Checkpoints(worker, folder, layout=layout, asynchronous=False, config="[run]").save({"mine": torch.ones(3)})
    s, comm = worker.state, worker.comm
    found = {}
    for group, vector in (("z", s.z[0]), ("anchor", s.slow[0].x0), ("u", s.slow[0].u)):
        if sharded and group != "z":
            whole = torch.empty_like(s.z[0])
            whole[worker.share_of(whole)] = vector
            vector = comm.all_gather_(whole)
        for entry, view in zip(s.flat.entries, s.flat.views([vector]), strict=True):
            found[f"{group} {entry.name}"] = view.tolist()
    return found


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("world", ["mpi-3", "simulated-3"], indirect=True)
def test_h5py_alone_reads_what_is_in_it(world: Real | Simulated, sharded: bool, tmp_path: Path) -> None:
    for kind in layouts() if isinstance(world, Real) else ["shards"]:
        wanted = world.run(made, str(tmp_path / kind), kind, sharded)
        (path,) = (tmp_path / kind).glob("*.h5")
        command = [sys.executable, "-c", READER, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert wanted[0].keys() <= found.keys() and len(wanted[0]) == 12
        for name in wanted[0]:
            assert found[name] == [w[name] for w in wanted], name
        assert len({str(w["z 0.weight"]) for w in wanted}) == world.ranks
        known = {"step": 3, "round": 1, "ranks": world.ranks, "layout": kind, "format": 2, "config": "[run]"}
        assert known.items() <= found.items() and found["w"] == [1.0] * world.ranks
        shards = {f"rank-{r:05}.h5" for r in range(world.ranks)}
        for sources in found["sources"].values():
            assert {Path(f).name for f in sources} == shards and not any(Path(f).is_absolute() for f in sources)
        assert len(found["sources"]) == (3 if kind == "shards" else 0)


STRIPE = 1 << 20


def striped(comm: Endpoint, folder: str, layout: str) -> tuple[list, list[str]]:
    """As on Lustre: (dataset, its dimensions, rank, offset, bytes) of every slab; and what differs once it is read."""
    place, write._place = write._place, lambda *_: STRIPE
    try:
        worker = train_small(small(comm, width=150_001), 2)
        path = Checkpoints(worker, folder, layout=layout, asynchronous=False).save()
    finally:
        write._place = place
    with Checkpoint(path) as checkpoint:
        checkpoint.prove()
        slabs = [
            (s.dataset, len(checkpoint.datasets[s.dataset][1]), s.rank, *s.extents[0]) for _, s in checkpoint.slabs()
        ]
    other = small(comm, width=150_001, seed=1)
    other.load(path)
    before, after = snapshot(worker), snapshot(other)
    return slabs, differ(before, after)


@pytest.mark.parametrize("world", ["mpi-3"], indirect=True)
def test_rows_start_at_a_stripe_of_the_file_system(world: Real, layout: str, tmp_path: Path) -> None:
    got = world.run(striped, str(tmp_path), layout)
    assert all(different == [] for _, different in got)
    long = [(name, rank, at, rows) for name, rows, rank, at, size in got[0][0] if size >= STRIPE]
    assert {rank for _, rank, *_ in long} == {0, 1, 2}
    assert {name for name, *_ in long} == {"z/float32", "optimizer/momentum_buffer/float32"}
    assert all(at % STRIPE == 0 and rows == 2 for *_, at, rows in long)
    begins = {
        name: at for name, _, rank, at, size in got[0][0] if rank == 0 and name in ("anchor/float32", "u/float32")
    }
    assert len(begins) == 2 and (layout == "shards" or all(at % STRIPE == 0 for at in begins.values()))


def test_names_that_are_long_when_they_are_told(tmp_path: Path) -> None:
    """The seal names its shards in ASCII, six characters for each of these."""
    path = tmp_path / f"{'ж' * 80}.h5"

    def program(comm: Endpoint) -> int:
        train_small(small(comm), 1).save(path)
        worker = small(comm)
        worker.load(path)
        return worker.state.step

    assert simulate(8, program) == [1] * 8


# ---- the newest whole one ----
def damage(path: Path) -> None:
    """Change one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def takes_newest(comm: Endpoint, folder: str) -> tuple[int, list[str], str]:
    """The step that is gone on from (-1: none), what was noted, and the error."""
    worker, notes = small(comm, seed=3), []
    message = message_of(comm, lambda _: Checkpoints(worker, folder).load(note=notes.append))
    return worker.state.step if not message else -1, notes, message


def saves_steps(comm: Endpoint, folder: str, steps: int, layout: str) -> None:
    worker = small(comm)
    checkpoints = Checkpoints(worker, folder, keep=99, layout=layout, asynchronous=False)
    for _ in range(steps):
        checkpoints.save()
        train_small(worker, 1)


@pytest.mark.parametrize("world", ["mpi-2", "simulated-3"], indirect=True)
def test_a_damaged_newest_one_is_passed_over_and_told(world: Real | Simulated, tmp_path: Path) -> None:
    for kind in layouts() if isinstance(world, Real) else ["auto"]:
        folder = tmp_path / kind
        world.run(saves_steps, str(folder), 4, kind)
        damage(folder / "step-00000003.h5")
        shards = sorted(folder.glob("step-00000002.shards-*/*"))
        damage(shards[-1] if shards else folder / "step-00000002.h5")
        got = world.run(takes_newest, str(folder))
        assert [(step, message) for step, _, message in got] == [(1, "")] * world.ranks
        assert [len(notes) for _, notes, _ in got] == [2] + [0] * (world.ranks - 1)
        for step, note in zip((3, 2), got[0][1], strict=True):
            assert f"step-{step:08}" in note and "is not usable" in note and note.endswith("Trying the one before.")
        damage(folder / "step-00000001.h5")
        (folder / "step-00000000.h5").write_bytes(b"")
        for step, _, message in world.run(takes_newest, str(folder)):
            assert step == -1 and f"No checkpoint in {folder} is whole" in message and "step-00000003.h5" in message


@pytest.mark.parametrize("world", ["mpi-2", "simulated-3"], indirect=True)
def test_where_there_is_none_it_is_told_on_all_ranks(world: Real | Simulated, tmp_path: Path) -> None:
    for place, words in ((tmp_path, "has no checkpoint"), (tmp_path / "no", "There is no")):
        got = world.run(takes_newest, str(place))
        assert all(step == -1 and words in message and str(place) in message for step, _, message in got)


def test_simulated_ranks_have_no_parallel_layout(tmp_path: Path) -> None:
    with pytest.raises(SlowmoError, match="simulated ranks"):
        simulate(2, saves_steps, str(tmp_path), 1, "parallel")
