"""The configuration: typed, read from TOML, overridden by `--set section.key=value`, written back as TOML.

Defaults < file < `--set`. Everything that can be known to be wrong without torch or MPI is refused here, by
name: unknown keys, wrong types, values out of range, combinations that cannot work.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UsageError, did_you_mean


def key(
    default: Any, doc: str, choices: tuple[str, ...] = (), at_least: float | None = None, moves: bool = True
) -> Any:
    """A configuration key: its default, what it means, which values it takes, and whether it moves the trajectory."""
    metadata = {"doc": doc, "choices": choices, "at_least": at_least, "moves": moves}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Run:
    name: str = key("run", "name of the run; the run folder is FOLDER/NAME-DATE-TIME", moves=False)
    folder: str = key("runs", "where run folders are made", moves=False)
    epochs: int = key(0, "length of training in passes over the data; give this or `steps`", at_least=0)
    steps: int = key(0, "length of training in optimizer steps; give this or `epochs`", at_least=0)
    seed: int = key(0, "seed of initial weights, data order and noise", at_least=0)
    log_every: int = key(50, "steps between two lines of metrics.jsonl", at_least=1, moves=False)
    eval_every: int = key(
        0, "steps between evaluations; 0: after every epoch, or once at the end", at_least=0, moves=False
    )
    eval_workers: bool = key(
        False,
        "also evaluate each worker's own model on all test samples: minimum, mean and maximum over workers",
        moves=False,
    )
    worker: str | int = key("rank", 'what one worker is: "rank", "node" (all ranks of a host), or a number of ranks')
    threads: int = key(
        0, "torch threads per rank; 0: this host's cores shared among its ranks", at_least=0, moves=False
    )
    tensorboard: bool = key(False, "also write TensorBoard event files (needs the `tensorboard` extra)", moves=False)
    stop_after: str = key("", 'wall time, such as "5h50m", after which to checkpoint and end with code 75', moves=False)

    def ranks_per_worker(self) -> int | None:
        """What `worker` says without knowing the hosts; None for "node"."""
        return self.worker if isinstance(self.worker, int) else {"rank": 1}.get(self.worker)


@dataclass(frozen=True)
class Task:
    name: str = key(
        "digits", 'quadratic, digits, fashion-mnist, cifar10, imagenet, wmt16, or your own as "package.module:factory"'
    )
    batch_size: int = key(32, "samples per rank and step", at_least=1)
    data: str = key("", "folder of the data; empty: the task's default place", moves=False)
    options: dict[str, Any] = key({}, "the task's own keys, written in [task] beside the others")


@dataclass(frozen=True)
class Optimizer:
    name: str = key("sgd", 'sgd, adam, adamw, or any torch optimizer as "package.module:Class"')
    lr: float = key(0.1, "learning rate gamma (after warm-up)", at_least=0)
    momentum: float | None = key(None, "sgd: momentum (default 0)", at_least=0)
    nesterov: bool | None = key(None, "sgd: Nesterov momentum (default false)")
    betas: list[float] | None = key(None, "adam, adamw: decay of the two moments (default [0.9, 0.999])")
    weight_decay: float = key(0.0, "weight decay (decoupled for adamw)", at_least=0)
    clip_norm: float = key(
        0.0, "the gradient's largest global norm: a longer one is scaled down to it; 0: no clipping", at_least=0
    )
    reference_batch: int = key(
        0,
        "linear scaling rule: `lr` is for a global batch of so many samples, and grows in proportion; 0: `lr` as it is",
        at_least=0,
    )
    schedule: str = key(
        "constant", "how the rate goes on after warm-up", choices=("constant", "step", "cosine", "inverse-sqrt")
    )
    unit: str = key(
        "auto",
        "what `warmup` and `milestones` count; auto: steps where run.steps is given, else epochs",
        choices=("auto", "epochs", "steps"),
    )
    warmup: float = key(0.0, "length of the linear warm-up, in `unit`", at_least=0)
    warmup_from: float = key(0.0, "the rate that warm-up starts from", at_least=0)
    milestones: list[float] = key([], "step: when the rate drops, in `unit`")
    factor: float = key(0.1, "step: what the rate is multiplied by at each milestone", at_least=0)
    options: dict[str, Any] = key({}, "further arguments of an optimizer of your own, in [optimizer]")


@dataclass(frozen=True)
class Compute:
    precision: str = key(
        "float32",
        "type of the model's matrix products, under autocast; parameters, gradients and optimizer stay as they are, "
        "and float16 comes with loss scaling",
        choices=("float32", "bfloat16", "float16"),
    )
    accumulate: int = key(
        1, "micro-batches that a step's task.batch_size samples are computed in, one after the other", at_least=1
    )
    compile: bool = key(False, "compile the model with torch.compile")
    channels_last: bool = key(False, "memory order of images and convolutions with the channels last")
    vmap: bool = key(
        False,
        "simulated ranks: the gradients of all in one torch.vmap; faster for some small models, not the same bits",
    )


@dataclass(frozen=True)
class Base:
    algorithm: str = key(
        "sgp", "base algorithm of the inner steps", choices=("allreduce", "local", "dpsgd", "sgp", "osgp")
    )
    topology: str = key(
        "exponential", 'who talks to whom (dpsgd, sgp, osgp): a family, "family:key=value", or a TOML file'
    )
    delay: int = key(1, "osgp: steps from posting an exchange to taking it in; 0 is sgp", at_least=0)


@dataclass(frozen=True)
class Slow:
    tau: int = key(48, "inner steps per round; 0: no outer step, the base algorithm alone", at_least=0)
    alpha: float = key(1.0, "slow learning rate", at_least=0)
    beta: float = key(0.6, "slow momentum, 0 <= beta < 1; 0.2 suits 4 workers, 0.6 suits 16 and more", at_least=0)
    buffers: str = key("reset", "the optimizer's buffers when a round starts", choices=("reset", "maintain", "average"))
    average: str = key(
        "exact",
        "line 6: exact average; none (`noaverage`); delayed: made while the next round computes (CO2)",
        choices=("exact", "none", "delayed"),
    )
    gamma: str = key("mean", "gamma of lines 7-8, the round's mean rate or its last step's", choices=("mean", "last"))
    sharded: bool = key(False, "keep 1/m of anchor and slow momentum on each of the m ranks", moves=False)
    overlap: bool = key(
        False, "sharded: let the new anchor arrive while the next forward pass already computes", moves=False
    )


@dataclass(frozen=True)
class Comm:
    dtype: str = key(
        "float32",
        "how gossip, exact averages and gradients travel: as they are (float32), or rounded to half the bytes, where "
        "what rounding takes is kept and sent later",
        choices=("float32", "bfloat16", "float16"),
    )
    timeout: float = key(300.0, "seconds after which a wait for another rank is an error", at_least=0.1, moves=False)
    allreduce: str = key(
        "auto",
        "how vectors are averaged; auto: by their size, as measured",
        choices=("auto", "doubling", "halving", "ring", "two-level", "mpi"),
    )
    progress: str = key(
        "auto",
        "who moves messages while the model computes: hooks in it, or a thread",
        choices=("auto", "hooks", "thread"),
        moves=False,
    )


@dataclass(frozen=True)
class Checkpoint:
    every: int = key(
        1000, "steps between checkpoints, and one at the end; 0: only when stopped early", at_least=0, moves=False
    )
    keep: int = key(2, "how many of the newest stay", at_least=1, moves=False)
    keep_every: int = key(
        0, "checkpoints of steps that are multiples of this stay too; 0: none", at_least=0, moves=False
    )
    layout: str = key(
        "auto",
        "one file written by all ranks, or a file per rank and one that shows them as one",
        choices=("auto", "parallel", "shards"),
        moves=False,
    )
    write: str = key(
        "async", "beside the training (from a copy of the state), or in its way", choices=("async", "sync"), moves=False
    )


@dataclass(frozen=True)
class Config:
    """The whole configuration, one field per TOML section."""

    run: Run = field(default_factory=Run, metadata={"doc": "the run: name, length, seed, logging"})
    task: Task = field(default_factory=Task, metadata={"doc": "what is trained, on which data"})
    optimizer: Optimizer = field(default_factory=Optimizer, metadata={"doc": "the base optimizer"})
    compute: Compute = field(default_factory=Compute, metadata={"doc": "how the gradient is computed"})
    base: Base = field(default_factory=Base, metadata={"doc": "the base algorithm and its graph"})
    slowmo: Slow = field(default_factory=Slow, metadata={"doc": "the outer step"})
    comm: Comm = field(default_factory=Comm, metadata={"doc": "communication"})
    checkpoint: Checkpoint = field(default_factory=Checkpoint, metadata={"doc": "checkpoints, in the run folder"})

    @property
    def unit(self) -> str:
        """What warm-up and milestones count: "epochs" or "steps"."""
        return self.optimizer.unit if self.optimizer.unit != "auto" else "steps" if self.run.steps else "epochs"

    def check(self) -> None:
        """Refuse combinations that cannot work, whatever the number of ranks.

        Raises: UsageError, naming the keys, their values and what to type.
        """
        run, slow, base, opt = self.run, self.slowmo, self.base, self.optimizer
        if (run.epochs > 0) == (run.steps > 0):
            both = "both are" if run.epochs else "neither is"
            hint = "Add --set run.epochs=0 or --set run.steps=0." if run.epochs else "Type --set run.epochs=3."
            raise UsageError(
                f"The length of training is given by run.epochs or run.steps; {both} set.",
                hint,
            )
        if "/" in run.name or not run.name:
            raise UsageError(f'run.name = "{run.name}" cannot name a folder.', "Type --set run.name=NAME, without a /.")
        seconds(run.stop_after)
        if run.worker not in ("rank", "node") and not (isinstance(run.worker, int) and run.worker > 0):
            raise UsageError(
                f'run.worker = "{run.worker}" says nothing about ranks.',
                "Type --set run.worker=node, or the number of ranks that make one worker.",
            )
        if slow.beta >= 1:
            raise UsageError(
                f"slowmo.beta = {slow.beta:g} makes the slow momentum grow without bound.",
                "Type --set slowmo.beta=0.6 (0 <= beta < 1).",
            )
        if slow.average == "none" and slow.tau > 0:
            if base.algorithm in ("local", "allreduce"):
                why = (
                    "without it local workers never meet"
                    if base.algorithm == "local"
                    else "allreduce workers are equal already"
                )
                raise UsageError(
                    f'slowmo.average = "none" needs a gossip base; base.algorithm is "{base.algorithm}" ({why}).',
                    "Type --set base.algorithm=sgp, or --set slowmo.average=exact.",
                )
            if slow.sharded:
                raise UsageError(
                    'slowmo.average = "none" gives every worker its own slow state; it cannot be sharded.',
                    "Type --set slowmo.sharded=false.",
                )
        for name, value, usual in (
            ("comm.dtype", self.comm.dtype, "float32"), ("slowmo.average", slow.average, "exact"),
        ):  # fmt: skip
            if slow.sharded and slow.tau > 0 and value != usual:
                raise UsageError(
                    f'With {name} = "{value}" x0 - z is averaged, and with slowmo.sharded no rank has all of x0.',
                    f"Type --set slowmo.sharded=false, or --set {name}={usual}.",
                )
        if base.algorithm == "local" and slow.tau == 0:
            raise UsageError(
                'base.algorithm = "local" with slowmo.tau = 0 never averages: the workers would train apart.',
                "For Local SGD type --set slowmo.tau=12 --set slowmo.alpha=1 --set slowmo.beta=0.",
            )
        if base.algorithm == "osgp" and slow.average != "none" and 1 < slow.tau <= base.delay:
            raise UsageError(
                f"base.delay = {base.delay} exchanges nothing in a round of slowmo.tau = {slow.tau} steps.",
                f"Type --set base.delay={slow.tau - 1} or less, or --set base.algorithm=local.",
            )
        if opt.name != "sgd" and ":" not in opt.name:
            for name in ("momentum", "nesterov"):
                if getattr(opt, name) is not None:
                    raise UsageError(
                        f'optimizer.{name} belongs to sgd; optimizer.name is "{opt.name}".',
                        f"Delete optimizer.{name}, or type --set optimizer.name=sgd.",
                    )
        if opt.betas is not None and opt.name == "sgd":
            raise UsageError(
                'optimizer.betas belongs to adam and adamw; optimizer.name is "sgd".',
                "Delete optimizer.betas, or type --set optimizer.name=adam.",
            )
        if opt.betas is not None and (len(opt.betas) != 2 or not all(0 <= b < 1 for b in opt.betas)):
            raise UsageError(
                f"optimizer.betas = {opt.betas} is not two numbers in [0, 1).",
                "Type --set optimizer.betas=[0.9,0.98].",
            )
        if opt.nesterov and not opt.momentum:
            raise UsageError(
                "optimizer.nesterov = true needs a momentum above 0.", "Type --set optimizer.momentum=0.9."
            )
        if opt.options and ":" not in opt.name:
            raise _unknown_key("optimizer", next(iter(opt.options)), _names(Optimizer))
        if opt.name not in ("sgd", "adam", "adamw") and ":" not in opt.name:
            raise UsageError(
                f'optimizer.name = "{opt.name}" is not known.{did_you_mean(opt.name, ("sgd", "adam", "adamw"))}',
                'Type sgd, adam, adamw, or "package.module:Class", such as "torch.optim:RMSprop".',
            )
        if opt.warmup_from and not opt.warmup:
            raise UsageError(
                f"optimizer.warmup_from = {opt.warmup_from:g} needs a warm-up, and optimizer.warmup is 0.",
                "Type --set optimizer.warmup=5.",
            )
        size, parts = self.task.batch_size, self.compute.accumulate
        if size % parts:
            raise UsageError(
                f"task.batch_size = {size} cannot be cut into compute.accumulate = {parts} equal micro-batches.",
                f"Type --set task.batch_size={-(-size // parts) * parts}.",
            )
        if self.compute.compile and slow.overlap:
            raise UsageError(
                "With slowmo.overlap layers wait for their parameters one by one; compute.compile makes one of them.",
                "Type --set slowmo.overlap=false, or --set compute.compile=false.",
            )
        averaged = base.algorithm == "allreduce" and self.comm.dtype != "float32"
        if self.compute.precision == "float16" and averaged:
            raise UsageError(
                f'With compute.precision = "float16" gradients are scaled, and comm.dtype = "{self.comm.dtype}" would '
                "keep what rounding takes from one scale for the next.",
                "Type --set compute.precision=bfloat16, or --set comm.dtype=float32.",
            )
        if opt.milestones and opt.schedule != "step":
            raise UsageError(
                f'optimizer.milestones belongs to the schedule "step"; optimizer.schedule is "{opt.schedule}".',
                "Type --set optimizer.schedule=step, or --set optimizer.milestones=[].",
            )
        if not all(0 <= milestone < math.inf for milestone in opt.milestones):
            raise UsageError(
                f"optimizer.milestones = {opt.milestones} are not all finite numbers from 0 up.",
                "Type for example --set optimizer.milestones=[30,60].",
            )


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, check.

    Raises: UsageError (no such file, not TOML, unknown key, wrong type, impossible combination).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"There is no configuration file {path}.", f"Type `slowmo init fashion-mnist > {path}` to make one."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.", "Give a TOML file.") from None
    return parse(text, str(path), overrides)


def parse(text: str, source: str = "the text", overrides: Iterable[str] = ()) -> Config:
    """As `load`, from TOML text; `source` names it in messages."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is not valid TOML: {error}.", "Mend that line; strings need quotes.") from None
    for override in overrides:
        _override(table, override)
    config = _build(table)
    config.check()
    return config


