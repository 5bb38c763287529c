"""jobs/install/: the guide's commands name things that exist, and every recipe asks for what setup.py asks for.

No Apptainer, Spack or conda is used here; what was run by hand stands at the end of the guide.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALL = ROOT / "jobs/install"
GUIDE = (INSTALL / "README.md").read_text(encoding="utf-8")
DEFINITION = (INSTALL / "slowmo.def").read_text(encoding="utf-8")
RECIPE = INSTALL / "spack/spack_repo/slowmo/packages/py_slowmo_mpi/package.py"
BLOCKS = re.findall(r"^```bash\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)

CONDA_NAMES = {"matplotlib": "matplotlib-base", "torch": "pytorch", "xxhash": "python-xxhash"}


def keywords_of_setup() -> dict[str, Any]:
    """What setup.py gives to setup(), as far as it is written out there."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "setup")
    literals = (ast.List, ast.Dict, ast.Constant)
    wanted = ("version", "python_requires", "install_requires", "extras_require")
    return {
        k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in wanted and isinstance(k.value, literals)
    }


SETUP = keywords_of_setup()
BUILD_REQUIRES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
EXTRAS = {name: needed for name, needed in SETUP["extras_require"].items() if name != "test"}


def bash_accepts(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{script}"


# ---- Apptainer ----


def sections(**arguments: str) -> dict[str, str]:
    """The definition's sections by name, with its build arguments put in; "" is the header."""
    header, *rest = re.split(r"^%(\w+).*\n", DEFINITION, flags=re.MULTILINE)
    found = dict(zip(rest[::2], rest[1::2], strict=True))
    lines = [line.strip() for line in found["arguments"].splitlines() if line.strip()]
    defaults = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    values = defaults | arguments
    assert values.keys() == defaults.keys()
    return {"": header} | {k: re.sub(r"{{\s*(\w+)\s*}}", lambda m: values[m[1]], v) for k, v in found.items()}


def test_the_definition_has_a_base_and_only_known_sections() -> None:
    found = sections()
    assert re.findall(r"^(\w+):", found.pop(""), re.MULTILINE) == ["Bootstrap", "From"]
    known = {"arguments", "setup", "files", "post", "environment", "runscript", "startscript", "test", "labels", "help"}
    assert found.keys() <= known
    for name in ("post", "environment", "runscript", "test"):
        bash_accepts(found[name])


def test_the_image_gets_all_that_an_installation_reads() -> None:
    copied = [line.split() for line in sections()["files"].splitlines() if line.strip()]
    assert all((ROOT / source).exists() and target == "/opt/slowmo-mpi/" for source, target in copied)
    patterns = re.findall(r'files\("(\w+)/', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert {"bin", "slowmo_mpi", "setup.py", "pyproject.toml", "README.md", *patterns} <= {s for s, _ in copied}


def post(folder: Path, mpi: str) -> subprocess.CompletedProcess[str]:
    """Run %post in `folder` in place of /, with an apt-get and a bin/setup that only say how they were called."""
    script = re.sub(r"/(?=opt/|var/)", f"{folder}/", sections(MPI=mpi)["post"])
    for path, text in {"opt/slowmo-mpi/bin/setup": 'echo "setup: $SLOWMO_MPI $SLOWMO_HDF5 $SLOWMO_TORCH"',
                       "fake/apt-get": 'echo "apt-get: $*"'}.items():  # fmt: skip
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(f"#!/bin/sh\n{text}\n")
        (folder / path).chmod(0o755)
    env = {"HOME": str(folder), "PATH": f"{folder}/fake:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-e"], input=script, env=env, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("mpi", "package", "kind"),
    [("openmpi4", "openmpi-bin", "site"), ("openmpi5", "libhdf5-openmpi-dev", "wheel"), ("mpich", "mpich", "site")],
)
def test_the_image_is_built_for_the_mpi_that_was_asked_for(tmp_path: Path, mpi: str, package: str, kind: str) -> None:
    done = post(tmp_path, mpi)
    assert done.returncode == 0, done.stderr
    *_, apt, setup = done.stdout.splitlines()
    assert package in apt.split()
    assert re.fullmatch(rf"setup: {kind} parallel torch==\d+\.\d+\.\d+", setup)


def test_an_image_for_an_unknown_mpi_is_refused(tmp_path: Path) -> None:
    done = post(tmp_path, "cray")
    assert done.returncode == 1
    assert done.stderr == "MPI=cray is none of openmpi4, openmpi5, mpich\n"
    assert done.stdout == ""


def test_the_image_has_the_default_torch_of_bin_setup() -> None:
    default = re.search(r"^DEFAULT_TORCH=(.*)$", (ROOT / "bin/setup").read_text(encoding="utf-8"), re.MULTILINE)
    assert default is not None
    assert f'"{default[1]}"' in sections()["post"]


# ---- Spack, conda, modules: no drift from setup.py ----


def spack_spec(requirement: str) -> str:
    """`torch>=2.2` in the words of Spack: `py-torch@2.2:`."""
    name, least = requirement.split(">=")
    return f"{name if name == 'python' else f'py-{name}'}@{least}:"


def calls(name: str) -> list[ast.Call]:
    tree = ast.parse(RECIPE.read_text(encoding="utf-8"))
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]


