"""How a gradient is computed and a model measured: each key of [compute] and each recipe does what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import Real, Simulated

from slowmo_mpi import DPSGD, OSGP, SGP, AllReduce, Local, SlowMo, config, presets, simulate, tasks
from slowmo_mpi.bases import Base
from slowmo_mpi.cli.progress import metrics_of
from slowmo_mpi.comm import Endpoint
from slowmo_mpi.comm.progress import Hooks
from slowmo_mpi.config import Compute
from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.evaluation import evaluate
from slowmo_mpi.inner import InnerStep, prepare, progress
from slowmo_mpi.optim import learning_rate, scaled
from slowmo_mpi.resume import checkpoint_of
from slowmo_mpi.tasks.classification import Classification
from slowmo_mpi.train import train

TWO = pytest.mark.parametrize("world", ["simulated-2", "mpi-2"], indirect=True)


class Rows:
    """1,200 samples of 4 numbers; one in 40 is too large for float16."""

    def __len__(self) -> int:
        return 1200

    def batch(self, indices: Tensor) -> Tensor:
        rows = torch.sin(indices[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])) / 4
        return torch.where(indices[:, None] % 40 == 0, 1e6, rows)


class Slope:
    """The loss is the mean of batch @ w: its gradient is the batch's mean row, whatever w. Notes what it was given."""

    def __init__(self) -> None:
        self.model = nn.Linear(4, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.train, self.test = Rows(), None
        self.seen: list[tuple[int, torch.dtype]] = []

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(batch)
        self.seen.append((len(batch), out.dtype))
        return out.float().mean(), {"size": torch.tensor(float(len(batch)))}


def slope(context: tasks.Context) -> Slope:
    return Slope()


def rows(*mean: float, count: int = 4) -> Tensor:
    return torch.tensor(mean).repeat(count, 1)


OVERFLOW = rows(1e6, 0, 0, 0)


def take(
    comm: Endpoint, base: Base, compute: Compute, feeds: list[list[Tensor]], clip_norm: float = 0.0, **settings: Any
) -> dict[str, Any]:
    """Inner steps at rate 0.5 on each rank's own micro-batches; what came of them."""
    task = Slope()
    model = prepare(task.model, compute, comm.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    worker = SlowMo(model, optimizer, comm, base, **{"tau": 2, "beta": 0.5} | settings)
    inner = InnerStep(task, worker, compute, clip_norm)
    feed, sent = iter(feeds[comm.rank]), comm.sent_bytes
    steps = []
    for _ in range(len(feeds[comm.rank]) // compute.accumulate):
        _, metrics = inner.take(feed)
        steps.append((inner.taken, inner.scale))
    sent = comm.sent_bytes - sent
    worker.drain()
    result = {
        "steps": steps,
        "sent": sent,
        "seen": task.seen,
        "metrics": metrics,
        "counts": (worker.state.step, worker.state.round),
    }
    return result | {"w": task.model.weight.detach()[0].clone(), "u": [s.u[:4].clone() for s in worker.state.slow]}


# ---- float16 ----
@TWO
@pytest.mark.parametrize("base", [Local(), SGP(), OSGP(), DPSGD()], ids=lambda b: type(b).__name__)
def test_a_step_left_out_is_a_step_of_length_0(world: Simulated | Real, base: Base) -> None:
    """Rank 1 overflows in the first of two steps: tau, round, gamma and exchange go on, and x0 and u are alike.

    Gossip keeps the mean, so xbar = -0.5 (0.25 + 0.25 + 0.125) / 2 by hand, and u = -xbar / 0.5.
    """
    feeds = [[rows(0.25, 0, 0, 0)] * 2, [OVERFLOW, rows(0.125, 0, 0, 0)]]
    results = world.run(take, base, Compute(precision="float16"), feeds)
    assert [r["steps"] for r in results] == [[(True, 65536.0)] * 2, [(False, 32768.0), (True, 32768.0)]]
    for r in results:
        assert r["counts"] == (2, 1)
        assert torch.allclose(r["w"], torch.tensor([-0.15625, 0, 0, 0]), atol=1e-7)
        assert torch.allclose(r["u"][0], torch.tensor([0.3125, 0, 0, 0]), atol=1e-7)
        assert torch.equal(r["w"], results[0]["w"]) and torch.equal(r["u"][0], results[0]["u"][0])


@TWO
def test_averaged_gradients_overflow_on_all_ranks_together(world: Simulated | Real) -> None:
    feeds = [[rows(0.25, 0, 0, 0)] * 2, [OVERFLOW, rows(0.125, 0, 0, 0)]]
    for r in world.run(take, AllReduce(), Compute(precision="float16"), feeds):
        assert r["steps"] == [(False, 32768.0), (True, 32768.0)]
        assert torch.equal(r["w"], torch.tensor([-0.5 * 0.1875, 0, 0, 0]))


def test_the_ranks_of_a_worker_overflow_together() -> None:
    feeds = [[rows(0.25, 0, 0, 0)]] * 3 + [[OVERFLOW]]
    results = simulate(4, partial(take, ranks_per_worker=2), SGP(), Compute(precision="float16"), feeds)
    assert [r["steps"][0][0] for r in results] == [True, True, False, False]


def test_the_optimizers_buffers_are_as_they_were_after_a_step_left_out() -> None:
    feeds = [[rows(0.25, 0, 0, 0), OVERFLOW, rows(0.25, 0, 0, 0)]]

    def momentum(comm: Endpoint) -> Tensor:
        task = Slope()
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.5, momentum=0.5)
        inner = InnerStep(task, SlowMo(task.model, optimizer, comm, Local(), tau=0), Compute(precision="float16"), 0.0)
        feed = iter(feeds[0])
        for _ in range(3):
            inner.take(feed)
        return optimizer.state[task.model.weight]["momentum_buffer"][0, 0]

    assert float(simulate(1, momentum)[0]) == 0.25 + 0.5 * 0.25


OVERFLOWING = """
[run]
steps = 14
log_every = 7
[task]
name = "test_training:slope"
batch_size = 4
[compute]
precision = "float16"
[base]
algorithm = "osgp"
[optimizer]
lr = 0.05
momentum = 0.9
[slowmo]
tau = 4
beta = 0.3
buffers = "maintain"
[checkpoint]
every = 1
keep = 100
"""


def begin_run(comm: Endpoint, folder: Path, place: Path | None, *overrides: str) -> dict[str, Any]:
    settings = config.parse(OVERFLOWING, "a test", overrides)
    found = checkpoint_of(place, settings, ["run.steps"], comm, print) if place else None
    return train(settings, comm, folder, None, found)


def lines(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("samples_per_s", "communication_share", "input_share", "time_s")
    return [{k: v for k, v in r.items() if k not in times} for r in records]


@pytest.mark.parametrize("ranks", [3, 2])
def test_loss_scales_go_through_a_checkpoint(ranks: int, tmp_path: Path) -> None:
    """Cut in mid-window the run goes on to the bit; fewer ranks go on with the least scale."""
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    whole.mkdir(), rest.mkdir()
    simulate(3, begin_run, whole, None)
    skipped = [r["skipped_steps"] for r in lines(whole) if r["kind"] == "train"]
    assert sum(skipped) > 3 and all(math.isfinite(r["loss"]) for r in lines(whole) if r["kind"] == "train")
    place = whole / "checkpoints" / ("step-00000009.h5" if ranks == 3 else "step-00000008.h5")
    simulate(ranks, begin_run, rest, place)
    if ranks == 3:
        assert lines(rest)[-2:] == lines(whole)[-2:]
        a, b = (torch.load(f / "model.pt", weights_only=True)["weight"] for f in (whole, rest))
        assert torch.equal(a, b)


def test_fewer_ranks_go_on_with_the_least_scale() -> None:
    def program(comm: Endpoint) -> tuple[float, int]:
        task = Slope()
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.5)
        inner = InnerStep(task, SlowMo(task.model, optimizer, comm, Local()), Compute(precision="float16"), 0.0)
        state = inner.state_dict()
        inner.load_state_dict(state | {"scale": 2.0 ** (10 + comm.rank), "_growth_tracker": 5}, ranks=7)
        return inner.scale, inner.state_dict()["_growth_tracker"]

    assert simulate(3, program) == [(1024.0, 0)] * 3


def test_a_loss_that_no_scale_helps_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(SlowmoError, match=r"On rank \d the gradient is inf or nan however the loss is scaled"):
        simulate(2, begin_run, tmp_path, None, "task.batch_size=300", "run.steps=40", "run.log_every=40")


# ---- bfloat16, accumulation, clipping, memory order ----
def test_precision_is_that_of_the_products_alone() -> None:
    for precision in ("float32", "bfloat16", "float16"):
        r = simulate(1, take, Local(), Compute(precision=precision), [[rows(0.25, 0, 0, 0)]])[0]
        assert r["seen"] == [(4, getattr(torch, precision))]
        assert r["w"].dtype == torch.float32 and float(r["w"][0]) == -0.125


def test_the_model_is_measured_in_the_precision_it_is_trained_in() -> None:
    def program(comm: Endpoint) -> set[torch.dtype]:
        task = Slope()
        task.test = Rows()  # type: ignore[assignment]
        worker = SlowMo(task.model, torch.optim.SGD(task.model.parameters(), lr=0.5), comm, Local())
        evaluate(InnerStep(task, worker, Compute(precision="bfloat16"), 0.0), workers=True)
        return {dtype for _, dtype in task.seen}

    assert simulate(2, program) == [{torch.bfloat16}] * 2


@TWO
@pytest.mark.parametrize("base", [AllReduce(), SGP()], ids=lambda b: type(b).__name__)
def test_micro_batches_are_one_step_and_communicate_once(world: Simulated | Real, base: Base) -> None:
    feeds = [[rows(0.1 * i + rank, 0.3, i, 1) for i in range(8)] for rank in range(2)]
    joined = [[torch.cat(f[:4]), torch.cat(f[4:])] for f in feeds]
    parts = world.run(take, base, Compute(accumulate=4), feeds)
    whole = world.run(take, base, Compute(), joined)
    for a, b in zip(parts, whole, strict=True):
        assert [n for n, _ in a["seen"]] == [4] * 8 and [n for n, _ in b["seen"]] == [16] * 2
        assert a["counts"] == b["counts"] == (2, 1)
        assert a["sent"] == b["sent"] > 0
        assert torch.allclose(a["w"], b["w"], atol=1e-6) and a["w"].abs().min() > 0


@TWO
def test_the_averaged_gradient_is_clipped(world: Simulated | Real) -> None:
    """The ranks' gradients cancel but for 0.125 in the second direction: clipped to 0.1, the step is 0.05 long."""
    feeds = [[rows(0.5, 0, 0, 0)], [rows(-0.5, 0.25, 0, 0)]]
    for settings in ({"base": AllReduce()}, {"base": SGP("exponential"), "ranks_per_worker": 2}):
        base: Any = settings.pop("base")
        for r in world.run(clipped, base, feeds, settings):
            assert torch.allclose(r["w"], torch.tensor([0, -0.05, 0, 0]), atol=1e-6)
            assert float(r["metrics"]["grad_norm"]) == pytest.approx(0.125)
    for r, length in zip(world.run(clipped, Local(), feeds, {}), (0.5, math.hypot(0.5, 0.25)), strict=True):
        assert float(r["w"].norm()) == pytest.approx(0.05, rel=1e-4)
        assert float(r["metrics"]["grad_norm"]) == pytest.approx(length)


def clipped(comm: Endpoint, base: Base, feeds: list[list[Tensor]], settings: dict[str, Any]) -> dict[str, Any]:
    return take(comm, base, Compute(), feeds, clip_norm=0.1, **settings)


def test_clipping_comes_after_unscaling() -> None:
    r = simulate(1, take, Local(), Compute(precision="float16"), [[rows(0.25, 0, 0, 0)]], 0.1)[0]
    assert float(r["w"][0]) == pytest.approx(-0.05, rel=1e-4)


class Pictures(Slope):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 1))
        self.orders: list[bool] = []

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        convolution: Any = self.model[0]
        seen = batch, convolution.weight, convolution(batch)
        self.orders += [x.is_contiguous(memory_format=torch.channels_last) for x in seen]
        return model(batch).square().mean(), {}