def dump(config: Config, comments: bool = False) -> str:
    """The configuration as TOML text that `parse` reads back to an equal Config.

    With `comments`, every key is there with what it means; keys without a value are commented out.
    """
    lines: list[str] = []
    for section, keys in sections():
        value = getattr(config, section.name)
        lines += [f"[{section.name}]" + (f"  # {section.metadata['doc']}" if comments else "")]
        for k in keys:
            current = getattr(value, k.name)
            if k.name == "options":
                lines += [f"{toml_key(name)} = {toml_value(v)}" for name, v in current.items()]
                continue
            if comments:
                lines.append(f"# {describe(k)}")
            if current is not None:
                lines.append(f"{k.name} = {toml_value(current)}")
            elif comments:
                lines.append(f"# {k.name} =")
        lines.append("")
    return "\n".join(lines)


def seconds(text: str) -> float:
    """A wall time such as "5h50m", "90s" or "1d2h" in seconds; "" is infinite. Raises: UsageError."""
    if not text:
        return math.inf
    total = units_s(text.replace(" ", ""))
    if total is None:
        raise UsageError(
            f'run.stop_after = "{text}" is not a time.', "Type for example --set run.stop_after=5h50m (d, h, m, s)."
        )
    return float(total)


def units_s(text: str) -> int | None:
    """A time such as "5h50m" in seconds; None where it is no such time."""
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if found is None:
        return None
    return sum(int(n or 0) * unit for n, unit in zip(found.groups(), (86400, 3600, 60, 1), strict=True))


