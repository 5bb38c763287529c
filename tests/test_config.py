"""The configuration: what is read is what was written, and everything wrong is refused by name, with what to type."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from slowmo_mpi import config
from slowmo_mpi.config import Config, Optimizer, Run, Slow, Task
from slowmo_mpi.errors import USAGE, UsageError

FILE = """
[run]
steps = 10
[task]
name = "quadratic"
dim = 8
[slowmo]
tau = 12
"""


def refused(*overrides: str, text: str = FILE) -> str:
    """The message and the hint of what `parse` refuses."""
    with pytest.raises(UsageError) as caught:
        config.parse(text, "my.toml", overrides)
    assert caught.value.exit_code == USAGE
    assert caught.value.hint, "an error must say what to type"
    return str(caught.value)


# ---- what is read ----
def test_defaults_then_file_then_set() -> None:
    assert config.parse("[run]\nsteps = 1").slowmo.tau == Slow().tau == 48
    assert config.parse(FILE).slowmo.tau == 12
    assert config.parse(FILE, "my.toml", ["slowmo.tau=3"]).slowmo.tau == 3
    assert config.parse(FILE, "my.toml", ["slowmo.tau=3", "slowmo.tau=5"]).slowmo.tau == 5
    assert config.parse(FILE, "my.toml", ["base.delay=2"]).base.delay == 2, "a section that the file has not"


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("run.name=night", "run.name", "night"),
        ("run.name = night run", "run.name", "night run"),
        ('run.name="night"', "run.name", "night"),
        ("run.name='a\\b'", "run.name", "a\\b"),
        ("base.topology=base:k=1", "base.topology", "base:k=1"),
        ("task.data=/data/x y", "task.data", "/data/x y"),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.lr=5e-4", "optimizer.lr", 5e-4),
        ("run.seed=1_000", "run.seed", 1000),
        ("slowmo.sharded=true", "slowmo.sharded", True),
        ("optimizer.momentum=0.9", "optimizer.momentum", 0.9),
    ],
)
def test_set_reads_toml_and_takes_bare_words(text: str, key: str, value: Any) -> None:
    section, name = key.split(".")
    read = getattr(getattr(config.parse(FILE, "my.toml", [text]), section), name)
    assert read == value
    assert type(read) is type(value)


def test_lists_of_numbers() -> None:
    settings = config.parse(FILE, "my.toml", ["optimizer.schedule=step", "optimizer.milestones=[30, 60.5]"])
    assert settings.optimizer.milestones == [30.0, 60.5]
    adam = config.parse(FILE, "my.toml", ["optimizer.name=adam", "optimizer.betas=[0.9,0.98]"])
    assert adam.optimizer.betas == [0.9, 0.98]


def test_keys_of_ones_own_pass_through() -> None:
    """A task's keys, and those of an optimizer that is not built in, are judged by the task and the optimizer."""
    settings = config.parse(FILE, "my.toml", ["task.noise=0.5", "optimizer.name=my.opt:Make", "optimizer.rho=[1,2]"])
    assert settings.task.options == {"dim": 8, "noise": 0.5}
    assert settings.optimizer.options == {"rho": [1, 2]}


# ---- what is written ----
ODD = 'a "quoted" \\ back\nline\ttab \x7f\x01 größe 数 🙂 # not a comment'


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        Config(run=Run(epochs=3)),
        Config(run=Run(steps=2, name=ODD, folder=ODD), task=Task(data=ODD, options={"label": ODD})),
        Config(run=Run(steps=2), optimizer=Optimizer(lr=1e-300, momentum=0.1, milestones=[1.0, 1e16], schedule="step")),
        Config(run=Run(steps=2), optimizer=Optimizer(name="adamw", lr=1 / 3, betas=[0.9, 1 - 2**-53])),
        Config(
            run=Run(steps=2),
            task=Task(
                options={"größe": 1, "on": True, "two words": {"x y": [1, 2.5], "🙂": "z"}, "empty": [], "far": 1e400}
            ),
            optimizer=Optimizer(name="a.b:C", options={"rho": [[1, 2], [3]], "big": 10**30}),
        ),
    ],
)
def test_dump_reads_back_equal(settings: Config, comments: bool) -> None:
    assert config.parse(config.dump(settings, comments)) == settings


