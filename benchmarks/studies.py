"""The paper's experiments at small scale: each study one command, with its table and figure; every run in runs.json.

    python benchmarks/studies.py bases        (or rounds, averaging, buffers, skewed, tau, momentum, slow-rate, theory)
    python benchmarks/translation_data.py data/catalogs --download      (117,341 pairs; 163 MB)
    slowmo data vocab data/catalogs --size 2000
    python benchmarks/studies.py translation

Workers are simulated ranks, but for `translation`, and one run takes one core, so that `--jobs` of them go on side by
side. Runs that the JSON file has already are not repeated; one may belong to several studies. The tables give means
over seeds and 95 % confidence intervals of the mean (Student's t).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Student's t for a two-sided 95 % interval, by the number of seeds."""

FASHION = """
[run]
epochs = 2
log_every = 20
threads = 1
[task]
name = "study_tasks:fashion"
batch_size = 16
[optimizer]
lr = 0.2
reference_batch = 256
momentum = 0.9
nesterov = true
weight_decay = 1e-4
schedule = "step"
warmup = 0.2
milestones = [1.0, 1.5]
[slowmo]
tau = 12
[compute]
vmap = true
"""
QUADRATIC = """
[run]
threads = 1
[task]
name = "study_tasks:theory"
batch_size = 1
noise = 3.0
heterogeneity = 0.3
start = 3.0
[base]
algorithm = "local"
[slowmo]
tau = 12
[compute]
vmap = true
"""
TRANSLATION = """
[run]
steps = 400
log_every = 10
eval_workers = false
[task]
name = "wmt16"
data = "data/catalogs"
batch_size = 1
model = "small"
vocabulary = 2000
max_tokens = 1000
dropout = 0.1
label_smoothing = 0.1
[optimizer]
name = "adam"
lr = 0.002
betas = [0.9, 0.98]
schedule = "inverse-sqrt"
warmup = 100
[slowmo]
tau = 12
buffers = "maintain"
[checkpoint]
every = 0
"""
RATE = 0.4
"""c of `theory`. With the paper's 1, alpha gamma L / (1 - beta) would exceed 1 in more than the shortest runs."""
RUN_S = 3600  # of a run on real ranks, which takes minutes
BETA = {4: 0.2, 8: 0.4, 16: 0.6, 32: 0.7}
"""The authors' slow momentum by the number of workers, 0.7 their CIFAR-10 choice for 32."""
OFF = {"slowmo.beta": 0.0, "slowmo.tau": 0}
PLAIN = {
    "AR-SGD": {"base.algorithm": "allreduce", **OFF},
    "Local SGD": {"base.algorithm": "local", "slowmo.beta": 0.0, "slowmo.buffers": "maintain"},
    "SGP": {"base.algorithm": "sgp", **OFF},
    "OSGP": {"base.algorithm": "osgp", **OFF},
}
"""The bases as they are without SlowMo."""


@dataclass(frozen=True)
class Case:
    """One line of a table: what is set, on how many workers, and where it stands in the figure."""

    series: str
    x: float | str
    ranks: int
    settings: dict[str, Any]
    text: str = FASHION

    def key(self, seed: int) -> str:
        return json.dumps([self.ranks, self.settings, seed, self.text], sort_keys=True)


@dataclass(frozen=True)
class Study:
    title: str
    cases: list[Case]
    x: str
    show: Callable[[Study, dict[str, Any], int, Path], str]
    """Draws the figure; the tables."""


def slow(base: str, ranks: int, **more: Any) -> dict[str, Any]:
    """The base with SlowMo: alpha 1, the authors' beta, buffers reset, but for `more`."""
    settings = {k: v for k, v in PLAIN[base].items() if not k.startswith("slowmo.")}
    return {**settings, "slowmo.beta": BETA[ranks], **{f"slowmo.{k}": v for k, v in more.items()}}


def bases() -> list[Case]:
    """Table 1's shape: each base with and without SlowMo."""
    cases = []
    for m in (4, 8, 16, 32):
        cases += [Case(name, m, m, settings) for name, settings in PLAIN.items()]
        cases += [Case(f"{name} + SlowMo", m, m, slow(name, m)) for name in PLAIN if name != "AR-SGD"]
    return cases


