"""The worker on real models: dtypes, layouts, frozen and unused parameters, buffers, evaluation, bits."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional
from worlds import Real, Simulated

from slowmo_mpi import DPSGD, OSGP, SGP, AllReduce, Local, SlowMo, SlowmoError, simulate
from slowmo_mpi.bases import Base
from slowmo_mpi.comm import Endpoint
from slowmo_mpi.flat import FlatParameters

BASES = [AllReduce(), Local(), DPSGD("ring-bidirectional"), SGP(), SGP("star"), OSGP(), OSGP(delay=2), OSGP(delay=3)]
SETTINGS = [
    {"tau": 6},
    {"tau": 0},
    {"tau": 5, "sharded": True, "buffers": "average"},
    {"tau": 5, "average": "none", "buffers": "maintain"},
]


def names(value: object) -> str | None:
    if isinstance(value, Base):
        graph = getattr(value, "topology", "")
        return f"{type(value).__name__}{graph}{getattr(value, 'delay', '')}"
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


class Net(nn.Module):
    """Batch-norm, dropout, a tied weight, a frozen layer, channels-last convolution: what real models have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)
        return self.out(self.dropout(self.frozen(self.b(self.a(x).relu())).tanh()))


def train_net(comm: Endpoint, base: Base, slow: dict, kind=torch.optim.AdamW, steps: int = 13, **arguments):
    torch.manual_seed(100 + comm.rank)
    model = Net()
    optimizer = kind(model.parameters(), lr=0.01, **arguments)
    worker = SlowMo(model, optimizer, comm, base, **slow)
    for _ in range(steps):
        x, y = torch.randn(6, 2, 4, 4), torch.randint(3, (6,))
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        worker.step()
    with worker.averaged():
        average = [t.clone() for t in model.state_dict().values()]
    worker.drain()
    return [t.clone() for t in model.state_dict().values()], average, worker.consensus_distance()


@pytest.mark.parametrize("slow", SETTINGS, ids=names)
@pytest.mark.parametrize("base", BASES, ids=names)
@pytest.mark.parametrize("world", ["mpi-2", "mpi-3", "mpi-4"], indirect=True)
def test_real_ranks_give_the_same_bits_as_simulated_ones(world: Real, base: Base, slow: dict) -> None:
    """Parameters, batch-norm buffers, Adam's moments, dropout's random stream, evaluation: everything equal."""
    if isinstance(base, AllReduce | Local) and (slow["tau"] == 0 or slow.get("average") == "none"):
        slow = {"tau": 5, "alpha": 0.5, "gamma": "last"}  # these need the average
    real = world.run(train_net, base, slow)
    simulated = simulate(world.ranks, train_net, base, slow)
    for mine, theirs in zip(real, simulated, strict=True):
        for a, b in zip(mine[0] + mine[1], theirs[0] + theirs[1], strict=True):
            assert torch.equal(a, b)
        assert mine[2] == theirs[2]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("base", BASES, ids=names)
def test_all_workers_are_bit_identical_after_line_8(world: Simulated | Real, base: Base, sharded: bool) -> None:
    got = world.run(train_net, base, {"tau": 4, "sharded": sharded}, torch.optim.SGD, 8)
    for state, average, distance in got:
        assert distance == 0
        for a, b in zip(state, got[0][0], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(state, average, strict=True):
            torch.testing.assert_close(a, b)


OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    (torch.optim.RMSprop, {"momentum": 0.5}),
    (torch.optim.NAdam, {}),
]


def optimizer_states(comm: Endpoint, kind, arguments: dict, buffers: str):
    """The optimizer's state just before and just after the end of a round, and of one that is new."""
    torch.manual_seed(comm.rank)
    model = nn.Linear(4, 2)
    optimizer = kind(model.parameters(), lr=0.01, **arguments)
    worker = SlowMo(model, optimizer, comm, Local(), tau=4, buffers=buffers)
    new = [dict(optimizer.state.get(p, {})) for p in model.parameters()]
    new = [{k: v.clone() if torch.is_tensor(v) else v for k, v in s.items()} for s in new]
    before = None
    renew = worker._renew_optimizer_state

    def look_then_renew() -> None:
        nonlocal before
        before = [
            {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[p].items()}
            for p in model.parameters()
        ]
        renew()

    worker._renew_optimizer_state = look_then_renew
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        worker.step()
    after = [dict(optimizer.state.get(p, {})) for p in model.parameters()]
    return new, before, after