def test_dump_with_comments_has_every_key_and_says_what_it_means() -> None:
    text = config.dump(Config(run=Run(epochs=1)), comments=True)
    for section, keys in config.sections():
        assert f"[{section.name}]  # {section.metadata['doc']}" in text
        for k in keys:
            if k.name != "options":
                assert f"# {config.describe(k)}\n" in text
                assert f"{k.name} =" in text


def test_every_key_with_a_choice_says_its_choices() -> None:
    for _, keys in config.sections():
        for k in keys:
            assert all(choice in config.describe(k) for choice in k.metadata["choices"])


# ---- what is refused ----
@pytest.mark.parametrize(
    "override, words",
    [
        # unknown and mistyped
        ("slowmo.tua=3", ["slowmo.tua", "Did you mean 'tau'?", "[slowmo] takes: tau, alpha"]),
        ("run.xyzzy=3", ["run.xyzzy", "[run] takes: name"]),
        ("slomo.tau=3", ["[slomo]", "Did you mean 'slowmo'?", "The sections are: run, task"]),
        ("optimizer.momentun=0.9", ["optimizer.momentun", "Did you mean 'momentum'?"]),
        ("task.options=3", ["task.options is not a key"]),
        ("base.algorithm=spg", ['base.algorithm = "spg"', "Did you mean 'sgp'?", "allreduce, local, dpsgd, sgp, osgp"]),
        ("slowmo.buffers=keep", ['slowmo.buffers = "keep"', "reset, maintain, average"]),
        ("optimizer.name=adamm", ['optimizer.name = "adamm"', "Did you mean 'adam'?", "package.module:Class"]),
        # of another type
        ("slowmo.tau=x", ['slowmo.tau = "x"', "a whole number", "--set slowmo.tau=48"]),
        ("slowmo.tau=1.5", ["slowmo.tau = 1.5", "a whole number"]),
        ("slowmo.tau=true", ["slowmo.tau = true", "a whole number"]),
        ("slowmo.tau=", ['slowmo.tau = ""', "a whole number"]),
        ("slowmo.beta=high", ['slowmo.beta = "high"', "a number", "--set slowmo.beta=0.6"]),
        ("slowmo.sharded=yes", ['slowmo.sharded = "yes"', "true or false", "--set slowmo.sharded=true"]),
        ("run.name=7", ["run.name = 7", "a string"]),
        ("run.seed=[1]", ["run.seed = [1]", "a whole number"]),
        ("optimizer.betas=0.9", ["optimizer.betas = 0.9", "a list of numbers", "--set optimizer.betas=[1, 2]"]),
        ('optimizer.milestones=["a"]', ['optimizer.milestones = ["a"]', "a list of numbers"]),
        ("optimizer.milestones=[true]", ["optimizer.milestones = [true]", "a list of numbers"]),
        # out of range
        ("slowmo.tau=-1", ["slowmo.tau = -1", "out of range", "at least 0"]),
        ("base.delay=-1", ["base.delay = -1", "at least 0"]),
        ("task.batch_size=0", ["task.batch_size = 0", "at least 1"]),
        ("optimizer.lr=nan", ["optimizer.lr = nan", "at least 0"]),
        ("optimizer.lr=inf", ["optimizer.lr = inf", "at least 0"]),
        ("comm.timeout=0", ["comm.timeout = 0", "at least 0.1"]),
        # not of the form
        ("tau=3", ["--set tau=3", "section.key=value", "--set slowmo.tau=12"]),
        ("slowmo.tau", ["--set slowmo.tau", "section.key=value"]),
        (".tau=3", ["section.key=value"]),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, words: list[str]) -> None:
    message = refused(override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["run.steps=0"], ["run.epochs", "run.steps", "neither", "--set run.epochs=3"]),
        (["run.epochs=2"], ["run.epochs", "run.steps", "both"]),
        (["slowmo.beta=1"], ["slowmo.beta = 1", "--set slowmo.beta=0.6"]),
        (["slowmo.average=none", "base.algorithm=local"], ["slowmo.average", '"local"', "--set base.algorithm=sgp"]),
        (["slowmo.average=none", "base.algorithm=allreduce"], ["slowmo.average", '"allreduce"', "equal already"]),
        (["slowmo.average=none", "slowmo.sharded=true"], ["slowmo.average", "--set slowmo.sharded=false"]),
        (["base.algorithm=local", "slowmo.tau=0"], ['"local"', "slowmo.tau = 0", "--set slowmo.tau=12"]),
        (["base.algorithm=osgp", "base.delay=12"], ["base.delay = 12", "slowmo.tau = 12", "--set base.delay=11"]),
        (["optimizer.name=adam", "optimizer.momentum=0.9"], ["optimizer.momentum", '"adam"', "optimizer.name=sgd"]),
        (["optimizer.name=adamw", "optimizer.nesterov=true"], ["optimizer.nesterov", '"adamw"']),
        (["optimizer.betas=[0.9,0.99]"], ["optimizer.betas", '"sgd"', "--set optimizer.name=adam"]),
        (["optimizer.name=adam", "optimizer.betas=[0.9]"], ["optimizer.betas = [0.9]", "two numbers"]),
        (["optimizer.name=adam", "optimizer.betas=[0.9,1]"], ["optimizer.betas = [0.9, 1.0]", "two numbers"]),
        (["optimizer.nesterov=true"], ["optimizer.nesterov", "--set optimizer.momentum=0.9"]),
        (["optimizer.schedule=step", "optimizer.milestones=[nan]"], ["optimizer.milestones", "finite"]),
        (["optimizer.schedule=step", "optimizer.milestones=[-1]"], ["optimizer.milestones", "from 0 up"]),
        (["optimizer.milestones=[1]"], ["optimizer.milestones", '"constant"', "--set optimizer.schedule=step"]),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], words: list[str]) -> None:
    message = refused(*overrides)
    for word in words:
        assert word in message