def test_the_spack_repository_has_the_layout_of_package_api_2() -> None:
    repo = (RECIPE.parents[2] / "repo.yaml").read_text(encoding="utf-8")
    assert re.search(r"^  api: v2\.\d+$", repo, re.MULTILINE)
    assert f"  namespace: {RECIPE.parents[2].name}\n" in repo
    assert RECIPE.parents[3].name == "spack_repo"
    assert "class PySlowmoMpi(PythonPackage)" in RECIPE.read_text(encoding="utf-8")
    assert f"parents[{RECIPE.parents.index(ROOT)}].as_uri()" in RECIPE.read_text(encoding="utf-8")


def test_the_spack_recipe_asks_for_what_setup_asks_for() -> None:
    (version,) = calls("version")
    assert ast.literal_eval(version.args[0]) == SETUP["version"]
    asked: dict[str, set[str]] = {}  # by the variant that brings it, "" for always
    for call in calls("depends_on"):
        when = {k.arg: ast.unparse(k.value) for k in call.keywords}.get("when", "''")
        asked.setdefault(ast.literal_eval(when), set()).add(ast.literal_eval(call.args[0]).split(" ")[0])
    always = [f"python{SETUP['python_requires']}", *BUILD_REQUIRES, *SETUP["install_requires"]]
    assert asked.pop("") == {"mpi", *map(spack_spec, always)}
    assert asked == {f"+{name}": set(map(spack_spec, needed)) for name, needed in EXTRAS.items()}
    assert {ast.literal_eval(c.args[0]) for c in calls("variant")} == EXTRAS.keys()
    assert "+mpi" in next(s for s in map(ast.unparse, calls("depends_on")) if "py-h5py" in s)


def test_the_conda_environment_asks_for_what_setup_asks_for() -> None:
    text = (INSTALL / "environment.yml").read_text(encoding="utf-8")
    found = dict(re.findall(r"^  - ([\w-]+)(?: >=(\S+))?", text.split("dependencies:")[1], re.MULTILINE))
    needed = [f"python{SETUP['python_requires']}", *BUILD_REQUIRES, *SETUP["install_requires"]]
    for requirement in [*needed, *EXTRAS["digits"], *EXTRAS["plot"]]:
        name, least = requirement.split(">=")
        assert found.pop(CONDA_NAMES.get(name, name)) == least, f"environment.yml and setup.py differ in {name}"
    assert found.keys() == {"openmpi", "pip"}
    assert re.search(r"^  - h5py \S+ mpi_openmpi\*$", text, re.MULTILINE)


def test_the_module_file_names_this_version() -> None:
    assert f'whatis("Version: {SETUP["version"]}")' in (INSTALL / "slowmo.modulefile.lua").read_text(encoding="utf-8")


# ---- the guide ----


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.split("\n")[0][:40])
def test_commands_of_the_guide_parse_and_name_files_that_exist(block: str) -> None:
    bash_accepts(block)
    for path in re.findall(r"(?:^|\s|\$PWD/)((?:bin|examples|jobs)/[\w./-]+)", block, re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_the_guide_names_subcommands_and_versions_that_exist() -> None:
    from slowmo_mpi.cli import slowmo

    for command in re.findall(r"slowmo(?:\.sif)? ([a-z]+)\b(?!/)", "\n".join(BLOCKS)):
        assert command in slowmo.commands, command
    assert set(re.findall(r"py-slowmo-mpi@([\d.]+)|slowmo-mpi/([\d.]+)\.lua", GUIDE)) == {
        (SETUP["version"], ""),
        ("", SETUP["version"]),
    }


def test_links_of_the_guide_exist() -> None:
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", GUIDE, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        assert target[1:] in headings if target.startswith("#") else (INSTALL / target).exists(), target


def test_the_proof_runs_as_written(mpirun: str, tmp_path: Path, environment: dict[str, str]) -> None:
    """The commands under "bin/setup" that need nothing but what a test has."""
    (line,) = {s for b in BLOCKS for s in b.splitlines() if re.match(r"slowmo train .* -n 2$", s)}
    words = [sys.executable, "-m", "slowmo_mpi", *shlex.split(line)[1:], "--set", f"run.folder={tmp_path}"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    shown = re.search(r"^done in \d+ s: (test loss .*)$", GUIDE, re.MULTILINE)
    assert shown is not None
    assert shown[1] in done.stderr