@pytest.mark.parametrize("buffers", ["reset", "maintain", "average"])
@pytest.mark.parametrize("kind, arguments", OPTIMIZERS)
@pytest.mark.parametrize("world", ["simulated-3"], indirect=True)
def test_optimizer_buffers_at_a_round(world: Simulated, kind, arguments: dict, buffers: str) -> None:
    got = world.run(optimizer_states, kind, arguments, buffers)
    for new, before, after in got:
        for p in range(2):
            assert set(after[p]) == (set(new[p]) if buffers == "reset" else set(before[p]))
            for key, value in after[p].items():
                if not torch.is_tensor(value):
                    continue
                if buffers == "reset":
                    wanted = new[p][key]
                elif buffers == "maintain":
                    wanted = before[p][key]
                else:
                    wanted = torch.stack([b[p][key].float() for _, b, _ in got]).mean(0)
                torch.testing.assert_close(value.float(), wanted.float())


def batch_norm(comm: Endpoint, base: Base, average: str):
    """Running means after 3 of 4 steps, inside averaged(), again outside, after the round; and the counter."""
    torch.manual_seed(comm.rank)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.01), comm, base, tau=4, average=average)
    seen = []
    for k in range(4):
        model.zero_grad()
        model(torch.randn(8, 3) + comm.rank).square().mean().backward()
        if k == 3:
            seen.append(model[0].running_mean.clone())
        worker.step()
        if k == 2:
            seen.append(model[0].running_mean.clone())
            with worker.averaged():
                seen.append(model[0].running_mean.clone())
            seen.append(model[0].running_mean.clone())
    seen.append(model[0].running_mean.clone())
    return seen, int(model[0].num_batches_tracked)


@pytest.mark.parametrize("average", ["exact", "none"])
@pytest.mark.parametrize("world", ["simulated-4", "mpi-3"], indirect=True)
def test_batch_norm_buffers_are_averaged_at_line_6_and_for_evaluation_only(world, average: str) -> None:
    got = [seen for seen, _ in world.run(batch_norm, SGP(), average)]
    inner, inside, outside, last, end = zip(*got, strict=True)
    assert all(n == 4 for _, n in world.run(batch_norm, SGP(), average))
    assert not torch.equal(inner[0], inner[1])  # between rounds each worker has its own
    for r in range(world.ranks):
        torch.testing.assert_close(inside[r], torch.stack(inner).mean(0))
        assert torch.equal(outside[r], inner[r])
        wanted = torch.stack(last).mean(0) if average == "exact" else last[r]
        torch.testing.assert_close(end[r], wanted)


def evaluates(comm: Endpoint, base: Base, look: bool):
    torch.manual_seed(comm.rank)
    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    worker = SlowMo(model, optimizer, comm, base, tau=0 if base.communicates else 100)
    seen = []
    for _ in range(7):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().mean().backward()
        worker.step()
        if look:
            s = worker.state
            flight = s.in_flight.sent * s.in_flight.packet.vectors[0] if s.in_flight else 0.0
            mass = s.w * s.z[0] + flight
            with worker.averaged():
                seen.append((mass.clone(), s.z[0].clone()))
            worker.consensus_distance()
    worker.drain()
    return seen, worker.state.z[0].clone()


@pytest.mark.parametrize("base", BASES, ids=names)
@pytest.mark.parametrize("world", ["simulated-5", "mpi-4"], indirect=True)
def test_evaluation_sees_the_mass_in_flight_and_changes_nothing(world, base: Base) -> None:
    looked, left_alone = world.run(evaluates, base, True), world.run(evaluates, base, False)
    for a, b in zip(looked, left_alone, strict=True):
        assert torch.equal(a[1], b[1])
    for k in range(7):
        mean = torch.stack([seen[k][0] for seen, _ in looked]).sum(0) / world.ranks
        for seen, _ in looked:
            torch.testing.assert_close(seen[k][1], mean)


