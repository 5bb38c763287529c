"""The loop from a configuration: run folder, metrics, data order, rates, the dry run against the real one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import Real, Simulated

from slowmo_mpi import config, presets, simulate
from slowmo_mpi.comm import Endpoint
from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.optim import learning_rate, make
from slowmo_mpi.plan import plan
from slowmo_mpi.train import BASES, train

DIGITS = """
[run]
steps = 30
log_every = 6
eval_every = 15
[task]
name = "digits"
batch_size = 8
hidden = 16
[optimizer]
lr = 0.05
momentum = 0.9
[slowmo]
tau = 6
beta = 0.3
"""


def parse(*overrides: str) -> config.Config:
    return config.parse(DIGITS, "a test", overrides)


def run(comm: Endpoint, settings: config.Config, folder: Path) -> dict[str, Any]:
    return train(settings, comm, folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


TIMES = ("samples_per_s", "communication_share", "input_share", "time_s")


@pytest.mark.parametrize("algorithm", BASES)
@pytest.mark.parametrize("world", ["mpi-2", "mpi-4"], indirect=True)
def test_a_run_is_the_same_simulated_and_real(world: Real, algorithm: str, tmp_path: Path) -> None:
    """Every number of metrics.jsonl but the times, and the model's every bit."""
    graph = ["base.topology=ring-bidirectional"] if algorithm == "dpsgd" else []
    settings = parse(f"base.algorithm={algorithm}", *graph)
    for kind in ("real", "simulated"):
        (tmp_path / kind).mkdir()
    last = world.run(run, settings, tmp_path / "real")[0]
    simulate(world.ranks, run, settings, tmp_path / "simulated")
    real, simulated = lines(tmp_path / "real"), lines(tmp_path / "simulated")
    for a, b in zip(real, simulated, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
    assert last["accuracy"] == real[-1]["accuracy"] and last["accuracy"] > 0.3
    models = [torch.load(tmp_path / kind / "model.pt", weights_only=True) for kind in ("real", "simulated")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])


def test_the_run_folder(tmp_path: Path) -> None:
    settings = parse("slowmo.sharded=true")
    simulate(2, run, settings, tmp_path)
    assert config.load(tmp_path / "config.toml") == settings
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (
        manifest["ranks"] == 2 and manifest["result"] == "done" and manifest["versions"]["torch"] == torch.__version__
    )
    records = lines(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "train"] == [6, 12, 18, 24, 30]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [15, 30]
    for r in records:
        wanted = {"kind", "step", "epoch", "time_s", "loss", "accuracy", "consensus"}
        wanted |= (
            {"lr", "samples_per_s", "communication_share", "input_share", "sent_bytes_per_step", "loss_min", "loss_max"}
            if r["kind"] == "train"
            else set()
        )
        assert set(r) == wanted
        assert all(isinstance(v, str) or math.isfinite(v) for v in r.values())


def test_evaluating_more_often_changes_nothing(tmp_path: Path) -> None:
    models = []
    for every in ("1", "30"):
        folder = tmp_path / every
        folder.mkdir()
        simulate(3, run, parse("base.algorithm=osgp", "base.delay=2", f"run.eval_every={every}"), folder)
        models.append(torch.load(folder / "model.pt", weights_only=True))
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])


PLANS = [
    [],
    ["base.algorithm=allreduce"],
    ["base.algorithm=local", "slowmo.tau=5"],
    ["slowmo.tau=0"],
    ["base.algorithm=osgp", "base.delay=2"],
    ["base.algorithm=osgp", "base.delay=1", "slowmo.tau=0"],
    ["slowmo.average=none"],
    ["base.topology=exponential-two-peer", "slowmo.sharded=true"],
    ["optimizer.name=adam", "slowmo.buffers=average"],
    ["run.worker=2"],
    ["run.worker=2", "slowmo.sharded=true", "slowmo.tau=5"],
    ["comm.dtype=bfloat16"],
    # An evaluation would wait for the average under way, and what is sent meanwhile is not the training's.
    ["slowmo.average=delayed", "slowmo.tau=5", "run.eval_every=180"],
    ["slowmo.average=delayed", "slowmo.tau=5", "run.eval_every=180", "comm.dtype=bfloat16", "base.algorithm=local"],
    ["comm.dtype=float16", "base.algorithm=osgp", "base.delay=2", "slowmo.tau=5"],
    ["comm.dtype=bfloat16", "base.algorithm=allreduce", "slowmo.tau=0"],
    ["base.algorithm=allreduce", "slowmo.tau=0", "compute.accumulate=4", "compute.precision=bfloat16"],
    ["run.worker=2", "compute.accumulate=2", "optimizer.clip_norm=1"],
    ["comm.dtype=bfloat16", "base.algorithm=local", "slowmo.tau=5", "run.worker=2"],
]


@pytest.mark.parametrize("overrides", PLANS, ids=" ".join)
def test_the_plan_foretells_the_bytes(overrides: list[str], tmp_path: Path) -> None:
    overrides = ["optimizer.momentum=0.9", *overrides]
    text = DIGITS.replace("momentum = 0.9\n", "")
    if "optimizer.name=adam" in overrides:
        overrides = overrides[1:]
    settings = config.parse(text, "a test", [*overrides, "run.log_every=180", "run.steps=180"])
    simulate(4, run, settings, tmp_path)
    measured = next(r["sent_bytes_per_step"] for r in lines(tmp_path) if r["kind"] == "train")
    p = plan(settings, 4)
    assert p.base_bytes_per_step + p.outer_bytes_per_step == pytest.approx(measured, rel=0.03)
    assert p.steps == 180