def changed(before: Config, now: Config) -> list[str]:
    """The keys, as section.key, in which two configurations differ so that a run would not go on as it began.

    Where the rate does not depend on the run's end, the length of the run is not among them.
    """
    found = []
    for section, keys in sections():
        a, b = getattr(before, section.name), getattr(now, section.name)
        for k in keys:
            old, new = getattr(a, k.name), getattr(b, k.name)
            if k.name == "options":
                found += [f"{section.name}.{o}" for o in {**old, **new} if old.get(o) != new.get(o)]
            elif old != new and k.metadata["moves"]:
                found.append(f"{section.name}.{k.name}")
    ends = {"run.epochs", "run.steps"} if now.optimizer.schedule != "cosine" else set()
    if before.unit != now.unit:
        ends = set()
    return [k for k in found if k not in ends]


def sections() -> Iterator[tuple[dataclasses.Field[Any], tuple[dataclasses.Field[Any], ...]]]:
    """Each section of the configuration with its keys, in order; for the reference and for `init`."""
    for section in dataclasses.fields(Config):
        yield section, dataclasses.fields(_types(Config)[section.name])


def describe(k: dataclasses.Field[Any]) -> str:
    """One line on a key: what it means and the values it takes."""
    choices = k.metadata["choices"]
    return k.metadata["doc"] + (f": {' | '.join(choices)}" if choices else "")