def rounds() -> list[Case]:
    """The same with as many rounds as the paper's order of magnitude: 16 workers, 6 epochs, 117 rounds."""
    longer = {"run.epochs": 6, "optimizer.warmup": 0.5, "optimizer.milestones": [3.0, 4.5]}
    cases = [Case(b, "base", 16, {**settings, **longer}) for b, settings in PLAIN.items()]
    return cases + [Case(b, "SlowMo", 16, {**slow(b, 16), **longer}) for b in PLAIN if b != "AR-SGD"]


def tau() -> list[Case]:
    """Figure 3's shape: steps between averages."""
    steps = (1, 4, 12, 48, 192)
    local = [Case("Local SGD", t, 16, {**PLAIN["Local SGD"], "slowmo.tau": t}) for t in steps]
    return local + [Case(f"{b} + SlowMo", t, 16, slow(b, 16, tau=t)) for b in ("Local SGD", "SGP") for t in steps]


def momentum() -> list[Case]:
    """beta at alpha 1."""
    return [Case(b, x, 16, slow(b, 16, beta=x)) for b in ("Local SGD", "SGP") for x in (0.0, 0.2, 0.4, 0.6, 0.8)]


def slow_rate() -> list[Case]:
    """alpha at the chosen beta; 1 is the default, and those runs are `momentum`'s too."""
    cases = [(b, x) for b in ("Local SGD", "SGP") for x in (0.5, 1.0, 1.5)]
    return [Case(b, x, 16, slow(b, 16) if x == 1 else slow(b, 16, alpha=x)) for b, x in cases]


def buffers() -> list[Case]:
    """Line 2: what becomes of the optimizer's buffers."""
    ways = ("reset", "maintain", "average")
    return [Case(f"{b} + SlowMo", w, 16, slow(b, 16, buffers=w)) for b in ("Local SGD", "SGP") for w in ways]


def averaging() -> list[Case]:
    """The exact average left out; and averages of the momentum buffers without slow momentum (Yu et al. 2019)."""
    double = {"slowmo.beta": 0.0, "slowmo.buffers": "average"}
    return [
        Case("SGP", "base", 16, PLAIN["SGP"]),
        Case("SGP", "double averaging", 16, {"base.algorithm": "sgp", **double}),
        Case("SGP", "SlowMo, noaverage", 16, slow("SGP", 16, average="none")),
        Case("SGP", "SlowMo", 16, slow("SGP", 16)),
        Case("Local SGD", "base", 16, PLAIN["Local SGD"]),
        Case("Local SGD", "double averaging", 16, {"base.algorithm": "local", **double}),
        Case("Local SGD", "SlowMo", 16, slow("Local SGD", 16)),
    ]


def skewed() -> list[Case]:
    """Workers whose data differ, on a network without batch-norm, whose statistics would differ too."""
    group = {"task.group_norm": True}
    data = {**group, "task.dirichlet": 0.1}
    cases = [Case("AR-SGD", "all data alike", 16, {**PLAIN["AR-SGD"], **group})]
    cases += [Case(b, "base", 16, {**settings, **data}) for b, settings in PLAIN.items()]
    return cases + [Case(b, "SlowMo", 16, {**slow(b, 16), **data}) for b in PLAIN if b != "AR-SGD"]


def theory() -> list[Case]:
    """Theorem 1: where alpha gamma / (1 - beta) = c sqrt(m / (tau T)), mean |grad f|^2 falls as 1 / sqrt(m tau T).

    The gradient is that at the workers' mean. It is measured every so many steps, a number that has no factor with tau
    in common, so that all steps of a round count.
    """
    cases = []
    for m in (1, 4, 16):
        for rounds, every in ((8, 1), (32, 1), (128, 5), (512, 25)):
            steps, rate = 12 * rounds, RATE * math.sqrt(m / (12 * rounds))
            for beta, alpha in ((0.0, 1.0), (0.6, 1.0), (0.6, 2.0)):
                slowed = {"slowmo.beta": beta, "slowmo.alpha": alpha, "optimizer.lr": rate * (1 - beta) / alpha}
                name = f"m = {m}, beta {beta:g}" + (f", alpha {alpha:g}" if alpha != 1 else "")
                if alpha == 1 or m == 4:
                    settings = {**slowed, "run.steps": steps, "run.log_every": steps, "run.eval_every": every}
                    cases.append(Case(name, steps, m, settings, QUADRATIC))
    return cases