def test_the_plan_counts_memory() -> None:
    p = plan(parse("slowmo.sharded=true"), 4)
    assert p.parameters == 64 * 16 + 16 + 16 * 10 + 10
    padded = p.model_bytes
    assert 4 * p.parameters <= padded < 4 * p.parameters + 4 * 64
    assert p.gradient_bytes == padded and p.slow_bytes == 2 * padded // 4
    assert p.optimizer_bytes == 4 * p.parameters  # SGD's momentum
    narrow = plan(parse("slowmo.sharded=true", "compute.precision=bfloat16"), 4)
    assert narrow.cast_bytes == 2 * p.parameters and narrow.memory_bytes == p.memory_bytes + narrow.cast_bytes


def test_the_same_samples_whatever_the_algorithm(tmp_path: Path) -> None:
    """AllReduce on 4 ranks of 8 samples takes the steps of 1 rank of 32, to rounding."""
    losses = []
    for ranks, batch in ((4, 8), (1, 32)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        settings = parse("base.algorithm=allreduce", "slowmo.tau=0", f"task.batch_size={batch}")
        simulate(ranks, run, settings, folder)
        losses.append([r["loss"] for r in lines(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(SlowmoError, match=r"loss became inf or nan at step \d+ on rank \d"):
        simulate(2, run, parse("optimizer.lr=1e30"), tmp_path)


@pytest.mark.parametrize(
    "settings, time, wanted",
    [
        ({}, 5.0, 0.4),
        ({"warmup": 2.0}, 0.0, 0.0),
        ({"warmup": 2.0, "warmup_from": 0.2}, 0.0, 0.2),
        ({"warmup": 2.0, "warmup_from": 0.2}, 1.0, 0.3),
        ({"warmup": 2.0, "warmup_from": 0.8}, 1.0, 0.4),  # never above the rate it leads to
        ({"warmup": 2.0, "warmup_from": 0.2, "schedule": "cosine"}, 1.0, 0.3),
        ({"warmup": 2.0}, 1.5, 0.3),
        ({"warmup": 2.0}, 2.0, 0.4),
        ({"schedule": "step", "milestones": [3.0, 6.0]}, 2.99, 0.4),
        ({"schedule": "step", "milestones": [3.0, 6.0]}, 3.0, 0.04),
        ({"schedule": "step", "milestones": [3.0, 6.0], "factor": 0.5}, 7.0, 0.1),
        ({"schedule": "cosine"}, 5.0, 0.2),
        ({"schedule": "cosine"}, 10.0, 0.0),
        ({"schedule": "cosine", "warmup": 2.0}, 6.0, 0.2),
        ({"schedule": "inverse-sqrt", "warmup": 2.0}, 8.0, 0.2),
        ({"schedule": "inverse-sqrt", "warmup": 2.0}, 2.0, 0.4),
        ({"schedule": "inverse-sqrt"}, 4.0, 0.2),
        ({"schedule": "inverse-sqrt"}, 0.0, 0.4),
    ],
)
def test_learning_rates(settings: dict[str, Any], time: float, wanted: float) -> None:
    assert learning_rate(config.Optimizer(lr=0.4, **settings), time, 10.0) == pytest.approx(wanted, abs=1e-12)


def test_optimizers() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    made = make(config.Optimizer(name="sgd", lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.1), parameters)
    assert made.defaults["nesterov"] and made.defaults["momentum"] == 0.9 and made.defaults["weight_decay"] == 0.1
    made = make(config.Optimizer(name="adamw", lr=0.2, betas=[0.8, 0.9]), parameters)
    assert made.defaults["betas"] == (0.8, 0.9) and made.defaults["weight_decay"] == 0.0
    made = make(config.Optimizer(name="torch.optim:RMSprop", lr=0.2, options={"alpha": 0.5}), parameters)
    assert isinstance(made, torch.optim.RMSprop) and made.defaults["alpha"] == 0.5
    for bad in (
        config.Optimizer(name="torch.optim:RMSpop"),
        config.Optimizer(name="torch.optim:SGD", options={"x": 1}),
    ):
        with pytest.raises(UsageError):
            make(bad, parameters)


@pytest.mark.parametrize("task", sorted(set(presets.PRESETS) - set(presets.RECIPES)))
@pytest.mark.parametrize("world", ["simulated-2"], indirect=True)
def test_presets_train(world: Simulated, task: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from slowmo_mpi import tasks

    settings = presets.PRESETS[task]
    if task == "fashion-mnist":
        try:
            tasks.check_data(task, tasks.build(task, {}, tasks.Context(0, 1, 0)))
        except SlowmoError as error:
            import os

            if os.environ.get("SLOWMO_CI"):
                raise
            pytest.skip(str(error))
    short = replace(settings, run=replace(settings.run, epochs=0, steps=4, log_every=2))
    last = world.run(run, short, tmp_path)[0]
    assert last["step"] == 4 and math.isfinite(last["loss"])
