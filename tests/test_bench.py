"""`slowmo bench` on real ranks, with tiny sizes: what is printed, and that results were checked. Never how fast."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from slowmo_mpi.bench.common import Bench, Timing, parse_names, parse_rate, parse_sizes
from slowmo_mpi.bench.models import build
from slowmo_mpi.bench.report import Column, Report
from slowmo_mpi.errors import DONE, USAGE, SlowmoError, UsageError
from slowmo_mpi.launch import mpirun_command

LIMIT_S = 120
SHORT = ["--repeat", "2", "--seconds", "0", "--json"]
SMALL = ["--model", "mlp", "--parameters", "2000", "--image", "4", "--batch", "2"]


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slowmo_mpi", "bench", *arguments],
        capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL, env=environment, check=False,
    )  # fmt: skip


def measured(environment: dict[str, str], *arguments: str) -> list[dict[str, Any]]:
    """The rows of a benchmark on two ranks; their times are positive, their results right."""
    done = run(environment, *arguments, *SHORT)
    assert done.returncode == DONE, done.stderr
    found = json.loads(done.stdout)
    assert found["benchmark"] == arguments[0]
    assert found["command"] == " ".join(["slowmo", "bench", *arguments, *SHORT])
    assert found["hosts"] == 1 and found["threads"] == 1 and found["wire_rate_bit_s"] is None
    assert set(found["versions"]) >= {"slowmo", "torch", "mpi"}
    for row in found["rows"]:
        assert row["ok"] is True, row
        assert 0 < row["q1_s"] <= row["time_s"] <= row["q3_s"]
        assert row["repetitions"] == 2
    return found["rows"]


@pytest.fixture
def alone(mpirun: str, environment: dict[str, str]) -> dict[str, str]:
    """An environment without a network laboratory."""
    return {k: v for k, v in environment.items() if not k.startswith(("SLOWMO_NETLAB", "MASTER_"))}


# ---- the commands ----
def test_p2p(alone: dict[str, str]) -> None:
    rows = measured(alone, "p2p", "--sizes", "4,1Ki")
    ways = {(r["bytes"], r["direction"], r["way"]) for r in rows}
    assert ways == {(b, d, w) for b in (4, 1024) for d in ("one way", "both ways") for w in ("slowmo", "mpi")}


def test_allreduce_against_gloo(alone: dict[str, str]) -> None:
    rows = measured(alone, "allreduce", "--sizes", "4,64Ki", "--against", "gloo")
    names = ["auto", "doubling", "halving", "ring", "mpi", "mpi-blocking", "gloo"]  # one host: no second level
    assert [r["algorithm"] for r in rows] == names * 2
    assert [r["took"] for r in rows if r["took"]] == [r["took"] for r in rows if r["algorithm"] == "auto"]
    assert all(r["busbw_byte_s"] == pytest.approx(r["bytes"] / r["time_s"]) for r in rows)  # 2 (m-1)/m is 1


def test_allreduce_under_a_launcher_on_three_ranks(alone: dict[str, str]) -> None:
    """The ranks that there are, also under a launcher; one of them speaks, in a table."""
    program = [sys.executable, "-m", "slowmo_mpi", "bench", "allreduce", "--sizes", "1Ki", "--repeat", "1"]
    program += ["--rate", "1gbit"]
    done = subprocess.run(
        mpirun_command(3, program),
        capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL, env=alone, check=False,
    )  # fmt: skip
    assert done.returncode == DONE, done.stderr
    assert done.stdout.startswith("# slowmo bench allreduce: 3 ranks on 1 host, 1 thread each; wire 1 Gbit/s\n")
    table = [line for line in done.stdout.splitlines() if not line.startswith("# ")]
    assert [line.split()[1] for line in table] == ["auto", "doubling", "ring", "mpi", "mpi-blocking"]
    assert all(line.endswith("yes") for line in table)
    assert "x wire" not in done.stdout, "one host has no wire"
    assert done.stderr.count("halving needs a power of two") == 1


def test_gossip(alone: dict[str, str]) -> None:
    rows = measured(alone, "gossip", "--sizes", "4,64Ki", "--graphs", "exponential,ring")
    assert [(r["bytes"], r["graph"], r["peers"]) for r in rows] == [
        (size, graph, 1.0) for size in (4, 65536) for graph in ("exponential", "ring")
    ]


def test_overlap(alone: dict[str, str]) -> None:
    rows = {r["what"]: r for r in measured(alone, "overlap", *SMALL, "--steps", "2")}
    threads = {"computation + thread", "osgp, thread"} & set(rows)  # not every MPI allows them
    assert set(rows) - threads == {
        "exchange", "computation", "computation + hooks", "sgp", "osgp, nobody", "osgp, hooks"
    }  # fmt: skip
    assert rows["osgp, nobody"]["polls_per_step"] == 0
    assert {name for name, r in rows.items() if "hidden" in r} == {n for n in rows if "sgp" in n}
    assert {name for name, r in rows.items() if "cost" in r} == {n for n in rows if "+" in n}


def test_outer(alone: dict[str, str]) -> None:
    rows = measured(alone, "outer", "--lengths", "1Ki,1000")
    assert [(r["numbers"], r["what"]) for r in rows] == [(n, w) for n in (1024, 1000) for w in ("outer", "copy")]
    assert [r["share_of_copy"] for r in rows if r["what"] == "copy"] == [1.0, 1.0]


def test_step_against_ddp(alone: dict[str, str]) -> None:
    rows = {
        r["variant"]: r for r in measured(alone, "step", *SMALL, "--slowmo", "2", "--steps", "1", "--against", "ddp")
    }
    bases = ["allreduce", "dpsgd", "sgp", "osgp"]
    assert set(rows) == {*bases, *(f"{b}, tau 2" for b in (*bases, "local")), "ddp"}
    for variant, r in rows.items():
        parts = r["forward_s"] + r["backward_s"] + r["optimizer_s"] + (r["outer_s"] or 0)
        assert 0 < parts <= 1.5 * r["q3_s"] + 1e-3
        assert ((r["outer_s"] or 0) > 0) == ("tau" in variant)
        assert (r["wait_s"] is None) == (variant == "ddp")


# ---- wrong usage ----
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["allreduce", "--sizes", "3"], ["'3' is no size", "multiples of 4", "16Mi"]),
        (["p2p", "--sizes", "4,1Kb"], ["'1Kb' is no size"]),
        (["outer", "--lengths", "0"], ["'0' is no size"]),
        (["allreduce", "--algorithms", "rign"], ["'rign'", "Did you mean 'ring'?"]),
        (["step", "--bases", "sgp,asgd"], ["no base 'asgd'"]),
        (["step", "--slowmo", "0", "--bases", "local", "-n", "2"], ["never meet", "--slowmo 12"]),
        (["gossip", "--rate", "fast"], ["'fast' is no rate", "1gbit"]),
        (["gossip", "--graphs", "rign"], ["rign", "Did you mean 'ring'?"]),
        (["allreduce", "-n", "1"], ["needs 2 ranks", "-n 2"]),
    ],
)
def test_wrong_usage_ends_with_2_and_one_message(alone: dict[str, str], arguments: list[str], words: list[str]) -> None:
    done = run(alone, *arguments)
    assert done.returncode == USAGE, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("slowmo: ") == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# ---- units ----
def test_sizes() -> None:
    assert parse_sizes("4, 1Ki,64ki,2Mi,1Gi") == (4, 1024, 65536, 2 << 20, 1 << 30)
    assert parse_sizes("7,1Ki", 1) == (7, 1024)
    for text in ("", "4,,8", "-4", "6", "1.5Ki", "4B", "0", "1Ti"):
        with pytest.raises(UsageError, match="is no size"):
            parse_sizes(text)


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLOWMO_NETLAB_RATE_BIT_S", raising=False)
    assert [parse_rate(t) for t in ("1gbit", "2.5Gbit", "100mbit", "1e9", "5000")] == [1e9, 2.5e9, 1e8, 1e9, 5000]
    assert parse_rate(None) == 0
    monkeypatch.setenv("SLOWMO_NETLAB_RATE_BIT_S", "1000000000")
    assert parse_rate(None) == 1e9
    assert parse_rate("10gbit") == 1e10
    for text in ("0", "gbit", "1gbyte", "-1"):
        with pytest.raises(UsageError, match="is no rate"):
            parse_rate(text)


def test_names() -> None:
    assert parse_names("ring, mpi,ring", ["mpi", "ring"], "all-reduce") == ("ring", "mpi")
    with pytest.raises(SlowmoError, match="Did you mean 'ring'"):
        parse_names("rign", ["mpi", "ring"], "all-reduce")


def test_spread_is_the_median_and_the_quartiles() -> None:
    timing = Timing([{"s": float(s), "part_s": 2.0 * s} for s in (5, 1, 4, 2, 3)])
    assert timing.spread() == {"time_s": 3.0, "q1_s": 2.0, "q3_s": 4.0, "repetitions": 5}
    assert timing.median("part_s") == 6.0
    assert Timing([{"s": 7.0}]).spread() == {"time_s": 7.0, "q1_s": 7.0, "q3_s": 7.0, "repetitions": 1}


def test_variants_alternate_and_the_slowest_rank_counts() -> None:
    """On simulated ranks: A B A B ..., and at least three repetitions when time is up."""
    from slowmo_mpi.comm import simulate

    order: list[list[str]] = [[], []]

    def program(comm: Any) -> tuple[float, float, int]:
        def variant(name: str) -> Any:
            return lambda: order[comm.rank].append(name) or {"s": 1.0 + comm.rank, "part_s": 1.0 + comm.rank}

        taken = Bench(comm, repeat=9, seconds=0).alternate({"a": variant("a"), "b": variant("b")})
        return taken["a"].median(), taken["a"].median("part_s"), len(taken["b"].samples)

    assert simulate(2, program) == [(2.0, 1.5, 3)] * 2
    assert order == [["a", "b"] * 3] * 2


def test_times_over_the_wire() -> None:
    bench = Bench(None, rate_bit_s=1e9)  # type: ignore[arg-type]
    assert bench.over_wire(2.0, 125_000_000) == 2.0
    assert bench.over_wire(2.0, 0) is None
    assert bench.over_wire(2.0, 4) is None, "latency is no share of a wire"
    assert Bench(None).over_wire(2.0, 1) is None  # type: ignore[arg-type]


def test_the_table_is_aligned_and_leaves_out_empty_columns() -> None:
    environment = {
        "ranks": 2, "hosts": 1, "threads": 1, "wire_rate_bit_s": None, "device": "cpu", "transport": "direct",
        "command": "slowmo bench x", "versions": {"torch": "2", "mpi": "MPI"},
    }  # fmt: skip
    columns = [Column("n", "bytes", "d"), Column("s", "us", ".1f", 1e6), Column("none", "none"), Column("ok", "ok")]
    rows = [{"n": 4, "s": 1e-6, "ok": True}, {"n": 1024, "s": 1.5e-3, "ok": False}]
    table = Report("x", ["in us"], columns, rows, environment)
    assert not table.ok
    lines = table.text().splitlines()
    assert all(line.startswith("# ") for line in lines[:-2])
    assert lines[-3:] == ["# bytes      us  ok", "      4     1.0  yes", "   1024  1500.0  NO"]


@pytest.mark.parametrize("name, least, most", [("resnet18", 11.17e6, 11.18e6), ("resnet50", 23.5e6, 23.53e6)])
def test_the_resnets_have_as_many_parameters_as_in_the_paper(name: str, least: float, most: float) -> None:
    assert least < sum(p.numel() for p in build(name, 32, 0).parameters()) < most


@pytest.mark.parametrize("image, wanted", [(8, 100_000), (32, 1_000_000), (4, 5_000)])
def test_an_mlp_has_about_as_many_parameters_as_asked_for(image: int, wanted: int) -> None:
    assert sum(p.numel() for p in build("mlp", image, wanted).parameters()) == pytest.approx(wanted, rel=0.05)


def test_the_table_of_a_benchmark_says_what_was_measured(alone: dict[str, str]) -> None:
    done = run(alone, "outer", "--lengths", "1Ki", "--repeat", "1")
    assert done.returncode == DONE, done.stderr
    assert re.search(r"^# slowmo bench outer --lengths 1Ki --repeat 1$", done.stdout, re.MULTILINE)
    assert "GB/s (1e9 bytes)" in done.stdout