def translation() -> list[Case]:
    """The language experiment on real ranks; Adam, whose buffers are kept."""
    plain = {"AR-Adam": PLAIN["AR-SGD"], "Local Adam": PLAIN["Local SGD"], "SGP": PLAIN["SGP"]}
    cases = [Case(name, "base", 4, settings, TRANSLATION) for name, settings in plain.items()]
    more = {"Local Adam": slow("Local SGD", 4, buffers="maintain"), "SGP": slow("SGP", 4, buffers="maintain")}
    return cases + [Case(name, "SlowMo", 4, settings, TRANSLATION) for name, settings in more.items()]


def run_real(case: Case, seed: int) -> dict[str, Any]:
    """One training on real ranks, which take all cores."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "run.toml"
        file.write_text(case.text)
        words = [
            f"--set={k}={json.dumps(v)}" for k, v in {**case.settings, "run.seed": seed, "run.folder": name}.items()
        ]
        command = [sys.executable, "-P", "-m", "slowmo_mpi", "train", str(file), "-n", str(case.ranks), *words]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True, timeout=RUN_S)
        return outcome(next(Path(name).glob("*/metrics.jsonl")), started)


def run(case: Case, seed: int) -> dict[str, Any]:
    """One training on simulated ranks, in this process."""
    import torch

    from slowmo_mpi import config, simulate
    from slowmo_mpi.train import train

    torch.set_num_threads(1)
    words = [f"{k}={json.dumps(v)}" for k, v in {**case.settings, "run.seed": seed}.items()]
    settings = config.parse(case.text, "studies.py", words)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulate(case.ranks, lambda comm: train(settings, comm, folder))
        return outcome(folder / "metrics.jsonl", started)


def outcome(metrics: Path, started: float) -> dict[str, Any]:
    """The last evaluation, the training loss of the last tenth, and the mean over all evaluations of |grad f|^2."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    logs = [r for r in records if r["kind"] == "train"]
    last = {k: v for k, v in records[-1].items() if k in ("accuracy", "bleu", "loss", "consensus", "excess", "step")}
    tail = logs[-max(1, len(logs) // 10) :]
    gradients = [r["gradient"] for r in records if r["kind"] == "eval" and "gradient" in r]
    means = {"gradient": statistics.fmean(gradients)} if gradients else {}
    return {**last, **means, "train_loss": statistics.fmean(r["loss"] for r in tail),
            "seconds": time.perf_counter() - started}  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % confidence interval (nan from one value)."""
    n = len(values)
    spread = T_95.get(n, 1.96) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.fmean(values), spread


def told(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """ "87.12 ± 0.31"."""
    mean, spread = interval([scale * v for v in values])
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread == spread else "")


def results(study: Study, runs: dict[str, Any], seeds: int) -> Iterator[tuple[Case, list[dict[str, Any]]]]:
    """Every case with its runs, of as many seeds as there are."""
    for case in study.cases:
        found = [runs[case.key(s)] for s in range(seeds) if case.key(s) in runs]
        if found:
            yield case, found


COLUMNS = {
    "test accuracy, %": ("accuracy", 100.0, 2),
    "BLEU": ("bleu", 1.0, 2),
    "test loss": ("loss", 1.0, 4),
    "train loss": ("train_loss", 1.0, 4),
}


def accuracies(study: Study, runs: dict[str, Any], seeds: int, picture: Path) -> str:
    """A table of the metrics, and what SlowMo changes, seed by seed; the figure: the metrics against x."""
    shown = list(results(study, runs, seeds))
    columns = {label: column for label, column in COLUMNS.items() if column[0] in shown[0][1][0]}
    score = next(iter(columns.values()))
    compared = any(is_base(other, case) for case, _ in shown for other, _ in shown)
    head = ["workers", *([study.x or "what"] if study.x != "workers" else []), "", *columns]
    head += [*(["SlowMo changes the first by"] if compared else []), "seeds"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines: dict[str, list[tuple[Any, list[dict[str, Any]]]]] = {}
    for case, found in shown:
        cells = [told([r[name] for r in found], scale, digits) for name, scale, digits in columns.values()]
        without = next((others for other, others in shown if is_base(other, case)), [])
        pairs = list(zip(found, without, strict=False))
        change = [told([a[score[0]] - b[score[0]] for a, b in pairs], score[1], score[2]) if pairs else ""]
        place = [str(case.ranks), *([str(case.x)] if study.x != "workers" else []), case.series]
        rows.append(f"| {' | '.join([*place, *cells, *(change if compared else []), str(len(found))])} |")
        lines.setdefault(case.series, []).append((case.x, found))
    draw(study, lines, [(label, name, scale) for label, (name, scale, _) in columns.items() if name != "loss"], picture)
    return "\n".join(rows)


def is_base(other: Case, case: Case) -> bool:
    """Whether `other` is what `case` is without SlowMo, all else being equal."""
    same = other.ranks == case.ranks and other.text == case.text
    if case.series.endswith(" + SlowMo"):
        return same and f"{other.series} + SlowMo" == case.series and other.x == case.x
    return same and other.series == case.series and other.x == "base" and str(case.x).startswith("SlowMo")


def draw(
    study: Study,
    lines: dict[str, list[tuple[Any, list[dict[str, Any]]]]],
    shown: list[tuple[str, str, float]],
    picture: Path,
) -> None:
    """A panel for each of `shown` (label, name, scale) against x, a number (logarithmic) or a word; with intervals."""
    from slowmo_mpi.picture import blank, save
    from slowmo_mpi.report.figures import COLOURS

    figure = blank(11, 4.4)
    figure.suptitle(study.title, fontsize=12, weight="bold")
    panels: Any = figure.subplots(1, len(shown))
    words = list(dict.fromkeys(str(x) for line in lines.values() for x, _ in line))
    numbers = all(isinstance(x, int | float) for line in lines.values() for x, _ in line)
    plain = [name for name in lines if not name.endswith("+ SlowMo")]
    for axes, (label, name, scale) in zip(panels, shown, strict=True):
        for i, (series, line) in enumerate(lines.items()):
            x = [v if numbers else words.index(str(v)) + 0.08 * (i - len(lines) / 2) for v, _ in line]
            y = [interval([scale * r[name] for r in found]) for _, found in line]
            partner = series.removesuffix(" + SlowMo")
            colour = COLOURS[(plain.index(partner) if partner in plain else i) % len(COLOURS)]
            dashed = series in plain and f"{series} + SlowMo" in lines
            axes.errorbar(
                x, [m for m, _ in y], yerr=[0.0 if e != e else e for _, e in y], label=series, color=colour, capsize=2,
                linestyle=("--" if dashed else "-") if numbers else "none", marker="o", markersize=4, linewidth=1.3,
                markerfacecolor="white" if dashed else colour,
            )  # fmt: skip
        axes.set_ylabel(label)
        axes.set_xlabel(study.x)
        if not numbers:
            axes.set_xticks(range(len(words)), words)
        elif min(x for line in lines.values() for x, _ in line) > 0:
            axes.set_xscale("log")
            axes.set_xticks(ticks := sorted({x for line in lines.values() for x, _ in line}), [f"{t:g}" for t in ticks])
            axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(fontsize=8, frameon=False)
    save(figure, picture)


def rates(study: Study, runs: dict[str, Any], seeds: int, picture: Path) -> str:
    """The mean of |grad f|^2 over a run against m tau T: one line of slope -1/2 for all numbers of workers."""
    from slowmo_mpi.picture import blank, save
    from slowmo_mpi.report.figures import COLOURS

    lines: dict[str, dict[int, tuple[float, float]]] = {}
    for case, found in results(study, runs, seeds):
        measured = interval([r["gradient"] for r in found])
        lines.setdefault(case.series, {})[case.ranks * int(case.x)] = measured
    work = sorted({x for line in lines.values() for x in line})
    figure = blank(7, 4.6)
    figure.suptitle(study.title, fontsize=12, weight="bold")
    axes = figure.subplots()
    rows = [
        f"| mean of \\|grad f\\|^2 at m tau T = | {' | '.join(map(str, work))} | slope |",
        "|---" * (len(work) + 2) + "|",
    ]
    every = []
    for i, (series, line) in enumerate(lines.items()):
        in_range = [(x, y) for x, (y, _) in sorted(line.items())[1:]]
        every += in_range
        slope = fitted_slope(in_range)
        cells = [f"{line[x][0]:.3g} ± {line[x][1]:.2g}" if x in line else "" for x in work]
        rows.append(f"| {series} | {' | '.join(cells)} | {slope:.2f} |")
        axes.errorbar(
            list(line), [y for y, _ in line.values()], yerr=[0.0 if e != e else e for _, e in line.values()],
            label=f"{series}: slope {slope:.2f}", marker="osD"[i % 3], color=COLOURS[i % len(COLOURS)], capsize=2,
            markersize=4, linewidth=1.3, linestyle="--" if "beta 0.6" in series else "-",
        )  # fmt: skip
    bound = first_term()
    axes.plot(work, [bound / math.sqrt(x) for x in work], color="#8a97a6", label="Theorem 1, first term: slope -0.50")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("m tau T: gradients computed by all workers")
    axes.set_ylabel("mean of |grad f|^2 over the run")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    save(figure, picture)
    shares = [y * math.sqrt(x) / bound for x, y in every]
    least, most = min(shares), max(shares)
    rows.append(
        f"\nSlope over all runs but the shortest of each line: {fitted_slope(every):.2f} (theorem: -0.50). The "
        f"theorem's first term is {bound:.0f} / sqrt(m tau T); these runs are at {least:.2f} to {most:.2f} of it."
    )
    return "\n".join(rows)


def first_term() -> float:
    """Theorem 1's first term, times sqrt(m tau T): 2 (f(x0) - f*) / c + c L m V, V the mean gradient's variance.

    The terms left out are not negative. The base's own is 0 here: all f_i have one Hessian, and so the mean of the
    workers' gradients is the gradient at their mean.
    """
    from slowmo_mpi.tasks import Context
    from slowmo_mpi.tasks.quadratic import quadratic

    options = tomllib.loads(QUADRATIC)["task"]
    noise = options["noise"]
    task = quadratic(Context(0, 1, 0, ""), noise=noise, start=options["start"])
    excess = 0.5 * float(task.eigenvalues @ (task.model.x.detach().double() - task.optimum).square())
    return 2 * excess / RATE + RATE * float(task.eigenvalues.max()) * noise**2 * len(task.eigenvalues)


def fitted_slope(points: list[tuple[float, float]]) -> float:
    """Least squares in logarithms."""
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    return statistics.linear_regression(x, y).slope


STUDIES = {
    "bases": Study("Each base with and without SlowMo (Table 1)", bases(), "workers", accuracies),
    "rounds": Study("Three times as many rounds, 16 workers (Table 1)", rounds(), "", accuracies),
    "tau": Study("Steps between averages, 16 workers (Figure 3)", tau(), "tau", accuracies),
    "momentum": Study("Slow momentum, 16 workers, alpha 1", momentum(), "beta", accuracies),
    "slow-rate": Study("Slow learning rate, 16 workers, beta 0.6", slow_rate(), "alpha", accuracies),
    "buffers": Study("The optimizer's buffers when a round starts, 16 workers", buffers(), "buffers", accuracies),
    "averaging": Study("Without the exact average, and with double averaging, 16 workers", averaging(), "", accuracies),
    "skewed": Study("Workers whose data differ (Dirichlet 0.1), 16 workers", skewed(), "", accuracies),
    "translation": Study("English to German, 4 workers, 400 steps", translation(), "", accuracies),
    "theory": Study("Rate of convergence on the noisy quadratic, tau = 12", theory(), "steps", rates),
}


@click.command(help=__doc__.split("\n\n", 1)[0])
@click.argument("names", nargs=-1, type=click.Choice(list(STUDIES)))
@click.option("--seeds", default=3, show_default=True)
@click.option("--jobs", default=os.cpu_count(), show_default=True, help="Runs at the same time, one core each.")
@click.option("--out", default=HERE / "studies", type=Path, show_default=True, help="Folder of the results.")
def main(names: tuple[str, ...], seeds: int, jobs: int, out: Path) -> None:
    out.mkdir(exist_ok=True)
    store = out / "runs.json"
    runs: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    for name in names or STUDIES:
        study = STUDIES[name]
        wanted = [(c, s) for s in range(seeds) for c in study.cases if c.key(s) not in runs]
        started = time.perf_counter()
        real = name == "translation"
        with ProcessPoolExecutor(1 if real else jobs, mp_context=get_context("spawn")) as pool:
            waiting = {pool.submit(run_real if real else run, case, seed): (case, seed) for case, seed in wanted}
            for n, done in enumerate(as_completed(waiting), 1):
                case, seed = waiting[done]
                runs[case.key(seed)] = done.result()
                store.write_text(json.dumps(runs, indent=0) + "\n")
                left = (time.perf_counter() - started) * (len(wanted) / n - 1)
                click.echo(
                    f"{name} {n}/{len(wanted)}, {left / 60:.0f} min left: {case.ranks} x {case.series}", err=True
                )
        table = study.show(study, runs, seeds, out / f"{name}.png")
        (out / f"{name}.md").write_text(f"## {study.title}\n\n{table}\n\n![{study.title}]({name}.png)\n")
        click.echo(table)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
