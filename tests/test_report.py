"""Reports: run folders of the real program, whole, damaged and cut off; numbers against those made by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pty
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slowmo_mpi import config, simulate
from slowmo_mpi.errors import UsageError
from slowmo_mpi.report import export, figures, follow, page, table
from slowmo_mpi.report.compare import Metric, compare, words
from slowmo_mpi.report.runs import find, read
from slowmo_mpi.train import train

LIMIT_S = 120
DIGITS = """
[run]
steps = 24
log_every = 4
eval_every = 12
[task]
name = "digits"
batch_size = 4
hidden = 8
[optimizer]
lr = 0.05
[slowmo]
tau = 6
[checkpoint]
every = 0
"""
QUADRATIC = """
[run]
steps = 20
log_every = 5
[task]
name = "quadratic"
batch_size = 1
dim = 8
[optimizer]
lr = 0.02
[slowmo]
tau = 5
[checkpoint]
every = 0
"""


def made(folder: Path, text: str, *overrides: str, ranks: int = 2) -> Path:
    """A run of the real program on simulated ranks."""
    folder.mkdir(parents=True)
    settings = config.parse(text, "a test", overrides)
    simulate(ranks, lambda comm: train(settings, comm, folder))
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two settings of digits, one of them with three seeds, and one run of another task."""
    folder = tmp_path_factory.mktemp("runs")
    made(folder / "sgp", DIGITS)
    for seed in range(3):
        made(folder / f"local-{seed}", DIGITS, "base.algorithm=local", "slowmo.beta=0.2", f"run.seed={seed}")
    made(folder / "other" / "quadratic", QUADRATIC)
    return folder


