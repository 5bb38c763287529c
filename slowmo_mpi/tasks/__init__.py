"""What is trained: a model, its samples and its loss. This page is the whole protocol.

A task is made by a factory, `factory(context, *, key=default, ...)`. Its keyword parameters are the task's
own keys in the config's [task] table, and their annotations (int, float, str, bool, Literal) are checked.
The built-in factories are found by a short name; yours is written "package.module:factory", and the
working directory is importable:

    # mine.py                                            # config.toml
    class Mine:                                          [task]
        def __init__(self, width):                       name = "mine:make"
            self.model = torch.nn.Linear(width, 1)       batch_size = 32
            self.train = MySamples("train")              width = 8
            self.test = None
        def loss(self, model, batch):
            x, y = batch
            error = (model(x) - y).square().mean()
            return error, {"rmse": error.detach().sqrt()}

    def make(context, *, width: int = 8):
        return Mine(width)

Rules for a factory:
- Draw the model's weights from torch's global generator, and seed nothing global: the caller has forked the
  generator and seeded it alike on every rank, so that all ranks start from one point.
- Whatever else is random comes from `context.seed`, and from `context.rank` where ranks are to differ.
- What moves between steps and is not in model or optimizer (a generator, a curriculum) goes into a checkpoint if the
  task has `state_dict()` and `load_state_dict(state)`: numbers, text, tensors, and lists and dictionaries of them.
- Load data at the first use of `train` or `test` (a property), not in the factory: `slowmo plan` builds the
  model on machines that have no data.

What a task may have besides:
- `train` and `test` may have `batches(order)`, which works ahead and can augment anew in every epoch: see `batches`.
- A measure that is no mean over samples, or a loss to train on that is not the one to report, needs `evaluate` and
  `score`: see `Evaluating`. `evaluation_batch`, a number, is how many test samples are read at once (256 without it).
- `notes`, a list of lines, is shown when a run starts (what was left out of the data, say), and kept in its manifest.

Importing this module imports neither torch nor any task.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, get_origin

from slowmo_mpi.config import toml_value
from slowmo_mpi.errors import SlowmoError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

BUILT_IN = {
    "quadratic": "slowmo_mpi.tasks.quadratic:quadratic",
    "digits": "slowmo_mpi.tasks.digits:digits",
    "fashion-mnist": "slowmo_mpi.tasks.fashion_mnist:fashion_mnist",
    "cifar10": "slowmo_mpi.tasks.cifar10:cifar10",
    "imagenet": "slowmo_mpi.tasks.imagenet:imagenet",
    "wmt16": "slowmo_mpi.tasks.wmt16:wmt16",
}
"""Short name -> the factory it stands for."""

RESERVED = ("name", "batch_size", "data")
"""Keys of the config's [task] table that every task has; they are never passed to a factory."""


@dataclass(frozen=True)
class Context:
    """What a task's factory is told."""

    rank: int
    ranks: int
    seed: int
    data: str = ""
    """Folder of the data, from `[task] data`; "" is the task's own default place."""


