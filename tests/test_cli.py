"""The command from outside: helps that answer at once, data on stdout and the rest on stderr, exit codes, the bar."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from slowmo_mpi import __version__, config, presets
from slowmo_mpi.cli import slowmo as group
from slowmo_mpi.errors import DONE, USAGE
from slowmo_mpi.units import clock

LIMIT_S = 120
HEAVY = {"torch", "mpi4py", "h5py", "numpy", "tqdm", "matplotlib"}
BARE = [sys.executable, "-c", "import click"]


def commands(command: click.Command = group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group of the tree, as it is typed after `slowmo`."""
    yield path
    if isinstance(command, click.Group):
        for name, child in sorted(command.commands.items()):
            yield from commands(child, (*path, name))


ALL = list(commands())


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slowmo_mpi", *arguments],
        capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL, cwd=cwd, check=False,
    )  # fmt: skip


def best_s(program: list[str], runs: int = 3) -> float:
    """The shortest of some runs: what the program takes when nobody disturbs it."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(program, capture_output=True, timeout=LIMIT_S, check=True)
        times.append(time.perf_counter() - started)
    return min(times)


def told_once(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.stdout == ""
    assert done.stderr.startswith("slowmo: ") and done.stderr.count("slowmo: ") == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


# ---- helps ----
@pytest.mark.parametrize("path", ALL, ids=lambda path: " ".join(("slowmo", *path)))
def test_help_has_an_example_and_imports_nothing_heavy(path: tuple[str, ...]) -> None:
    script = "import sys; from slowmo_mpi.cli import slowmo; slowmo.main(sys.argv[1:], 'slowmo', standalone_mode=False)"
    watch = f"{script}; print(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", watch, *path, "--help"], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    assert done.stdout.startswith(" ".join(("Usage: slowmo", *path)))
    assert re.search(r"Example:\n +(slowmo|mpirun|srun) ", done.stdout), "a help shows how the command is typed"
    assert not HEAVY & set(done.stderr.split())


@pytest.mark.parametrize("path", ALL, ids=lambda path: " ".join(("slowmo", *path)))
def test_examples_in_helps_name_commands_and_options_that_exist(path: tuple[str, ...]) -> None:
    text = run(*path, "--help").stdout
    _, found, examples = text.partition("Example:\n")
    assert found
    for line in re.findall(r"^ +(?:.* )?slowmo ([^>|\n]+)", examples.split("\n\n")[0], re.MULTILINE):
        command: click.Command = group
        words = line.split()
        while isinstance(command, click.Group):
            name = words.pop(0) if words[0] in command.commands else getattr(command, "default", words[0])
            assert name in command.commands, f"`slowmo {line}` in `slowmo {' '.join(path)} --help`"
            command = command.commands[name]
        options = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options, line


def test_help_answers_at_once() -> None:
    """In 0.3 s; on a machine where even `import click` takes long, in a few times that."""
    bare_s = best_s(BARE)
    for path in ALL:
        took_s = best_s([sys.executable, "-m", "slowmo_mpi", *path, "--help"])
        assert took_s < max(0.3, 2.5 * bare_s), " ".join(path)


def test_a_time_that_is_left_is_short_where_it_can_be() -> None:
    assert [clock(s) for s in (0.4, 61.9, 3599, 3600, 90061)] == ["0:00", "1:01", "59:59", "1:00:00", "25:01:01"]


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert __version__ in done.stdout


# ---- wrong usage ----
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], ["'trian'", "train", "Type `slowmo --help`"]),
        (["train"], ["Missing argument", "Type `slowmo train --help`"]),
        (["train", "my.toml", "--resum"], ["--resum", "Type `slowmo train --help`"]),
        (["train", "my.toml", "-n", "0"], ["-n", "0 is not in the range"]),
        (["plan", "absent.toml"], ["no configuration file absent.toml", "slowmo init"]),
        (["topology", "shwo"], ["'shwo'", "show", "Type `slowmo topology --help`"]),
        (["topology", "show", "rign", "-n", "4"], ["rign", "Did you mean 'ring'?"]),
        (["init", "digitz"], ["digitz", "digits"]),
        (["init", "absent.module:make"], ["no module 'absent'", "PYTHONPATH"]),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_to_type(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == USAGE
    told_once(done, *words)


# ---- init, plan, train ----
@pytest.mark.parametrize("task", sorted(presets.PRESETS))
def test_init_prints_a_configuration_with_every_key(task: str) -> None:
    done = run("init", task)
    assert (done.returncode, done.stderr) == (DONE, "")
    settings = config.parse(done.stdout)
    assert settings.task.name == task
    for section, keys in config.sections():
        assert f"[{section.name}]" in done.stdout
        assert all(f"{k.name} =" in done.stdout for k in keys if k.name != "options")


def test_init_plan_and_train(tmp_path: Path) -> None:
    """The first three commands of a new user, on the smallest task, and what each puts where."""
    (tmp_path / "my.toml").write_text(run("init", "digits").stdout)

    plan = run("plan", "my.toml", "-n", "2", "--json", cwd=tmp_path)
    assert (plan.returncode, plan.stderr) == (DONE, "")
    assert json.loads(plan.stdout)["ranks"] == 2

    short = ["--set", "run.epochs=0", "--set", "run.steps=2", "--set", "run.log_every=1"]
    done = run("train", "my.toml", "--simulate", "2", "--json", *short, cwd=tmp_path)
    assert done.returncode == DONE, done.stderr
    last = json.loads(done.stdout)
    assert last["step"] == 2
    assert 0 <= last["accuracy"] <= 1
    for words in (
        "digits: ",
        "2 ranks, simulated",
        "step 1/2  loss ",
        "step 2/2  loss ",
        "test after epoch",
        "done in",
    ):
        assert done.stderr.count(words) == 1, words
    assert "%|" not in done.stderr, "a bar is for terminals"
    folder = tmp_path / last["folder"]
    assert f"run folder: {last['folder']}" in done.stderr
    assert {f.name for f in folder.iterdir()} == {
        "manifest.json",
        "config.toml",
        "metrics.jsonl",
        "model.pt",
        "checkpoints",
    }
    assert [json.loads(line)["kind"] for line in (folder / "metrics.jsonl").open()] == ["train", "train", "eval"]


def test_plan_in_words(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(presets.commented("quadratic"))
    done = run("plan", "my.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (DONE, "")
    assert all(words in done.stdout for words in ("parameters", "memory per rank", "sent per rank and step"))
    assert len(done.stdout.splitlines()) > 5


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(presets.commented("quadratic"))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "slowmo_mpi", "train", "my.toml", "--simulate", "2", "--json", "--set", "run.steps=5"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path, text=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65_536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    stdout, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == DONE, shown.decode()
    assert json.loads(stdout)["step"] == 5
    text = shown.decode()
    assert re.search(r"100%\|█+\| 5/5 .*left, loss ", text), text
    assert "step 5/5" not in text, "plain lines are for files"
    assert text.index("done in") > text.rindex("%|")