@pytest.fixture
def runs(originals: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(originals, tmp_path / "runs"))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def command(*arguments: str | Path, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    words_ = [sys.executable, "-m", "slowmo_mpi", "report", *map(str, arguments)]
    return subprocess.run(
        words_, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL, cwd=cwd, check=False, **more
    )


# ---- what is compared ----
def test_rows_are_settings_and_seeds_are_one_row(originals: Path) -> None:
    comparison = compare(find([originals / "sgp", *(originals / f"local-{i}" for i in range(3))]))
    assert comparison.keys == ["base.algorithm", "slowmo.beta"]
    assert [(row.label, len(row.runs)) for row in comparison.rows] == [("sgp, beta 0.6", 1), ("local, beta 0.2", 3)]
    accuracy = Metric("eval", "accuracy")
    last = [records(originals / f"local-{i}", "eval")[-1]["accuracy"] for i in range(3)]
    best = [max(r["accuracy"] for r in records(originals / f"local-{i}", "eval")) for i in range(3)]
    found = comparison.rows[1].last(accuracy)
    assert found is not None and (found.mean, found.of) == (pytest.approx(statistics.fmean(last)), 3)
    assert found.deviation == pytest.approx(statistics.stdev(last))
    assert comparison.rows[1].best(accuracy).mean == pytest.approx(statistics.fmean(best))  # type: ignore[union-attr]
    series = comparison.rows[1].series(accuracy)
    assert series is not None and series.steps == [12, 24] and series.band == "seeds"
    assert (series.low, series.high) != (series.values, series.values)
    assert (series.low[1], series.high[1]) == (min(last), max(last))  # type: ignore[index]


def test_costs_are_those_of_the_lines(originals: Path) -> None:
    """Bytes are summed over windows, rates and shares weighed by the windows' times."""
    run = read(originals / "sgp")
    lines = records(originals / "sgp", "train")
    assert [n for _, n in run.windows] == [4] * 6
    assert run.sent_bytes() == pytest.approx(sum(4 * r["sent_bytes_per_step"] for r in lines))
    times = [4 * 4 * 2 / r["samples_per_s"] for r in lines]  # steps x batch x ranks
    assert run.samples_per_s() == pytest.approx(24 * 4 * 2 / sum(times))
    assert run.step_s() == pytest.approx(sum(times) / 24)
    share = sum(r["communication_share"] * t for r, t in zip(lines, times, strict=True)) / sum(times)
    assert run.shares()["communication"] == pytest.approx(share)
    assert sum(run.shares().values()) == pytest.approx(1)
    assert run.time_s == records(originals / "sgp", "eval")[-1]["time_s"] and run.steps == 24


def test_time_to_a_target_is_that_of_the_first_line_that_reaches_it(runs: Path) -> None:
    values = [0.5, 0.7, None, 0.6, 0.9]
    lines = [{"kind": "eval", "step": 5 * i, "time_s": 10.0 * i, "accuracy": v} for i, v in enumerate(values, 1)]
    (runs / "sgp" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = find([runs / "sgp"])
    for target, expected in (("accuracy=0.7", 20.0), ("eval/accuracy=0.71", 50.0), ("accuracy=0.95", None)):
        comparison = compare(one, target)
        assert comparison.target is not None and comparison.target.time_s(one[0]) == expected
    assert "never" in table.text(compare(one, "accuracy=0.95"))
    loss = compare(find([runs / "other"]), "train/loss=0")
    falls = [r["time_s"] for r in records(runs / "other" / "quadratic", "train") if r["loss"] <= 0]
    assert loss.target is not None and loss.target.time_s(loss.runs[0]) == (falls[0] if falls else None)


def test_runs_alike_but_for_nothing_go_by_their_folders(runs: Path) -> None:
    shutil.copytree(runs / "sgp", runs / "again" / "sgp")
    comparison = compare(find([runs / "sgp", runs / "again"]))
    assert comparison.keys == []
    assert [row.label for row in comparison.rows] == [str(runs / "sgp"), str(runs / "again" / "sgp")]
    assert len(figures.pens(comparison)) == 2


def test_a_place_is_read_once(originals: Path) -> None:
    places = [originals, originals / "sgp", originals / "sgp" / "metrics.jsonl", originals / "other" / ".." / "sgp"]
    assert [run.name for run in find(places)] == ["local-0", "local-1", "local-2", "quadratic", "sgp"]


def test_settings_of_another_version_have_their_defaults(runs: Path) -> None:
    text = (runs / "sgp" / "config.toml").read_text()
    (runs / "sgp" / "config.toml").write_text(re.sub(r"\[comm\][^\[]*", "", text))
    assert compare(find([runs / "sgp", runs / "local-0"])).keys == ["base.algorithm", "slowmo.beta"]
    assert (
        words({"a.b": None, "c.d": True, "e.f": False, "g.h": 0.5, "ranks": 4}) == "b unset, d, not f, h 0.5, 4 ranks"
    )


def test_a_hundred_runs_of_a_sweep(originals: Path, tmp_path: Path) -> None:
    """Twenty-five settings with four seeds each; the best are named, the others grey."""
    for n in range(100):
        folder = tmp_path / f"run-{n:03d}"
        folder.mkdir()
        text = (originals / "sgp" / "config.toml").read_text()
        text = re.sub(r"^lr = .*$", f"lr = {0.01 * (n // 4 + 1):.2f}", text, flags=re.M)
        (folder / "config.toml").write_text(re.sub(r"^seed = .*$", f"seed = {n % 4}", text, flags=re.M))
        shutil.copy(originals / "sgp" / "manifest.json", folder)
        lines = [json.loads(line) for line in (originals / "sgp" / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line |= {"accuracy": 0.5 + (n // 4) / 100 + (n % 4) / 1000} if line["kind"] == "eval" else {}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = compare(find([tmp_path]))
    assert comparison.keys == ["optimizer.lr"] and len(comparison.rows) == 25
    assert all(len(row.runs) == 4 for row in comparison.rows)
    found = comparison.rows[3].last(Metric("eval", "accuracy"))
    assert found is not None and found.mean == pytest.approx(0.53 + 0.0015)
    assert found.deviation == pytest.approx(statistics.stdev([0, 0.001, 0.002, 0.003]))
    assert comparison.ranking()[0].label == "lr 0.25"
    drawn = figures.pens(comparison)
    assert sum(pen.named for pen in drawn.values()) == len(figures.COLOURS) and not drawn["lr 0.01"].named
    figures.png(figures.figures(comparison)[0], comparison, tmp_path / "a.png")
    assert not is_blank(tmp_path / "a.png")


# ---- what is damaged, cut off or still going on ----
def test_damaged_lines_are_told_once_and_left_out(runs: Path) -> None:
    path = runs / "sgp" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:40]
    lines[3] = "\0" * 100
    lines[4] = '{"kind": "train", "step": true}'
    path.write_text("\n".join(lines) + "\n" + '{"kind": "train", "st')  # and half a last line
    run = read(runs / "sgp")
    assert len(run.records) == len(lines) - 3
    assert run.faults == [
        f"3 of the {len(lines)} lines of metrics.jsonl cannot be read and are left out (line 2, 4, 5)"
    ]
    assert table.text(compare([run])).count(run.faults[0]) == 1


def test_files_that_are_missing_or_half_written(runs: Path) -> None:
    (runs / "sgp" / "config.toml").write_text('[run]\nname = "ha')
    (runs / "sgp" / "manifest.json").write_text('{"ranks": 2, "hos')
    run = read(runs / "sgp")
    assert run.faults == ["manifest.json cannot be read", "config.toml cannot be read"]
    assert run.state == "unknown" and run.sent_bytes() and run.step_s() is None
    for name in ("config.toml", "metrics.jsonl"):
        (runs / "local-0" / name).unlink()
    assert read(runs / "local-0").state == "done" and read(runs / "local-0").records == []
    comparison = compare(find([runs]))
    assert table.text(comparison) and page.page(comparison, figures.figures(comparison)[:1], "damaged")


def test_a_job_folder_is_looked_into_and_is_itself_a_run_only_while_it_holds_none(runs: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    job = jobs / "run-job-20261123-101500"
    job.mkdir(parents=True)
    shutil.copy(runs / "sgp" / "config.toml", job)
    assert [(run.folder, run.state) for run in find([jobs])] == [(job, "empty")]  # it waits in the queue
    (runs / "sgp").rename(job / "run-20261123-111500")
    assert [(run.folder.name, run.state) for run in find([jobs, job])] == [("run-20261123-111500", "done")]


def test_an_empty_run_is_listed_and_nothing_is_drawn(runs: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(runs / "sgp" / "config.toml", empty)
    done = command(empty, cwd=tmp_path)
    assert done.returncode == 0 and "empty: has no metrics yet" in done.stdout
    assert done.stderr == "no run has written a metric yet: there is nothing to draw\n"
    assert not (tmp_path / "report").exists()


def manifest(folder: Path, **changes: Any) -> None:
    """Change a manifest; None takes a key away."""
    path = folder / "manifest.json"
    new = {k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v is not None}
    path.write_text(json.dumps(new))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Something that runs, to stand for rank 0."""
    child = subprocess.Popen(["sleep", "300"])
    yield child
    child.kill()
    child.wait()


def test_states(runs: Path, process: subprocess.Popen[bytes]) -> None:
    folder = runs / "sgp"
    assert read(folder).state == "done" and read(folder).progress == 1
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    manifest(folder, result=None, ended=None, pid=process.pid, started=now, host=socket.gethostname())
    assert read(folder).state == "running" and read(folder).progress == 1
    manifest(folder, started="2020-01-01T00:00:00+0000")
    assert read(folder).state == "killed", "a process that is younger than the manifest only has the number"
    manifest(folder, started=now)
    process.kill()
    process.wait()
    assert read(folder).state == "killed"
    assert "killed after step 24" in table.text(compare([read(folder)]))
    manifest(folder, host="elsewhere")
    assert read(folder).state == "running"
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    assert read(folder).state == "silent"
    assert "no word since 60 min 00 s" in table.text(compare([read(folder)]))
    (folder / "error.txt").write_text(
        "Traceback (most recent call last):\n  File x\nslowmo_mpi.errors.SlowmoError: The loss became nan.\nType a.\n"
    )
    assert (read(folder).state, read(folder).why) == ("failed", "The loss became nan.")
    manifest(folder, result="stopped", reason="SIGUSR1")
    assert "stopped after step 24: SIGUSR1" in table.text(compare([read(folder)]))


def test_a_run_that_failed_before_it_began_is_one(tmp_path: Path) -> None:
    (tmp_path / "runs" / "early").mkdir(parents=True)
    (tmp_path / "runs" / "early" / "error.txt").write_text("slowmo_mpi.errors.SlowmoError: There is no data.\n")
    (run,) = find([tmp_path / "runs"])
    assert (run.state, run.why) == ("failed", "There is no data.")
    assert "There is no data." in table.text(compare([run]))


def test_a_run_that_diverged_ends_with_no_number_and_is_ranked_last(runs: Path) -> None:
    folder = runs / "sgp"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if '"eval"' in line)
    lines[last] = json.dumps({**json.loads(lines[last]), "loss": None})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    comparison = compare(find([runs]), target="loss=0.1")
    (row,) = (row for row in comparison.rows if folder in {run.folder for run in row.runs})
    assert row.last(Metric("eval", "loss")) is None and comparison.ranking()[-1] is row


def test_other_data_are_another_setting(runs: Path) -> None:
    for name, seed, place in (("a", 0, "here"), ("b", 1, "there")):
        copy = Path(shutil.copytree(runs / "sgp", runs / "copies" / name))
        text = (copy / "config.toml").read_text()
        text = re.sub(r"(?m)^seed = .*", f"seed = {seed}", text)
        (copy / "config.toml").write_text(re.sub(r"(?m)^data = .*", f'data = "{place}"', text))
    assert [row.label for row in compare(find([runs / "copies"])).rows] == ["here", "there"]


def test_names_of_metrics_tell_what_is_better() -> None:
    assert [Metric("eval", n).higher for n in ("accuracy", "top5", "top5_error", "loss")] == [True, True, False, False]


def test_a_dollar_in_a_name_and_a_name_too_long(runs: Path, tmp_path: Path) -> None:
    names = ["$\\alpha_$", "lr$0.1$x_{$"]
    for name in names:
        shutil.copytree(runs / "sgp", runs / "copies" / name)
    comparison = compare(find([runs / "copies"]))
    assert [row.label for row in comparison.rows] == names
    for figure in figures.figures(comparison):
        figures.png(figure, comparison, tmp_path / "a.png")
        assert all(figures.svg(panel) for panel in figure.panels)
    with pytest.raises(UsageError, match="There is no run"):
        find(["x" * 300])


def test_a_run_that_began_elsewhere_counts_its_own_steps(runs: Path) -> None:
    """resume.py starts a new folder from a checkpoint file; a folder that goes on keeps its first life's start."""
    folder = runs / "sgp"
    whole = read(folder).sent_bytes()
    first = records(folder, "train")[0]["sent_bytes_per_step"]
    manifest(folder, resumed_at_step=3)
    assert read(folder).sent_bytes() == pytest.approx(whole - 3 * first)  # type: ignore[operator]
    manifest(folder, resumed_at_step=12, lives=[{"started": "2026-01-01T00:00:00+0000"}])
    assert read(folder).sent_bytes() == pytest.approx(whole)


# ---- pictures and page ----
def is_blank(path: Path) -> bool:
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    return bool(pixels.std() < 0.02)


class Page(HTMLParser):
    """What an HTML page refers to, and whether its tags close."""

    VOID = ("meta", "img", "line", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "data", "action", "srcset", "style")]
        if tag not in self.VOID:
            self.tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.tags.pop() == tag


def test_the_command_writes_pictures_and_a_page_that_needs_nothing_else(originals: Path, tmp_path: Path) -> None:
    done = command(originals, "--target", "accuracy=0.05", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "time to test accuracy ≥ 0.05" in done.stdout and "simulated ranks" in done.stdout
    pictures = {p.stem for p in (tmp_path / "out").glob("*.png")}
    expected = {"overview", "train-loss", "eval-loss", "eval-accuracy", "consensus", "traffic", "time"}
    assert pictures == expected | {"eval-distance", "eval-excess"}
    for name in pictures:
        assert not is_blank(tmp_path / "out" / f"{name}.png"), name
    text = (tmp_path / "out" / "report.html").read_text()
    found = Page(text)
    assert found.tags == [] and "script" not in found.seen and "link" not in found.seen
    images = [r for r in found.references if r.startswith("data:image/svg+xml;base64,")]
    assert len(images) == found.seen.count("img") == 2 * (len(pictures) - 1)
    assert len(images) == len(found.references), "the page refers to something outside"
    assert "@import" not in text and "url(" not in text and "http" not in text
    assert "@media print" in text and "width=device-width" in text
    assert 'alt="test accuracy against wall time"' in text


def test_a_band_over_workers(runs: Path) -> None:
    """Any metric with NAME_min and NAME_max beside it; those two are no metrics of their own."""
    path = runs / "sgp" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= {"accuracy_min": 0.1, "accuracy_mean": 0.15, "accuracy_max": 0.2} if line["kind"] == "eval" else {}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = compare([read(runs / "sgp")])
    series = comparison.rows[0].series(Metric("eval", "accuracy"))
    assert series is not None and (series.band, series.low, series.high) == ("workers", [0.1, 0.1], [0.2, 0.2])
    assert {m.name for m in comparison.metrics if m.kind == "eval"} == {"loss", "accuracy"}
    notes = {f.name: f.note for f in figures.figures(comparison)}
    assert notes["eval-accuracy"].endswith("Band: the lowest to the highest of the workers.")


def test_names_in_a_page_are_text(runs: Path) -> None:
    (runs / "sgp").rename(runs / "<b>&")
    comparison = compare(find([runs / "<b>&"]))
    text = page.page(comparison, [], "<i>")
    assert "<b>" not in text and "<i>" not in text and "&lt;b&gt;&amp;" in text


def test_long_curves_are_thinned_and_keep_their_end(runs: Path) -> None:
    path = runs / "sgp" / "metrics.jsonl"
    one = records(runs / "sgp", "train")[0]
    path.write_text("".join(json.dumps(one | {"step": i, "loss": 1 / i}) + "\n" for i in range(1, 20_001)))
    comparison = compare([read(runs / "sgp")])
    text = figures.svg(figures.figures(comparison)[0].panels[0])
    assert len(text) < 400_000


# ---- programs ----
def test_csv_and_json(originals: Path) -> None:
    comparison = compare(find([originals / "sgp", originals / "local-1"]))
    rows = list(csv.DictReader(io.StringIO(export.csv_text(comparison))))
    mine = [row for row in rows if row["run"] == "sgp"]
    lines = [json.loads(line) for line in (originals / "sgp" / "metrics.jsonl").read_text().splitlines()]
    assert len(mine) == len(lines) and {row["base.algorithm"] for row in rows} == {"sgp", "local"}
    for row, line in zip(mine, lines, strict=True):
        assert all(row[k] == ("" if v is None else str(v)) for k, v in line.items())
    found = json.loads(command(originals, "--json").stdout)
    assert len(found["rows"]) == 3
    row = next(r for r in found["rows"] if len(r["runs"]) == 3)
    assert row["seeds"] == [0, 1, 2] and row["numbers"]["steps"] == {"mean": 24, "deviation": 0, "of": 3}


def test_tensorboard_files_hold_the_same_numbers(originals: Path, tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    for _ in range(2):  # the second export takes the first one's place
        export.tensorboard(compare(find([originals / "sgp"])), tmp_path)
    (path,) = (tmp_path / "sgp").iterdir()
    events = [e for e in loader.EventFileLoader(str(path)).Load() if e.summary.value]
    found = {(v.tag, e.step): v.tensor.float_val[0] for e in events for v in e.summary.value}
    for kind in ("train", "eval"):
        for line in records(originals / "sgp", kind):
            assert math.isclose(found[f"{kind}/loss", line["step"]], line["loss"], rel_tol=1e-6)


def test_it_works_on_a_login_node(originals: Path, tmp_path: Path) -> None:
    """Without torch, MPI and h5py everything; without matplotlib the table, and what to type."""
    block = "import sys; sys.modules |= dict.fromkeys(%r)\nfrom slowmo_mpi.cli import main; main(sys.argv[1:])"
    heavy = ["torch", "mpi4py", "h5py"]
    for absent, code in ((heavy, 0), ([*heavy, "matplotlib"], 1)):
        done = subprocess.run(
            [sys.executable, "-c", block % absent, "report", str(originals / "sgp"), "-o", str(tmp_path / "out")],
            capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "test accuracy" in done.stdout
    assert "Drawing needs matplotlib" in done.stderr and "pip install matplotlib" in done.stderr


@pytest.mark.parametrize(
    "arguments, words_",
    [
        (["absent"], ["no run absent"]),
        (["runs/spg"], ["no run runs/spg", "Did you mean 'sgp'?"]),
        (["nothing"], ["nothing holds no run", "metrics.jsonl", "slowmo report runs"]),
        (["runs", "--target", "acuracy=0.9"], ["'acuracy'", "Did you mean 'accuracy'?", "eval/accuracy"]),
        (["runs", "--target", "accuracy"], ["METRIC=VALUE"]),
        (["runs", "--target", "accuracy=high"], ["METRIC=VALUE"]),
        (["runs", "--csv", "--json"], ["exclude each other"]),
        ([], ["Missing argument"]),
    ],
)
def test_wrong_usage_is_one_message(originals: Path, tmp_path: Path, arguments: list[str], words_: list[str]) -> None:
    (tmp_path / "runs").symlink_to(originals)
    (tmp_path / "nothing").mkdir()
    done = command(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (UsageError.exit_code, "")
    assert done.stderr.startswith("slowmo: ") and done.stderr.count("slowmo: ") == 1
    for word in words_:
        assert word in done.stderr


def test_a_folder_that_cannot_be_written(originals: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = command(originals / "sgp", "-o", tmp_path / "file" / "out")
    assert done.returncode == 1 and "cannot be written" in done.stderr and "-o FOLDER" in done.stderr
    assert "test accuracy" in done.stdout


# ---- following ----
def going_on(folder: Path, pid: int) -> list[str]:
    """Make a finished run one that has just begun; the lines that it will write."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    manifest(folder, result=None, ended=None, pid=pid, started=now, host=socket.gethostname())
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").unlink()
    return lines


def test_following_a_run_until_it_is_killed(runs: Path, process: subprocess.Popen[bytes]) -> None:
    lines = going_on(runs / "sgp", process.pid)
    watcher = subprocess.Popen(
        [sys.executable, "-m", "slowmo_mpi", "report", "--follow", str(runs / "sgp")], stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None
    with (runs / "sgp" / "metrics.jsonl").open("w") as file:
        file.write(lines[0] + lines[1][:30])
        file.flush()
        assert watcher.stdout.readline().startswith("train step 4  loss ")
        file.write(lines[1][30:])
        file.flush()
        assert watcher.stdout.readline().startswith("train step 8  loss ")
    process.kill()
    process.wait()
    out, _ = watcher.communicate(timeout=LIMIT_S)
    assert watcher.returncode == 0
    assert out == "sgp: killed after step 8: its process is gone, and it has not said why\n"


def test_following_on_a_terminal_draws_over_itself_and_ends_with_the_run(
    runs: Path, process: subprocess.Popen[bytes]
) -> None:
    lines = going_on(runs / "sgp", process.pid)
    ours, theirs = pty.openpty()
    watcher = subprocess.Popen(
        [sys.executable, "-m", "slowmo_mpi", "report", "--follow", str(runs / "sgp")],
        stdout=theirs, stdin=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "80", "LINES": "24"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    wrote = False
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            seen += os.read(ours, 65_536)
        except OSError:
            break  # the other end is closed
        if not wrote and b"running" in seen:
            (runs / "sgp" / "metrics.jsonl").write_text("".join(lines))
            wrote = True
        if b"test accuracy" in seen:
            manifest(runs / "sgp", result="done")
    os.close(ours)
    assert watcher.wait(timeout=LIMIT_S) == 0
    text = seen.decode().replace("\r\n", "\n")
    assert "\033[1A" in text and "sgp  running  step 24" in text
    assert text.endswith(f"sgp: done after 24 steps, {table.span(read(runs / 'sgp').time_s)}\n")
    frames = re.split(r"\033\[\d+A", text)
    assert all(frame.count("\n") < 24 and max(map(len, frame.split("\n"))) <= 80 for frame in frames)


def test_a_small_screen_and_many_runs(originals: Path) -> None:
    runs_ = find([originals])
    for height in (3, 6, 30):
        lines = follow._picture(runs_, 60, height)
        assert len(lines) < height and all(len(line) < 60 for line in lines)
    assert follow._picture(runs_, 60, 5)[-1] == "and 3 more"
    assert follow.sparkline([0.0, 1.0, 2.0, 3.0], 4) == "▁▃▆█"
    assert follow.sparkline([1.0] * 100, 5) == "▁" * 5 and len(follow.sparkline(list(map(float, range(7))), 60)) == 7