class Samples(Protocol):
    """A numbered set of samples."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Any:
        """The samples of `indices`, int64 (b,), as one batch on the CPU.

        A Tensor, or a tuple or dict of Tensors. It is a function of `indices` alone, so that a resumed run
        sees what the uninterrupted one saw.
        """


class Task(Protocol):
    """A model, the samples to train and to test it on, and the loss."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def train(self) -> Samples: ...

    @property
    def test(self) -> Samples | None: ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's mean loss, a scalar to differentiate, and further batch means to show.

        Used on batches of `train`, and in eval mode without gradients on batches of `test`. `model` and
        `batch` are on one device.
        """


class Evaluating(Task, Protocol):
    """A task that says itself how its test samples are measured. Both members, or neither."""

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Sums over the batch's samples, in eval mode without gradients; float64 or int64, numbers or vectors.

        They are added over batches and ranks, so a measure of the whole set (BLEU) gives its counts.
        """

    def score(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """The metrics, from the sums over all test samples; in float64 or int64, on the CPU."""


def batches(samples: Samples, order: Iterable[tuple[int, Tensor]]) -> Generator[Any]:
    """The batches of `order`, pairs of an epoch and indices, in that order; close it to end what works ahead.

    Samples with a method `batches(order)` of their own, a generator, may read ahead of the loop and draw their
    augmentation from (seed, epoch, sample): what comes out is a function of `order` alone, so that a resumed run
    sees what the uninterrupted one saw.
    """
    if hasattr(samples, "batches"):
        yield from samples.batches(order)
    else:
        for _, indices in order:
            yield samples.batch(indices)


def means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The score that is a mean over samples: each sum over `samples`, their number."""
    return {name: float(total) / float(sums["samples"]) for name, total in sums.items() if name != "samples"}


def factory(name: str) -> Callable[..., Task]:
    """The factory that `name` stands for: a built-in name, or "package.module:factory".

    Puts the working directory on Python's path. Raises UsageError when the name is unknown, the module is
    missing or raises on import, or the attribute is missing or not callable.
    """
    module_name, colon, attribute = BUILT_IN.get(name, name).partition(":")
    if not colon:
        raise UsageError(
            f"There is no task {name!r}.{did_you_mean(name, BUILT_IN)}",
            f'Set task.name to {_one_of(BUILT_IN)}, or to your own factory as "package.module:factory".',
        )
    if not (attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise UsageError(
            f"The task {name!r} is not of the form package.module:factory.",
            'Write the name that Python imports, not a path: "mine:make" for the function make in mine.py.',
        )
    module = _import(module_name)
    try:
        found = getattr(module, attribute)
    except AttributeError:
        functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise UsageError(
            f"The module {module_name!r} ({getattr(module, '__file__', 'built in')}) has no {attribute!r}."
            f"{did_you_mean(attribute, functions)}",
            f'Define `def {attribute}(context): ...` there, or set task.name to "{module_name}:<factory>".',
        ) from None
    if not callable(found):
        raise UsageError(
            f"{name!r} is {_a(found)}, not a factory.",
            f"Define `def {attribute}(context): ...` that returns a task.",
        )
    return found


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Hold a task's own keys against its factory's signature, without calling it.

    `options` is the [task] table without RESERVED. Raises UsageError that names `task.key` when a key is
    unknown, missing, or of the wrong type: int, float, str, bool and Literal annotations are checked, an int
    is fine for a float, a bool is not a number.
    """
    parameters, takes_any = _keys(name)
    for key, value in options.items():
        if key in parameters:
            _check_type(key, value, parameters[key].annotation)
        elif not takes_any:
            known = ", ".join(parameters) if parameters else "none"
            guess = did_you_mean(key, parameters)
            raise UsageError(
                f"task.{key} = {toml_value(value)} is not a key of the task {name!r}.{guess}",
                f"Remove it, or use one of the task's own keys: {known}.",
            )
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in options:
            kind = getattr(parameter.annotation, "__name__", "value")
            kind = kind if parameter.annotation is not parameter.empty else "value"
            raise UsageError(
                f"The task {name!r} needs task.{key}, and the config does not set it.",
                f"Add `{key} = <{kind}>` to the [task] table, or type --set task.{key}=<{kind}>.",
            )


def build(name: str, options: Mapping[str, Any], context: Context) -> Task:
    """Call the task's factory and hold what it returns against the protocol.

    The model's weights come from torch's global generator. Data that the task loads lazily is not touched;
    `check_data` does that. Raises UsageError as `factory` and `check_options` do, SlowmoError when the
    result is no task; what the factory itself raises is passed on.
    """
    check_options(name, options)
    task = factory(name)(context, **options)
    _check_task(name, task)
    for split in ("train", "test"):
        if not _is_lazy(task, split):
            _check_samples(name, split, getattr(task, split))
    return task


def check_data(name: str, task: Task) -> None:
    """Load the task's samples and check that there are some.

    Raises SlowmoError when `train` or `test` is not Samples or is empty, or when its data cannot be read.
    """
    _check_samples(name, "train", task.train)
    _check_samples(name, "test", task.test)


# The checks


def _import(module_name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except SlowmoError:
        raise
    except (Exception, SystemExit) as error:
        absent = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{module_name}.".startswith(f"{absent}."):
            raise UsageError(
                f"There is no module {absent!r} in {folder} nor among the installed packages.",
                f"Start slowmo in the folder that holds {absent.split('.')[0]}, or set PYTHONPATH to it.",
            ) from None
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"The module {module_name!r} raised {type(error).__name__} on import: {error} "
            f"({where.filename}, line {where.lineno}).",
            f"Mend it until this runs: python -c 'import {module_name}'",
        ) from error


def _keys(name: str) -> tuple[dict[str, inspect.Parameter], bool]:
    """The factory's parameters after the context, by name, and whether it takes any key (**options)."""
    make = factory(name)
    ours = f"Define it as `def {BUILT_IN.get(name, name).partition(':')[2]}(context, *, key=default): ...`."
    try:
        parameters = list(inspect.signature(make).parameters.values())
    except (TypeError, ValueError):
        raise UsageError(f"Python cannot read the signature of {name!r}.", ours) from None
    # Annotations may be text that only a type checker can resolve; those of the built-in types are enough.
    with contextlib.suppress(Exception):
        parameters = list(inspect.signature(make, eval_str=True).parameters.values())
    simple = {kind.__name__: kind for kind in (int, float, str, bool)}
    parameters = [
        p.replace(annotation=simple.get(p.annotation, p.annotation)) if isinstance(p.annotation, str) else p
        for p in parameters
    ]
    first, others = parameters[:1], parameters[1:]
    if not first or first[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise UsageError(f"The factory {name!r} does not take the context as its first parameter.", ours)
    named = {p.name: p for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if taken := [key for key in RESERVED if key in named]:
        raise UsageError(
            f"The factory {name!r} has a parameter {taken[0]!r}, a key of [task] that no factory is passed.",
            "Give the parameter another name; the data folder is context.data.",
        )
    return named, any(p.kind is p.VAR_KEYWORD for p in others)


def _check_type(key: str, value: Any, annotation: Any) -> None:
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return
        texts = [choice for choice in choices if isinstance(choice, str)]
        raise UsageError(
            f"task.{key} = {toml_value(value)} is not one of the choices.{did_you_mean(str(value), texts)}",
            f"Set task.{key} to {_one_of(choices)}.",
        )
    accepted: dict[Any, tuple[tuple[type, ...], str]] = {
        int: ((int,), "a whole number"),
        float: ((float, int), "a number"),
        str: ((str,), "text in quotes"),
        bool: ((bool,), "true or false"),
    }
    if annotation not in accepted:
        return
    types, words = accepted[annotation]
    if not isinstance(value, types) or (isinstance(value, bool) and annotation is not bool):
        example = {int: "4", float: "0.5", str: '"text"', bool: "true"}[annotation]
        raise UsageError(
            f"task.{key} = {toml_value(value)} is not {words}.", f"Write {words}, for example {key} = {example}."
        )


def _check_task(name: str, task: Any) -> None:
    from torch import nn

    hint = "Return an object with model, train, test and loss: python -m pydoc slowmo_mpi.tasks shows one."
    if task is None:
        raise SlowmoError(f"The factory {name!r} returned None, not a task.", hint)
    absent = [member for member in ("model", "train", "test", "loss") if not _has(task, member)]
    if absent:
        tail = " A task without test data sets test = None." if absent == ["test"] else ""
        message = f"The factory {name!r} returned {_a(task)} without {', '.join(absent)}."
        raise SlowmoError(message + tail, hint)
    if not isinstance(task.model, nn.Module):
        raise SlowmoError(f"The model of the task {name!r} is {_a(task.model)}, not a torch.nn.Module.", hint)
    if not any(parameter.requires_grad for parameter in task.model.parameters()):
        raise SlowmoError(f"The model of the task {name!r} has no parameter to train.", hint)
    if not callable(task.loss):
        raise SlowmoError(f"The loss of the task {name!r} is {_a(task.loss)}, not a function.", hint)
    try:
        inspect.signature(task.loss).bind(task.model, None)
    except TypeError:
        raise SlowmoError(
            f"The loss of the task {name!r} does not take (model, batch).",
            "Define it as `def loss(self, model, batch)`.",
        ) from None
    except ValueError:  # a callable without a readable signature: it will show when it is called
        pass


def _check_samples(name: str, split: str, samples: Any) -> None:
    if samples is None and split == "test":
        return
    if not hasattr(samples, "__len__") or not callable(getattr(samples, "batch", None)):
        wanted = "len() and batch(indices)"
        raise SlowmoError(
            f"The {split} samples of the task {name!r} are {_a(samples)} without {wanted}.",
            f"Give `{split}` an object with __len__(self) and batch(self, indices)"
            + (", or None for no test." if split == "test" else "."),
        )
    if len(samples) == 0:
        other = "set test = None" if split == "test" else "train on some"
        raise SlowmoError(f"The task {name!r} has 0 {split} samples.", f"Check task.data, or {other}.")


def _has(task: Any, member: str) -> bool:
    """Whether the attribute exists, found without running a property."""
    return _static(task, member) is not None or hasattr(task, member)


def _is_lazy(task: Any, member: str) -> bool:
    return isinstance(_static(task, member), property | functools.cached_property)


def _static(task: Any, member: str) -> Any:
    return inspect.getattr_static(task, member, None)


# Words


def _one_of(choices: Iterable[Any]) -> str:
    *first, last = [toml_value(choice) for choice in choices]
    return f"{', '.join(first)} or {last}" if first else last


def _a(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if re.match('[aeiouAEIOU]', kind) else 'a'} {kind}"
