"""What `slowmo init TASK` starts from: settings that train each built-in task well, or those of the paper's tables.

Rates that the paper does not give are those of the linear scaling rule (Goyal et al. 2017), for any number of ranks.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from . import tasks
from .config import Config, Optimizer, Run, Slow, Task, dump

SGD: dict[str, Any] = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
BY_EPOCHS: dict[str, Any] = SGD | {"schedule": "step", "unit": "epochs", "warmup": 5, "warmup_from": 0.1}
PRESETS = {
    "fashion-mnist": Config(
        run=Run(name="fashion-mnist", epochs=3),
        task=Task(name="fashion-mnist", batch_size=32),
        optimizer=Optimizer(**SGD | {"lr": 0.05}, schedule="cosine", warmup=0.2),
        slowmo=Slow(tau=48, beta=0.2),
    ),
    "digits": Config(
        run=Run(name="digits", epochs=30),
        task=Task(name="digits", batch_size=16),
        optimizer=Optimizer(**SGD | {"lr": 0.05}),
        slowmo=Slow(tau=12, beta=0.2),
    ),
    "quadratic": Config(
        run=Run(name="quadratic", steps=1000),
        task=Task(name="quadratic", batch_size=1),
        optimizer=Optimizer(name="sgd", lr=0.02),
        slowmo=Slow(tau=12, beta=0.6),
    ),
    "cifar10": Config(
        run=Run(name="cifar10", epochs=200, eval_workers=True),
        task=Task(name="cifar10", batch_size=128, data="data/cifar10"),
        optimizer=Optimizer(**BY_EPOCHS, reference_batch=128, milestones=[100, 150, 175]),
        slowmo=Slow(tau=12, beta=0.6),
    ),
    "imagenet": Config(
        run=Run(name="imagenet", epochs=90, eval_workers=True, worker="node"),
        task=Task(name="imagenet", batch_size=32, data="data/imagenet"),
        optimizer=Optimizer(**BY_EPOCHS, reference_batch=256, milestones=[30, 60, 80]),
        slowmo=Slow(tau=48, beta=0.6),
    ),
    "wmt16": Config(
        run=Run(name="wmt16", epochs=25, eval_workers=True, worker="node"),
        task=Task(name="wmt16", batch_size=1, data="data/wmt16"),
        optimizer=Optimizer(
            name="adam",
            lr=5e-4,
            betas=[0.9, 0.98],
            schedule="inverse-sqrt",
            unit="steps",
            warmup=4000,
            warmup_from=1e-7,
        ),
        slowmo=Slow(tau=48, beta=0.5, buffers="maintain"),
    ),
}


@dataclass(frozen=True)
class Recipe:
    """One of the paper's experiments. rows: a row of its tables, the validation number there, and what to --set."""

    about: str
    launch: str
    measure: str
    rows: tuple[tuple[str, str, str], ...]


LOCAL_AVERAGED = "base.algorithm=local slowmo.tau=12 slowmo.beta=0 slowmo.buffers="
ALLREDUCE = "base.algorithm=allreduce slowmo.tau=0"
RECIPES = {
    "cifar10": Recipe(
        "ResNet-18 on CIFAR-10: 32 workers of one GPU, global batch 4096.",
        "srun --mpi=pmix -n 32 slowmo train THIS_FILE",
        "accuracy",
        (
            ("SGP + SlowMo", "94.32", ""),
            ("SGP", "93.90", "slowmo.tau=0"),
            ("OSGP + SlowMo", "93.74", "base.algorithm=osgp"),
            ("OSGP", "93.17", "base.algorithm=osgp slowmo.tau=0"),
            ("Local SGD + SlowMo", "93.20", "base.algorithm=local"),
            ("Local SGD", "91.73", LOCAL_AVERAGED + "maintain"),
            ("AR-SGD", "92.66", ALLREDUCE),
        ),
    ),
    "imagenet": Recipe(
        "ResNet-50 on ImageNet: 32 workers, each a node of 8 GPUs, global batch 8192.",
        "srun --mpi=pmix -N 32 --ntasks-per-node=8 slowmo train THIS_FILE",
        "accuracy",
        (
            ("SGP + SlowMo", "75.73", ""),
            ("SGP", "75.15", "slowmo.tau=0"),
            ("OSGP + SlowMo", "75.54", "base.algorithm=osgp"),
            ("OSGP", "74.96", "base.algorithm=osgp slowmo.tau=0"),
            ("Local SGD + SlowMo", "73.24", "base.algorithm=local slowmo.tau=12"),
            ("Local SGD", "69.94", LOCAL_AVERAGED + "maintain"),
            ("AR-SGD", "76.00", ALLREDUCE),
            ("SGP + SlowMo, noaverage", "75.78", "slowmo.average=none"),
            ("SGP, double averaging", "75.54", "slowmo.beta=0 slowmo.buffers=average"),
            ("Local SGD, double averaging", "72.04", LOCAL_AVERAGED + "average"),
        ),
    ),
    "wmt16": Recipe(
        "Transformer big on WMT'16 English-German: 8 workers, each a node of 8 GPUs, about 200,000 tokens per step.",
        "srun --mpi=pmix -N 8 --ntasks-per-node=8 slowmo train THIS_FILE",
        "BLEU",
        (
            ("SGP + SlowMo", "27.84", ""),
            ("SGP", "26.92", "slowmo.tau=0"),
            ("Local Adam + SlowMo", "27.14", "base.algorithm=local slowmo.tau=12"),
            ("Local Adam", "26.62", LOCAL_AVERAGED + "maintain"),
            ("AR-Adam", "27.17", ALLREDUCE),
            ("SGP + SlowMo, noaverage, NLL", "2.11 bits", "slowmo.average=none slowmo.beta=0.6"),
        ),
    ),
}
"""The paper's tables (Wang et al., ICLR 2020). Each row's last part: the keys that differ from the preset."""


def head(task: str) -> str:
    """What stands above a configuration: how to start it, and for the paper's experiments the row each --set is."""
    recipe = RECIPES.get(task)
    if recipe is None:
        return "# slowmo train THIS_FILE -n 4\n"
    rows = [(name, value, " ".join(f"--set {key}" for key in keys.split())) for name, value, keys in recipe.rows]
    table = [("row of the paper", recipe.measure, "add to the command"), *rows]
    lines = [
        f"{recipe.about} As in SlowMo (Wang et al., ICLR 2020).",
        recipe.launch,
        "",
        *(f"{name:<29}{value:<10}{keys}".rstrip() for name, value, keys in table),
        "",
        "optimizer.lr and slowmo.beta are starting points, to be tuned for each row. Of fewer GPUs each needs more",
        "samples: --set task.batch_size=N, and --set compute.accumulate=K where memory is short.",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def commented(task: str) -> str:
    """A configuration for `task` as TOML, every key with its meaning, the task's own with their defaults.

    Raises: UsageError where there is no such task.
    """
    parameters = list(inspect.signature(tasks.factory(task)).parameters.values())[1:]
    own = {
        p.name: p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is not p.empty
    }
    config = PRESETS.get(task) or Config(run=Run(epochs=10), task=Task(name=task))
    full = replace(config, task=replace(config.task, options=own | config.task.options))
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    missing = "".join(f"# {name} =   # the task needs this key, in [task]\n" for name in required)
    return f"{head(task)}{missing}\n{dump(full, comments=True)}"