def rounds_with_rates(comm: Endpoint, rates: list[float], dtype: torch.dtype):
    torch.manual_seed(comm.rank)
    model = nn.Linear(6, 2).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    worker = SlowMo(model, optimizer, comm, SGP(), tau=2, beta=0.7)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        model(torch.randn(3, 6).to(dtype)).float().square().mean().backward()
        worker.step()
    return worker.state.z[0].clone(), worker.state.slow[0].u.clone(), worker.state.slow[0].x0.dtype


@pytest.mark.parametrize(
    "rates", [[0.1, 0.1, 0.0, 0.0], [0.1, 0.1, 1e-44, 1e-44], [0.0, 0.0, 0.1, 0.1], [0.1, 0.1, 0.2, 0.0]]
)
@pytest.mark.parametrize("world", ["simulated-3"], indirect=True)
def test_a_learning_rate_of_0_leaves_everything_finite(world: Simulated, rates: list[float]) -> None:
    for z, u, _ in world.run(rounds_with_rates, rates, torch.float32):
        assert z.isfinite().all() and u.isfinite().all()
        if rates[2] < 1e-40:
            assert u.abs().max() > 0  # the momentum's memory is kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("world", ["simulated-3", "mpi-3"], indirect=True)
def test_every_float_dtype(world, dtype: torch.dtype) -> None:
    got = world.run(rounds_with_rates, [0.01] * 6, dtype)
    exact = simulate(world.ranks, rounds_with_rates, [0.01] * 6, torch.float64)[0][0]
    rough = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-15}[dtype]
    for z, _, slow_dtype in got:
        assert z.dtype == dtype and slow_dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(z, got[0][0])
        # The layouts pad differently; compare the numbers that are there.
        torch.testing.assert_close(z.double()[z != 0].sort()[0], exact[exact != 0].sort()[0], rtol=0, atol=rough)


def two_groups(comm: Endpoint):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4))
    groups = [
        {"params": model[2].parameters(), "lr": 0.1},
        {"params": [*model[0].parameters(), *model[1].parameters()], "lr": 0.001},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    worker = SlowMo(model, optimizer, comm, Local(), tau=1, beta=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    worker.step()
    moved = [float((b - p.detach()).mean()) for b, p in zip(before, model.parameters(), strict=True)]
    return moved, [float(u.abs().max()) for s in worker.state.slow for u in [s.u]], len(worker.state.z)


def test_each_parameter_group_has_its_own_gamma(world) -> None:
    """With a gradient of 1 everywhere u is 1 in every group, though their rates differ a hundredfold."""
    for moved, u, buffers in world.run(two_groups):
        assert buffers == 2  # one per dtype
        assert moved == pytest.approx([0.001] * 4 + [0.1] * 2, rel=1e-3)
        assert u == pytest.approx([1.0, 1.0], rel=1e-3)


def unused(comm: Endpoint, set_to_none: bool):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker = SlowMo(model, optimizer, comm, AllReduce(), tau=0)
    for k in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        layer = model[(comm.rank + k) % 2]  # different ranks use different layers
        layer(torch.ones(1, 3)).sum().backward()
        worker.step()
    return worker.state.z[0].clone()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("world", ["simulated-2", "mpi-2", "mpi-3"], indirect=True)
def test_ranks_that_use_different_parameters_stay_together(world, set_to_none: bool) -> None:
    got = world.run(unused, set_to_none)
    for z in got:
        assert torch.equal(z, got[0])


def test_the_model_keeps_its_values_layout_and_ties() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 2, 4, 4)
    before, wanted = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    flat = FlatParameters(model, [list(model.parameters())])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(model(x), wanted)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.a.weight is model.b.weight
    starts = sorted((e.start, e.numel) for e in flat.entries)
    assert all(start % 16 == 0 for start, _ in starts)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(starts))
    flat.buffers[0].zero_()
    assert all((p == 0).all() for p in model.parameters() if p.requires_grad)
    assert any((p != 0).any() for p in model.frozen.parameters())


