"""slowmo topology list, show, check: what is printed where, and the exit codes."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from slowmo_mpi.cli.topology import topology
from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.topology import FAMILIES, files, load


def run(*arguments):
    return CliRunner().invoke(topology, list(arguments))


def test_list_names_every_family_and_file():
    result = run("list")
    assert result.exit_code == 0 and result.stderr == ""
    first = {line.split()[0] for line in result.stdout.splitlines()}
    assert first >= {*FAMILIES, *(path.name for path in files())}
    listed = json.loads(run("list", "--json").stdout)
    assert [entry["name"] for entry in listed["families"]] == list(FAMILIES)
    assert {"name": "two-racks.toml", "ranks": 8}.items() <= listed["files"][-1].items()


def test_show_prints_edges_and_the_matrix():
    out = run("show", "exponential", "-n", "4").stdout
    assert "exponential, 4 ranks, a cycle of 2 steps" in out
    assert "step 0: weight 0.5\n  0 -> 1   1 -> 2   2 -> 3   3 -> 0\n" in out
    assert "step 1: weight 0.5\n  0 <-> 2   1 <-> 3\n" in out
    assert "steps to 1e-6       2\n" in out
    assert "     3  0.250  0.250  0.250  0.250" in out


def test_show_gives_each_edge_its_weight_where_they_differ():
    out = run("show", "four-one-way.toml").stdout  # the file knows its number of ranks
    assert "0 -> 1: 0.3 " in out and "2 -> 3: 0.25 " in out


@pytest.mark.parametrize("n", [17, 512])
def test_show_of_many_ranks_stays_short(n):
    out = run("show", "exponential", "-n", str(n)).stdout
    assert "product" not in out
    assert len(out.splitlines()) < 150 and max(map(len, out.splitlines())) <= 100
    assert ("more (--json has all)" in out) == (n == 512)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("n", [1, 2, 16])
def test_show_takes_every_family(name, n):
    result = run("show", name, "-n", str(n))
    assert result.exit_code == 0 and result.stderr == ""


def test_show_json_is_the_whole_graph():
    shown = json.loads(run("show", "base", "-n", "5", "--json").stdout)
    graph = load("base", 5)
    assert shown["steps"] == [[list(edge) for edge in edges] for edges in graph.steps]
    assert (shown["period"], shown["symmetric"], shown["spectral_gap"]) == (5, True, 1.0)
    assert shown["steps_to_average"] == 5


@pytest.mark.parametrize(("spec", "n"), [("exponential", 4), ("base", 7), ("equidyn", 30), ("ring", 1)])
def test_show_draws_a_png(tmp_path, spec, n):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a graph.png"
    result = run("show", spec, "-n", str(n), "--png", str(path), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["ranks"] == n  # the news of the file goes to stderr
    assert str(path) in result.stderr
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_no_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    result = run("show", "ring", "-n", "4", "--png", str(tmp_path / "x.png"))
    assert isinstance(result.exception, SlowmoError)
    assert "pip install matplotlib" in result.exception.hint


def test_a_picture_that_cannot_be_written_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    result = run("show", "ring", "-n", "2", "--png", str(tmp_path / "missing" / "x.png"))
    assert isinstance(result.exception, SlowmoError) and "--png" in result.exception.hint


def test_show_lets_errors_through_to_the_command_line():
    result = run("show", "rnig", "-n", "4")
    assert isinstance(result.exception, UsageError) and "'ring'" in result.exception.hint
    assert "-n 8" in run("show", "ring").exception.hint
    assert run("show", "ring", "-n", "0").exit_code == 2


def test_check_of_a_good_graph_is_one_line():
    result = run("check", "base", "-n", "7")
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout == (
        "base is good for 7 ranks: 5 steps a cycle, symmetric, spectral gap 1, 1e-6 after 5 steps.\n"
    )
    assert json.loads(run("check", "ring", "-n", "4", "--json").stdout)["ok"] is True


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_check_passes_the_files_that_come_along(path):
    assert run("check", str(path)).exit_code == 0


def test_check_of_a_bad_graph_exits_with_3_and_says_why(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("ranks = 3\n[[step]]\nedges = [[0, 1, 0.5], [1, 0, 0.5]]\n", encoding="utf-8")
    result = run("check", str(path))
    assert result.exit_code == 3 and result.stdout == ""
    assert "rank 2 can never hear from rank 0" in result.stderr
    result = run("check", str(path), "--json")
    assert result.exit_code == 3
    verdict = json.loads(result.stdout)
    assert verdict["ok"] is False and "rank 2" in verdict["reason"] and verdict["hint"]
    assert run("check", "two-racks.toml", "-n", "4").exit_code == 3
    assert run("check", "hypercube", "-n", "6").exit_code == 3


@pytest.mark.parametrize("command", [[], ["list"], ["show"], ["check"]])
def test_every_help_has_an_example(command):
    out = run(*command, "--help").stdout
    assert "Example:\n" in out and "slowmo topology" in out.split("Example:")[1]


def test_help_imports_no_numpy():
    heavy = ("numpy", "torch", "mpi4py", "h5py", "matplotlib")
    code = f"import sys, slowmo_mpi.cli.topology; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
