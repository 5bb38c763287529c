"""What `slowmo init TASK` starts from: settings that train each built-in task well."""

from __future__ import annotations

import inspect
from typing import Any

from . import tasks
from .config import Config, Optimizer, Run, Slow, Task, dump

SGD: dict[str, Any] = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
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
}


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
    full = Config(
        run=config.run, optimizer=config.optimizer, base=config.base, slowmo=config.slowmo, comm=config.comm,
        task=Task(name=task, batch_size=config.task.batch_size, data=config.task.data, options=own),
    )  # fmt: skip
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    missing = "".join(f"# {name} =   # the task needs this key, in [task]\n" for name in required)
    return f"# slowmo train THIS_FILE -n 4\n{missing}\n{dump(full, comments=True)}"