def refuse(comm: Endpoint, how: str) -> str:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3 if how != "shape" or comm.rank == 0 else 2))
    optimizer = torch.optim.SGD(model[:1].parameters() if how == "not in the optimizer" else model.parameters(), lr=0.1)
    if how == "not in the model":
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    if how == "frozen on one rank" and comm.rank == 0:
        model[0].requires_grad_(False)
    arguments = {"sharded": True, "average": "none"} if how == "sharded noaverage" else {}
    arguments = {"beta": 0.5 + 0.1 * comm.rank} if how == "settings" else arguments
    arguments = {"tau": 0} if how == "apart" else {"tau": 3} if how == "delay" else arguments
    base = {"directed": DPSGD("exponential"), "apart": Local(), "delay": OSGP(delay=3)}.get(how, SGP())
    if how == "unfrozen":
        model[1].requires_grad_(False)
    arguments = {"buffers": "keep"} if how == "buffers" else {"beta": 1.0} if how == "beta" else arguments
    try:
        worker = SlowMo(model, optimizer, comm, base, **arguments)
        if how == "moved":
            model.double()
            worker.step()
        if how == "unfrozen":
            model[1].requires_grad_(True)
            worker.step()
        if how == "replaced":
            model[1] = nn.Linear(3, 3)
            worker.step()
        if how == "more parameters":
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
            worker.step()
        if how == "sparse":
            model[0].weight.grad = torch.eye(3).to_sparse()
            SlowMo(model, optimizer, comm, AllReduce(), tau=0).step()
    except SlowmoError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "how, words",
    [
        ("shape", "differs from rank 0's"), ("not in the optimizer", "the optimizer does not have it"),
        ("not in the model", "not in the model"), ("frozen on one rank", "differs from rank 0's"),
        ("sharded noaverage", "cannot be sharded"), ("buffers", "reset, maintain, average"), ("beta", "0 <= beta < 1"),
        ("directed", "symmetric"),
        ("settings", "settings of rank 1 differs from rank 0's"),
        ("apart", "never meets"),
        ("delay", "exchanges nothing"),
        ("unfrozen", "unfrozen"),
        ("replaced", "replaced"),
        ("more parameters", "other parameters"), ("moved", "was moved or replaced"), ("sparse", "sparse"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("world", ["simulated-3"], indirect=True)
def test_what_cannot_work_is_refused(world: Simulated, how: str, words: str) -> None:
    assert all(words in message for message in world.run(refuse, how))


def in_flight_during_the_gradient(comm: Endpoint, delay: int) -> list[int]:
    """The age of the exchange in flight as the gradient is computed; -1 where there is none."""
    seen = []

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flight = worker.state.in_flight
            seen.append(flight.age if flight else -1)
            return super().forward(x)

    model = Watched(4, 2)
    worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, OSGP(delay=delay), tau=6)
    for _ in range(12):
        model.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        worker.step()
    worker.drain()
    return seen


@pytest.mark.parametrize("world", ["simulated-4", "mpi-3"], indirect=True)
def test_osgp_has_its_exchange_in_flight_while_the_gradient_is_computed(world) -> None:
    ages = {delay: world.run(in_flight_during_the_gradient, delay)[0] for delay in (0, 1, 2)}
    assert ages[0] == [-1] * 12
    # Step 0's is posted with its own step (z has not moved since); the last of a round would be in vain.
    assert ages[1] == [-1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 0, -1]
    assert ages[2] == [-1, 1, 0, 1, -1, -1, 0, 1, 0, 1, -1, -1]


def fine_tunes(comm: Endpoint):
    """An optimizer with a history, a mask no mean can be taken of, an empty and a never used parameter."""
    torch.manual_seed(comm.rank)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model.register_buffer("mask", torch.full((3,), torch.finfo(torch.float32).min))
    model.register_buffer("cache", torch.zeros(2))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    model.register_parameter("idle", nn.Parameter(torch.ones(5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    model(torch.randn(8, 3) * 1000).square().mean().backward()
    optimizer.step()  # the history
    worker = SlowMo(model, optimizer, comm, AllReduce(), tau=2)
    fresh: list[dict] = []
    for k in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        worker.step()
        if k == 1:
            fresh = [dict(optimizer.state.get(p, {})) for p in model.parameters()]
    with worker.averaged():
        model.cache = torch.zeros(3 + comm.rank)  # a cache may grow
    worker.consensus_distance()
    return fresh, model.mask, model.idle.detach(), len(model.cache)


@pytest.mark.parametrize("world", ["simulated-3", "mpi-2"], indirect=True)
def test_what_fine_tuning_brings_along(world) -> None:
    for rank, (fresh, mask, idle, cache) in enumerate(world.run(fine_tunes)):
        assert len(fresh) == 8 and not any(fresh)  # reset goes to no history, not back to the old one
        assert (mask == torch.finfo(torch.float32).min).all()
        torch.testing.assert_close(idle, torch.ones(5))  # no rank has used it: no weight decay either
        assert cache == 3 + rank


def thaws(comm: Endpoint) -> float:
    torch.manual_seed(comm.rank)
    model = nn.Linear(6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker = SlowMo(model, optimizer, comm, Local(), tau=2, beta=0.7)
    for rate in [1e-12] * 6 + [0.1] * 6:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().mean().backward()
        worker.step()
    return float(model.weight.detach().abs().max())


@pytest.mark.parametrize("world", ["simulated-3"], indirect=True)
def test_rounding_divided_by_a_tiny_rate_is_no_momentum(world: Simulated) -> None:
    assert all(weight < 2 for weight in world.run(thaws))


def evaluates_in_inference_mode(comm: Endpoint) -> bool:
    if hasattr(comm, "mpi"):
        comm = type(comm)(comm.mpi, timeout=15.0, transport="staged")
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, SGP(), tau=2)
    for _ in range(6):
        with torch.inference_mode(), worker.averaged():
            model(torch.ones(3, 4))
        model.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        worker.step()
    return bool(worker.state.z[0].isfinite().all())


@pytest.mark.parametrize("world", ["simulated-3", "mpi-3"], indirect=True)
def test_evaluation_in_inference_mode(world) -> None:
    assert all(world.run(evaluates_in_inference_mode))


def test_what_cannot_be_averaged_is_told() -> None:
    """buffers = average where a parameter was used on one rank only: its Adam state exists there only."""

    def program(comm: Endpoint) -> None:
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        worker = SlowMo(model, optimizer, comm, Local(), tau=1, buffers="average")
        model[comm.rank](torch.ones(1, 2)).sum().backward()
        worker.step()

    with pytest.raises(SlowmoError, match="optimizer buffers differ"):
        simulate(2, program)


def test_a_rank_that_skips_a_step_is_noticed() -> None:
    def program(comm: Endpoint) -> None:
        model = nn.Linear(2, 2)
        worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, Local(), tau=2)
        for _ in range(4 if comm.rank else 3):
            model(torch.ones(1, 2)).sum().backward()
            worker.step()

    with pytest.raises(SlowmoError, match=r"waited .* for rank 0 at step 3: agreement"):
        simulate(2, program)


def left_alone(comm: Endpoint, base: Base, settings: dict) -> bool:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, optimizer = torch.randn(5, 3) + comm.rank, torch.optim.SGD(model.parameters(), lr=0.1)
    worker = SlowMo(model, optimizer, comm, base, **settings)
    for _ in range(4):
        model(x).square().sum().backward()
        worker.step()
    worker.close()
    assert not comm.busy
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(thread.name == "progress" for thread in threading.enumerate())
    before, optimizer = comm.sent_bytes, torch.optim.SGD(model.parameters(), lr=0.1)
    if comm.rank == 0:  # alone
        model(x).square().sum().backward()
        optimizer.step()
    assert comm.sent_bytes == before
    again = SlowMo(model, optimizer, comm, AllReduce(), tau=0)  # the others' weights become rank 0's
    model(x).square().sum().backward()
    again.step()
    again.close()
    return len(set(comm.gather([p.sum().item() for p in model.parameters()].__repr__()))) == 1


@pytest.mark.parametrize("world", ["mpi-2"], indirect=True)
@pytest.mark.parametrize(
    "base,settings",
    [
        (AllReduce(), {"tau": 0, "progress": "thread"}),
        (OSGP(), {"tau": 4, "sharded": True, "overlap": True, "progress": "hooks"}),
        (SGP(), {"tau": 4, "average": "delayed"}),
    ],
    ids=names,
)
def test_a_closed_worker_leaves_the_model_alone(world: Real, base: Base, settings: dict) -> None:
    assert all(world.run(left_alone, base, settings))
