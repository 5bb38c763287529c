"""bin/ from outside: no network, nothing is installed, no .venv but a made-up one is changed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(p for p in (ROOT / "bin").iterdir() if p.is_file()), ROOT / ".ci/run"]


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The command's result, with `env` on top of an environment without choices for bin/setup."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SLOWMO_", "HDF5_DIR", "PYTHON"))}
    return subprocess.run(command, env=base | env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def executable(path: Path, text: str = "#!/bin/sh\nexit 0\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_mpi(tmp_path: Path) -> Path:
    """A folder for PATH with an mpicc and an mpirun that are no MPI."""
    for name in ("mpicc", "mpirun", "mpiexec"):
        executable(tmp_path / "other-mpi/bin" / name)
    return tmp_path / "other-mpi/bin"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what bin/setup reads, without .venv."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "bin", copy / "bin")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def write_record(folder: Path, mpirun: Path, kind: str = "site") -> Path:
    """A record in `folder`/.venv as bin/setup writes it."""
    lines = {"kind": kind, "mpirun": mpirun, "mpicc": mpirun.with_name("mpicc"), "checkout": folder}
    (folder / ".venv").mkdir(exist_ok=True)
    record = folder / ".venv/slowmo-mpi.toml"
    record.write_text("".join(f'{key} = "{value}"\n' for key, value in lines.items()))
    return record


def choose_mpi(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """What bin/setup of `folder` would take for MPI, without installing it: "kind mpirun mpicc" on stdout."""
    script = 'source "$1" && choose_mpi && echo "$KIND $MPIRUN $MPICC"'
    return run("bash", "-c", script, "setup", folder / "bin/setup", **env)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_parse(script: Path) -> None:
    result = run("bash", "-n", script)
    assert result.returncode == 0, result.stderr


# ---- the .venv that these tests run in ----


@pytest.fixture
def real_setup() -> Path:
    check = run(ROOT / "bin/setup", "--check")
    if check.returncode != 0:
        (pytest.fail if os.environ.get("SLOWMO_CI") else pytest.skip)(check.stderr)
    return ROOT / ".venv"


def state(venv: Path) -> list[tuple[str, int]]:
    """Name and time of change of everything that a setup would touch."""
    (packages,) = venv.glob("lib/python3*/site-packages")
    files = [venv / "slowmo-mpi.toml", venv / "setup.stamp", venv / "setup.log", *(venv / "bin").iterdir()]
    return sorted((str(p), p.stat().st_mtime_ns) for p in [*files, *packages.glob("*.dist-info")])


def test_a_second_setup_is_quick_and_changes_nothing(real_setup: Path) -> None:
    before = state(real_setup)
    start = time.perf_counter()
    result = run(ROOT / "bin/setup")
    elapsed_s = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    assert elapsed_s < 5
    assert result.stdout == ""
    assert "ready" in result.stderr and len(result.stderr.splitlines()) == 1
    assert state(real_setup) == before


def test_another_mpi_on_path_changes_nothing(real_setup: Path, fake_mpi: Path) -> None:
    before = state(real_setup)
    path = f"{fake_mpi}:{os.environ['PATH']}"
    result = run(ROOT / "bin/setup", PATH=path)
    assert result.returncode == 0, result.stderr
    assert state(real_setup) == before
    # The long way round, as after a change of setup.py, takes the same MPI.
    record = (real_setup / "slowmo-mpi.toml").read_text()
    kind, mpirun, _ = choose_mpi(ROOT, PATH=path).stdout.split()
    assert f'kind = "{kind}"\nmpirun = "{mpirun}"\n' in record
    assert not mpirun.startswith(str(fake_mpi))


# ---- a made-up checkout ----


def test_a_site_mpi_comes_first_and_then_pip(checkout: Path, fake_mpi: Path) -> None:
    found = choose_mpi(checkout, PATH=f"{fake_mpi}:{os.environ['PATH']}")
    assert found.stdout.split() == ["site", f"{fake_mpi}/mpirun", f"{fake_mpi}/mpicc"]
    asked = choose_mpi(checkout, PATH=f"{fake_mpi}:{os.environ['PATH']}", SLOWMO_MPI="wheel")
    assert asked.stdout.split()[:2] == ["wheel", f"{checkout}/.venv/bin/mpirun"]


def test_an_mpi_in_a_virtual_environment_is_no_site_mpi(checkout: Path, fake_mpi: Path) -> None:
    (fake_mpi.parent / "pyvenv.cfg").touch()
    found = choose_mpi(checkout, PATH=f"{fake_mpi}:{os.environ['PATH']}")
    assert str(fake_mpi) not in found.stdout


def test_the_recorded_mpi_is_kept(checkout: Path, fake_mpi: Path, tmp_path: Path) -> None:
    mine = executable(tmp_path / "my mpi/bin/mpirun")
    write_record(checkout, mine)
    kept = choose_mpi(checkout, PATH=f"{fake_mpi}:{os.environ['PATH']}")
    assert kept.stdout.strip() == f"site {mine} {mine.with_name('mpicc')}"
    assert kept.stderr == ""


def test_a_vanished_mpi_is_noticed_and_another_chosen(checkout: Path, fake_mpi: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone/bin/mpirun"
    write_record(checkout, gone)
    chosen = choose_mpi(checkout, PATH=f"{fake_mpi}:{os.environ['PATH']}")
    assert chosen.stdout.split()[:2] == ["site", f"{fake_mpi}/mpirun"]
    assert f"vanished ({gone})" in chosen.stderr


def test_check_names_a_vanished_mpi(checkout: Path, tmp_path: Path) -> None:
    for name in ("python", "slowmo", "mpirun"):
        executable(checkout / ".venv/bin" / name)
    gone = tmp_path / "gone/bin/mpirun"
    write_record(checkout, gone)
    (checkout / ".venv/setup.stamp").touch()
    result = run(checkout / "bin/setup", "--check")
    assert result.returncode == 3
    assert "vanished" in result.stderr and str(gone) in result.stderr


def test_check_without_venv_says_so_and_makes_nothing(checkout: Path) -> None:
    result = run(checkout / "bin/setup", "--check")
    assert result.returncode == 3
    assert "not ready" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_copied_venv_is_not_taken_for_ready(checkout: Path, tmp_path: Path) -> None:
    for name in ("python", "slowmo", "mpirun"):
        executable(checkout / ".venv/bin" / name)
    record = write_record(checkout, checkout / ".venv/bin/mpirun", kind="wheel")
    record.write_text(record.read_text().replace(f'checkout = "{checkout}"', 'checkout = "/elsewhere"'))
    (checkout / ".venv/setup.stamp").touch()
    result = run(checkout / "bin/setup", "--check")
    assert result.returncode == 3
    assert "made in another folder, /elsewhere" in result.stderr


def test_a_setup_that_is_locked_out_gives_up_in_time(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    with open(checkout / ".venv/setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run(checkout / "bin/setup", SLOWMO_SETUP_WAIT_S="1")
    assert result.returncode == 1
    assert "another bin/setup is at work" in result.stderr
    assert "still at work after 1 s" in result.stderr


def test_setup_without_a_python_says_what_to_type(checkout: Path) -> None:
    result = run(checkout / "bin/setup", PYTHON="python2.7-not-here")
    assert result.returncode == 1
    assert "PYTHON=python2.7-not-here is not a Python 3.11 or newer" in result.stderr


@pytest.mark.parametrize(
    ("words", "env", "code", "says"),
    [
        (["--help"], {}, 0, "Usage: bin/setup"),
        (["--frobnicate"], {}, 2, "Usage: bin/setup"),
        ([], {"SLOWMO_MPI": "cray"}, 1, "SLOWMO_MPI=cray is neither site nor wheel"),
        ([], {"SLOWMO_HDF5": "no"}, 1, "SLOWMO_HDF5=no is neither serial nor parallel"),
    ],
)
def test_setup_answers_wrong_usage(checkout: Path, words: list[str], env: dict[str, str], code: int, says: str) -> None:
    result = run(checkout / "bin/setup", *words, **env)
    assert result.returncode == code
    assert says in result.stdout + result.stderr
    assert not (checkout / ".venv").exists()


def test_slowmo_without_venv_says_what_to_type(checkout: Path) -> None:
    result = run(checkout / "bin/slowmo", "--help")
    assert result.returncode == 2
    assert f"Type: {checkout}/bin/setup" in result.stderr


def test_slowmo_runs_with_the_venv_first_on_path(checkout: Path, tmp_path: Path) -> None:
    executable(checkout / ".venv/bin/slowmo", '#!/bin/sh\necho "${PATH%%:*}" "$@"\nexit 75\n')
    link = tmp_path / "slowmo"
    link.symlink_to(checkout / "bin/slowmo")
    for command in (checkout / "bin/slowmo", link):
        result = run(command, "train", "my config.toml")
        assert result.returncode == 75
        assert result.stdout == f"{checkout}/.venv/bin train my config.toml\n"


def test_quickstart_shows_and_runs_one_command(checkout: Path) -> None:
    executable(checkout / "bin/setup")
    executable(checkout / ".venv/bin/slowmo", '#!/bin/sh\necho "ran slowmo $*"\nexit 3\n')
    images = checkout / ".venv/share/usr/share/datasets/fashion-mnist"  # so that nothing is fetched
    images.mkdir(parents=True)
    (images / "train-images-idx3-ubyte.gz").touch()
    command = "slowmo train examples/fashion-mnist.toml -n 4"
    if not Path("/usr/share/datasets/fashion-mnist").exists():
        command += f" --set task.data={images}"
    result = run(checkout / "bin/quickstart", "--set", "run.steps=8")
    assert f"$ {command} --set run.steps=8\n" in result.stderr
    assert result.stdout == f"ran {command} --set run.steps=8\n"
    assert "total time: " in result.stderr.splitlines()[-1]
    assert result.returncode == 3