def toml_value(value: Any) -> str:
    """A value as TOML. JSON's strings are TOML's basic strings, but for DEL, which TOML wants escaped."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return "nan" if math.isnan(value) else repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    return json.dumps(str(value))


def toml_key(name: str) -> str:
    """A key as TOML: bare where it may be, else quoted (Python's names may hold letters that bare keys may not)."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)


def _types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.name != "options"]


def _unknown_key(section: str, name: str, known: list[str]) -> UsageError:
    return UsageError(
        f"{section}.{name} is not a key of the configuration.{did_you_mean(name, known)}",
        f"[{section}] takes: {', '.join(known)}.",
    )


def _override(table: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, k = name.strip().partition(".")
    if not (equals and dot and section and k):
        raise UsageError(
            f"--set {override} is not of the form section.key=value.", "Type for example --set slowmo.tau=12."
        )
    try:
        value = tomllib.loads(f"x = {text.strip()}")["x"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string, so that no shell quoting is needed
    entry = table.setdefault(section, {})
    if not isinstance(entry, dict):
        raise UsageError(f"{section} is not a section of the configuration.", f"Write [{section}] in the file.")
    entry[k] = value


def _build(table: dict[str, Any]) -> Config:
    types_ = _types(Config)
    made = {}
    for section, entries in table.items():
        if section not in types_:
            raise UsageError(
                f"[{section}] is not a section of the configuration.{did_you_mean(section, types_)}",
                f"The sections are: {', '.join(types_)}.",
            )
        if not isinstance(entries, dict):
            raise UsageError(f"{section} = {entries!r} stands where a section should.", f"Write [{section}].")
        made[section] = _section(section, types_[section], entries)
    return Config(**made)


def _section(section: str, cls: type, entries: dict[str, Any]) -> Any:
    types_ = _types(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in entries.items():
        if name == "options" or name not in fields:
            if "options" not in fields or name == "options":
                raise _unknown_key(section, name, _names(cls))
            options[name] = value
            continue
        values[name] = _value(f"{section}.{name}", types_[name], fields[name], value)
    if options:
        values["options"] = options
    return cls(**values)


_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", list: "a list"}


def _value(name: str, type_: Any, k: dataclasses.Field[Any], value: Any) -> Any:
    wanted = type_
    if isinstance(wanted, types.UnionType):
        members = [t for t in typing.get_args(wanted) if t is not type(None)]
        wanted = next((t for t in members if type(value) is t), members[0])
    plain = typing.get_origin(wanted) or wanted
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    numbers = not isinstance(value, list) or all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)) or not numbers:
        raise UsageError(
            f"{name} = {toml_value(value)} is not {_WORDS[plain]}{' of numbers' if plain is list else ''}.",
            f"Type for example --set {name}={_example(k, plain)}.",
        )
    if plain is list:
        value = [float(v) for v in value]
    choices, at_least = k.metadata["choices"], k.metadata["at_least"]
    if choices and value not in choices:
        raise UsageError(
            f'{name} = "{value}" is not known.{did_you_mean(value, choices)}',
            f"{name} is one of: {', '.join(choices)}.",
        )
    if at_least is not None and not at_least <= value < math.inf:
        raise UsageError(f"{name} = {value:g} is out of range.", f"Give {_WORDS[plain]}, at least {at_least:g}.")
    return value


def _example(k: dataclasses.Field[Any], plain: type) -> str:
    default = None if k.default is dataclasses.MISSING else k.default
    if default not in (None, "", 0):
        return toml_value(default)
    return {int: "1", float: "0.5", str: "name", bool: "true", list: "[1, 2]"}[plain]