def test_the_same_combinations_are_possible_where_they_make_sense() -> None:
    for overrides in (
        ["slowmo.average=none"],
        ["slowmo.average=none", "base.algorithm=osgp", "base.delay=12"],
        ["base.algorithm=osgp", "base.delay=11"],
        ["slowmo.average=none", "slowmo.tau=0", "base.algorithm=allreduce"],
        ["slowmo.sharded=true"],
        ["optimizer.name=torch.optim:RMSprop", "optimizer.momentum=0.9", "optimizer.centered=true"],
    ):
        config.parse(FILE, "my.toml", overrides)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[run\nsteps = 1", ["my.toml is not valid TOML", "line 1"]),
        ("[run]\nname = night", ["my.toml is not valid TOML", "line 2", "strings need quotes"]),
        ("run = 3", ["run = 3 stands where a section should", "[run]"]),
        ("tau = 3", ["[tau] is not a section", "The sections are: run"]),
        ("[[run]]\nsteps = 1", ["stands where a section should", "[run]"]),
    ],
)
def test_a_file_that_is_no_configuration(text: str, words: list[str]) -> None:
    message = refused(text=text)
    for word in words:
        assert word in message


def test_set_does_not_reach_into_what_is_no_section() -> None:
    assert "Write [run]" in refused("run.steps=2", text="run = 3")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no configuration file .*absent\.toml.*\n.*slowmo init"):
        config.load(tmp_path / "absent.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        config.load(tmp_path)
    (tmp_path / "latin.toml").write_bytes('[run]\nname = "größe"'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.toml cannot be read"):
        config.load(tmp_path / "latin.toml")


def test_load_is_parse_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(FILE, encoding="utf-8")
    loaded = config.load(tmp_path / "my.toml", ["run.seed=4"])
    assert loaded == config.parse(FILE, "my.toml", ["run.seed=4"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.run = Run()  # type: ignore[misc]