def pictures(comm: Endpoint, compute: Compute, base: Base) -> dict[str, Any]:
    torch.manual_seed(0)
    task = Pictures()
    model = prepare(task.model, compute, comm.device)
    worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, base, tau=2, beta=0.5)
    inner = InnerStep(task, worker, compute, 0.0)
    generator = torch.Generator().manual_seed(comm.rank)
    feed: Iterator[Tensor] = (torch.randn(6, 3, 8, 8, generator=generator) for _ in range(3))
    for _ in range(3):
        inner.take(feed)
    worker.close()
    weights = torch.cat([p.detach().contiguous().flatten() for p in model.parameters()])
    return {"orders": task.orders, "weights": weights, "polls": type(worker._poller).__name__}


def test_channels_last() -> None:
    plain = simulate(2, pictures, Compute(), SGP())
    last = simulate(2, pictures, Compute(channels_last=True), SGP())
    assert not any(plain[0]["orders"]) and all(last[0]["orders"])
    assert torch.allclose(plain[1]["weights"], last[1]["weights"], atol=1e-5)


# ---- torch.compile ----
@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.compile without a C++ compiler: the graphs are traced and differentiated, and run as they are."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("base", [AllReduce(), OSGP()], ids=lambda b: type(b).__name__)
def test_a_compiled_model_trains_alike_and_its_gradients_still_meet(
    base: Base, graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    polled: list[int] = []
    poll = Hooks._poll

    def counted(hooks: Hooks, *told: Any) -> None:
        if not torch.compiler.is_compiling():
            polled.append(len(told))  # 1 for a parameter's gradient, 3 for a layer's output
        poll(hooks, *told)

    plain = simulate(2, pictures, Compute(), base)
    assert not graphs["stats"]
    monkeypatch.setattr(Hooks, "_poll", counted)
    compiled = simulate(2, pictures, Compute(compile=True), base)
    assert graphs["stats"]["unique_graphs"] == 1, "a graph for all steps and ranks, of the whole model"
    assert not graphs["graph_break"]
    assert polled.count(1) == 2 * 3 * 6, "ranks, steps, parameters"
    for a, b in zip(plain, compiled, strict=True):
        assert torch.allclose(a["weights"], b["weights"], atol=1e-5)
    if isinstance(base, AllReduce):
        assert torch.equal(compiled[0]["weights"], compiled[1]["weights"])


def test_a_thread_polls_for_a_compiled_model() -> None:
    def ways(threads: bool) -> list[str]:
        comm: Any = SimpleNamespace(allows_threads=threads)
        return [progress(way, Compute(compile=c), comm) for c in (False, True) for way in ("auto", "hooks")]

    assert ways(True) == ["auto", "hooks", "thread", "hooks"]
    assert ways(False) == ["auto", "hooks", "auto", "hooks"]


# ---- the keys, through train ----
DIGITS = """
[run]
epochs = 2
log_every = 1
[task]
name = "digits"
batch_size = 75
hidden = 8
[optimizer]
lr = 0.05
[slowmo]
tau = 6
beta = 0.3
[checkpoint]
every = 0
"""


def digits(comm: Endpoint, folder: Path, *overrides: str) -> dict[str, Any]:
    return train(config.parse(DIGITS, "a test", overrides), comm, folder)


class Shown:
    """Keeps what is told before the first step."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, lines: list[str], first: int, steps: int) -> None:
        self.lines = lines

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.mark.parametrize("worker, words", [("2", "2 to a worker, on cpu"), ("node", "all one worker (run.worker), on")])
def test_how_ranks_make_workers_is_told(worker: str, words: str, tmp_path: Path) -> None:
    """A recipe whose workers are nodes has nobody to exchange with on one host."""
    shown = Shown()
    settings = config.parse(DIGITS, "a test", [f"run.worker={worker}", "run.epochs=0", "run.steps=1"])
    simulate(4, lambda comm: train(settings, comm, tmp_path, shown if comm.rank == 0 else None))
    assert [line for line in shown.lines if line.startswith(f"4 ranks, simulated, {words}")]


def test_every_key_of_compute_reaches_the_loop(tmp_path: Path, graphs: Any) -> None:
    keys = ["precision=bfloat16", "accumulate=3", "compile=true", "channels_last=true"]
    shown = Shown()
    overrides = [f"compute.{key}" for key in keys] + ["optimizer.clip_norm=0.01", "run.epochs=0", "run.steps=2"]
    simulate(1, lambda comm: train(config.parse(DIGITS, "a test", overrides), comm, tmp_path, shown))
    line = "bfloat16 autocast, 3 micro-batches per step, compiled, channels last, gradient clipped to norm 0.01"
    assert line in shown.lines
    assert graphs["stats"]["unique_graphs"] > 0
    records = lines(tmp_path)
    assert records[0]["grad_norm"] > 0.01


@pytest.mark.parametrize("unit, warmup", [("steps", 4.0), ("epochs", 0.5), ("auto", 0.5)])
def test_the_schedule_counts_in_its_unit_and_scales_linearly(unit: str, warmup: float, tmp_path: Path) -> None:
    """2 ranks of 75 samples make 10 steps an epoch and twice the reference batch, so twice the rate."""
    overrides = [f"optimizer.unit={unit}", f"optimizer.warmup={warmup}", "optimizer.warmup_from=0.02"]
    simulate(2, digits, tmp_path, *overrides, "optimizer.reference_batch=75", "optimizer.schedule=cosine")
    rates = [r["lr"] for r in lines(tmp_path) if r["kind"] == "train"]
    length, first = (20, warmup) if unit == "steps" else (2.0, warmup)
    for step, rate in enumerate(rates):
        now = step * length / 20
        slope = (0.1 - 0.02) / first
        wanted = (
            0.02 + slope * now if now < first else 0.05 * (1 + math.cos(math.pi * (now - first) / (length - first)))
        )
        assert rate == pytest.approx(wanted), step
    assert len(rates) == 20


def test_label_smoothing_is_of_the_loss_to_train_on_alone() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]), torch.tensor([0, 2])
    log_p = logits.log_softmax(1)
    own = log_p[torch.arange(2), labels]
    for smoothing in (0.0, 0.3):
        task = Classification(nn.Identity(), lambda: (Rows(), Rows()), smoothing)
        loss, _ = task.loss(task.model, (logits, labels))
        assert float(loss) == pytest.approx(float(-((1 - smoothing) * own + smoothing * log_p.mean(1)).mean()))
        scores = task.score(task.evaluate(task.model, (logits, labels)))
        assert scores == pytest.approx({"loss": float(-own.mean()), "accuracy": 0.5})
    for name in ("digits", "fashion-mnist"):
        made = tasks.build(name, {"label_smoothing": 0.2}, tasks.Context(0, 1, 0))
        assert made.label_smoothing == 0.2  # type: ignore[attr-defined]


def test_top5() -> None:
    logits = torch.arange(10.0).repeat(4, 1)
    task = Classification(nn.Identity(), lambda: (Rows(), Rows()), top5=True)
    sums = task.evaluate(task.model, (logits, torch.tensor([9, 5, 4, 0])))
    assert {k: v for k, v in task.score(sums).items() if k != "loss"} == {"accuracy": 0.25, "top5": 0.5}
    broken = task.evaluate(task.model, (torch.full((4, 10), math.nan), torch.tensor([9, 8, 7, 6])))
    assert math.isnan(task.score(broken)["loss"])


# ---- evaluation ----
class Counting(Slope):
    """Measured by a quotient of sums, as BLEU is: no mean over batches gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.test: Any = Rows()
        self.evaluation_batch = 7

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        assert not model.training and len(batch) <= 7
        out = model(batch.clamp(max=1)).double()
        return {"counts": torch.stack([out.sum(), out.square().sum()]), "samples": torch.tensor(len(batch))}

    def score(self, sums: dict[str, Tensor]) -> dict[str, float]:
        assert int(sums["samples"]) == 1200
        return {"quotient": float(sums["counts"][0] / sums["counts"][1])}


def measured(comm: Endpoint, per_worker: int) -> tuple[dict[str, float], float, bool]:
    """Workers whose models differ: w is 1 + the worker's number in each place; and what the last says alone."""
    task = Counting()
    worker = SlowMo(
        task.model, torch.optim.SGD(task.model.parameters(), lr=0.1), comm, Local(), ranks_per_worker=per_worker
    )
    mine = 1.0 + worker.team.across.rank
    with torch.no_grad():
        worker.state.flat.buffers[0][:4] = mine
    result = evaluate(InnerStep(task, worker, Compute(), 0.0), workers=True)
    left_alone = bool((task.model.weight == mine).all()) and task.model.training
    task.model.eval()
    task.evaluation_batch = 1200
    with torch.no_grad():
        out = task.model(Rows().batch(torch.arange(1200)).clamp(max=1)).double()
    return result, float(out.sum() / out.square().sum()), left_alone


@pytest.mark.parametrize("ranks, per_worker", [(1, 1), (3, 1), (4, 2)])
def test_the_average_and_each_worker_are_measured(ranks: int, per_worker: int) -> None:
    """The quotient falls as 1/w: of m workers the least is the last's, and the average's that of w = (m + 1) / 2."""
    results = simulate(ranks, measured, per_worker)
    workers = ranks // per_worker
    one = results[0][1]
    for result, alone, left_alone in results:
        assert left_alone
        assert result["quotient_max"] == pytest.approx(one, rel=1e-5)
        assert result["quotient_min"] == pytest.approx(one / workers, rel=1e-5)
        assert result["quotient_mean"] == pytest.approx(sum(one / (i + 1) for i in range(workers)) / workers, rel=1e-5)
        assert result["quotient"] == pytest.approx(one / ((workers + 1) / 2), rel=1e-5)
        assert one / workers <= alone * (1 + 1e-5)


def test_measuring_the_workers_changes_nothing_and_is_told(tmp_path: Path) -> None:
    models = []
    for workers in ("true", "false"):
        folder = tmp_path / workers
        folder.mkdir()
        simulate(3, digits, folder, f"run.eval_workers={workers}", "base.algorithm=osgp", "slowmo.tau=8")
        models.append(torch.load(folder / "model.pt", weights_only=True))
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    record = next(r for r in lines(tmp_path / "true") if r["kind"] == "eval")
    assert record["accuracy_min"] < record["accuracy_mean"] < record["accuracy_max"]
    told = metrics_of(record)
    assert told.count("\n") == 0 and f"  workers: loss {record['loss_min']:.4f} to {record['loss_max']:.4f}" in told
    steps = [r for r in lines(tmp_path / "true") if r["kind"] == "train"]
    assert all(r["loss_min"] < r["loss"] < r["loss_max"] for r in steps)


def test_samples_that_work_ahead_are_asked_in_order_and_closed() -> None:
    closed = []

    class Ahead(Rows):
        def batches(self, order: Any) -> Any:
            try:
                yield from order
            finally:
                closed.append(True)

    wanted = [(0, torch.tensor([1])), (1, torch.tensor([2]))]
    feed = tasks.batches(Ahead(), wanted)
    assert next(feed) is not None
    feed.close()
    assert closed
    assert [b.shape[0] for b in tasks.batches(Rows(), wanted)] == [1, 1]


# ---- recipes ----
RANKS = {"cifar10": 32, "imagenet": 256, "wmt16": 64}


@pytest.mark.parametrize("task", presets.RECIPES)
def test_each_row_of_the_papers_tables_is_a_configuration(task: str) -> None:
    text, seen = presets.commented(task), set()
    for name, value, keys in presets.RECIPES[task].rows:
        settings = config.parse(text, task, keys.split())
        seen.add(config.dump(settings))
        shown = f"{name:<29}{value:<10}{' '.join('--set ' + k for k in keys.split())}".rstrip()
        assert f"# {shown}\n" in text
        assert ("SlowMo" in name) == (settings.slowmo.tau > 0 and settings.slowmo.beta > 0)
        assert ("AR" in name) == (settings.base.algorithm == "allreduce")
        assert settings.slowmo.tau in ((0, 12) if task == "cifar10" or "Local" in name else (0, 48))
        tasks.check_options(task, settings.task.options)
    assert len(seen) == len(presets.RECIPES[task].rows)


def test_recipes_have_the_papers_settings() -> None:
    made = {task: config.parse(presets.commented(task)) for task in presets.RECIPES}
    batch = {task: c.task.batch_size * RANKS[task] for task, c in made.items()}
    assert batch["cifar10"] == 4096 and batch["imagenet"] == 8192
    assert 150_000 < batch["wmt16"] * made["wmt16"].task.options["max_tokens"] < 250_000
    assert [made[t].run.epochs for t in RANKS] == [200, 90, 25]
    assert [made[t].run.worker for t in RANKS] == ["rank", "node", "node"]
    assert [made[t].slowmo.buffers for t in RANKS] == ["reset", "reset", "maintain"]
    for task, drops in (("cifar10", (100, 150, 175)), ("imagenet", (30, 60, 80))):
        opt = scaled(made[task].optimizer, batch[task])
        assert opt.lr == pytest.approx(3.2) and opt.nesterov and opt.momentum == 0.9 and opt.weight_decay == 1e-4
        assert learning_rate(opt, 0, 200) == pytest.approx(0.1)
        assert learning_rate(opt, 2.5, 200) == pytest.approx(1.65)
        for passed, at in enumerate(drops):
            assert learning_rate(opt, at - 0.01, 200) == pytest.approx(3.2 * 0.1**passed)
            assert learning_rate(opt, at, 200) == pytest.approx(3.2 * 0.1 ** (passed + 1))
    wmt = made["wmt16"]
    assert wmt.unit == "steps" and wmt.optimizer.betas == [0.9, 0.98]
    rates = [learning_rate(wmt.optimizer, step, 1e5) for step in (0, 2000, 4000, 16000)]
    assert rates == pytest.approx([1e-7, (1e-7 + 5e-4) / 2, 5e-4, 2.5e-4])
    assert (wmt.task.options["label_smoothing"], wmt.task.options["dropout"]) == (0.1, 0.3)


# ---- what is refused ----
@pytest.mark.parametrize(
    "overrides, words",
    [
        (["compute.precision=half"], ['compute.precision = "half"', "float32, bfloat16, float16"]),
        (["compute.accumulate=4"], ["task.batch_size = 75", "compute.accumulate = 4", "task.batch_size=76"]),
        (["compute.accumulate=0"], ["compute.accumulate = 0 is out of range"]),
        (["optimizer.warmup_from=0.1"], ["optimizer.warmup_from = 0.1", "optimizer.warmup is 0"]),
        (["optimizer.clip_norm=-1"], ["optimizer.clip_norm = -1 is out of range"]),
        (["optimizer.unit=days"], ['optimizer.unit = "days"', "auto, epochs, steps"]),
        (
            ["compute.precision=float16", "comm.dtype=bfloat16", "base.algorithm=allreduce"],
            ['compute.precision = "float16"', 'comm.dtype = "bfloat16"', "--set compute.precision=bfloat16"],
        ),
        (
            ["compute.compile=true", "slowmo.sharded=true", "slowmo.overlap=true"],
            ["slowmo.overlap", "compute.compile", "--set slowmo.overlap=false"],
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        config.parse(DIGITS, "a test", overrides)
    assert all(word in f"{caught.value}" for word in words), str(caught.value)


def test_label_smoothing_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match=r"task.label_smoothing = 1 is not in \[0, 1\)"):
        tasks.build("digits", {"label_smoothing": 1}, tasks.Context(0, 1, 0))


def test_another_unit_of_the_schedule_is_another_run() -> None:
    def made(*overrides: str) -> config.Config:
        return config.parse(DIGITS, "a test", overrides)

    steps = ("run.epochs=0", "run.steps=20")
    assert config.changed(made(), made("run.epochs=3")) == []
    assert config.changed(made(), made(*steps)) == ["run.epochs", "run.steps"]
    assert config.changed(made("optimizer.unit=steps"), made("optimizer.unit=steps", *steps)) == []
