"""The house: imports point down, generated pages are fresh, examples work as written."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from slowmo_mpi import config, presets
from slowmo_mpi.errors import SlowmoError
from slowmo_mpi.launch import find_mpirun, mpirun_command

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "slowmo_mpi"

# From the top to the bottom; a module may import what stands in a later line, or beside it in its own folder.
STOREYS = [
    ["__main__", "reference"],
    ["cli"],
    ["train", "plan", "bench", "doctor", "jobs", "presets", "report"],
    ["evaluation"],
    ["inner"],
    ["batched"],
    ["checkpoints", "resume", "runlog", "stopping", "optim", "launch", "picture", "tasks"],
    ["worker", "data", "models"],
    ["bases", "buckets", "restart", "saved", "team"],
    ["average"],
    ["checks"],
    ["state", "checkpoint"],
    ["comm"],
    ["flat", "slowmo"],
    ["config", "topology"],
    ["families"],
    ["shipped", "start", "trace", "units"],
    ["errors", "__init__"],
]
HEAVY = {
    "mpi4py": {"comm/launcher.py", "comm/mpi.py", "doctor/wire.py"},
    "h5py": {"checkpoint/hdf5.py", "doctor/storage.py"},
}


def storey(module: str) -> int:
    return next(i for i, names in enumerate(STOREYS) if module in names)


def imports_of(path: Path) -> set[str]:
    """Absolute names of what a file imports, wherever in the file; imports for type checkers only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = ["slowmo_mpi", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names} if not node.module else {name}
            if node.module and name == "slowmo_mpi":
                found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "slowmo_mpi" or len(parts) == 1 or parts[1] == mine:
            continue
        target = parts[1] if any(parts[1] in names for names in STOREYS) else "__init__"
        assert storey(target) > storey(mine), f"{path.name} imports {name}, which is not below it"


def test_every_module_has_its_storey() -> None:
    modules = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in FILES}
    assert modules == {name for names in STOREYS for name in names}


def test_mpi4py_and_h5py_are_imported_where_they_belong() -> None:
    for package, homes in HEAVY.items():
        users = {str(p.relative_to(PACKAGE)) for p in FILES if any(n.split(".")[0] == package for n in imports_of(p))}
        assert users <= homes, f"{package} is imported by {users - homes}"


def test_generated_pages_are_fresh() -> None:
    """In a process of its own: click remembers a command's help option from whoever called it first."""
    show = "print(json.dumps({str(path): text for path, text in reference.pages().items()}))"
    code = f"import json; from slowmo_mpi import reference; {show}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    for path, text in json.loads(done.stdout).items():
        assert Path(path).read_text(encoding="utf-8") == text, f"{path}: run `python -m slowmo_mpi.reference`"


@pytest.mark.parametrize("task", sorted(presets.PRESETS))
def test_example_configurations_are_what_init_prints(task: str) -> None:
    text = (ROOT / "examples" / f"{task}.toml").read_text(encoding="utf-8")
    assert text == presets.commented(task), f"run `slowmo init {task} > examples/{task}.toml`"
    config.parse(text)


def test_the_versions_agree() -> None:
    from slowmo_mpi import __version__

    assert f'version="{__version__}"' in (ROOT / "setup.py").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_links_and_paths_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"
    for target in re.findall(r"`((?:bin|examples|jobs|topologies|benchmarks)/[\w./-]+)`", readme):
        assert (ROOT / target).exists(), f"README names {target}, which is not there"


def test_the_readme_shows_the_library_example_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```diff\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    for name, signs in (("plain.py", " -"), ("library.py", " +")):
        lines = (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()
        shown = [line[1:] for line in block[1].splitlines() if line and line[0] in signs and line[1:] != "..."]
        missing = [line for line in shown if line.strip() and line not in lines]
        assert not missing, f"{name} has no line {missing}"


@pytest.mark.parametrize(
    "ranks, name, least", [(1, "plain.py", 0.90), (1, "library.py", 0.90), (4, "library.py", 0.85)]
)
def test_examples_run_as_written(ranks: int, name: str, least: float) -> None:
    command = [sys.executable, str(ROOT / "examples" / name)]
    if ranks > 1:
        try:
            find_mpirun()
        except SlowmoError:
            if os.environ.get("SLOWMO_CI"):
                raise
            pytest.skip("no mpirun here")
        command = mpirun_command(ranks, command)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL,
        env={**os.environ, **root, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    accuracy = re.fullmatch(r"test accuracy (\d\.\d+)\n", done.stdout)
    assert accuracy is not None, done.stdout
    assert float(accuracy[1]) > least
