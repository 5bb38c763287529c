"""Every base algorithm with and without SlowMo on Fashion-MNIST at equal samples: the table in the README.

    python benchmarks/bases.py [--ranks 4] [--seeds 3] [--epochs 2] [--out benchmarks/NAME]

Writes OUT.json with every run, OUT.md with the table and OUT.png with the figure. Runs that OUT.json has already are
not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BETA = 0.2  # the authors' choice for 4 workers
GOSSIP = {"slowmo.tau": 48, "slowmo.beta": BETA}
OFF = {"slowmo.tau": 0}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # label: base, without SlowMo, with SlowMo
    "AllReduce-SGD": ({"base.algorithm": "allreduce"}, OFF, {"slowmo.tau": 12, "slowmo.beta": BETA}),
    "Local SGD, tau 12": (
        {"base.algorithm": "local", "slowmo.tau": 12},
        {"slowmo.beta": 0.0, "slowmo.buffers": "maintain"},
        {"slowmo.beta": BETA},
    ),
    "D-PSGD, ring": ({"base.algorithm": "dpsgd", "base.topology": "ring-bidirectional"}, OFF, GOSSIP),
    "SGP, exponential": ({"base.algorithm": "sgp"}, OFF, GOSSIP),
    "OSGP, exponential": ({"base.algorithm": "osgp", "base.delay": 1}, OFF, GOSSIP),
}


def run(settings: dict[str, Any], ranks: int) -> dict[str, Any]:
    """One training; the last evaluation and the means over the run's log lines."""
    sets = [f"--set={k}={v}" for k, v in settings.items()]
    command = [sys.executable, "-m", "slowmo_mpi", "train", "examples/fashion-mnist.toml", "-n", str(ranks), "--json"]
    done = subprocess.run([*command, *sets], cwd=HERE.parent, stdout=subprocess.PIPE, check=True)
    last = json.loads(done.stdout)
    folder = HERE.parent / last["folder"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logs = [x for x in lines if x["kind"] == "train"]
    return {
        "test_accuracy": last["accuracy"],
        "test_loss": last["loss"],
        "train_loss": logs[-1]["loss"],  # the mean over the last logged steps
        "consensus": statistics.mean(x["consensus"] for x in logs),
        "sent_bytes_per_step": statistics.mean(x["sent_bytes_per_step"] for x in logs),
        "time_s": last["time_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "bases")
    options = parser.parse_args()
    store = options.out.with_suffix(".json")
    runs: dict[str, dict[str, Any]] = json.loads(store.read_text()) if store.exists() else {}
    for seed in range(options.seeds):
        for label, (base, without, with_slowmo) in VARIANTS.items():
            for name, outer in (("base", without), ("SlowMo", with_slowmo)):
                key = f"{label} | {name} | seed {seed} | {options.ranks} ranks | {options.epochs} epochs"
                if key in runs:
                    continue
                fixed = {"run.epochs": options.epochs, "run.seed": seed, "run.log_every": 52, "run.name": "bases"}
                runs[key] = run({**fixed, **base, **outer}, options.ranks)
                store.write_text(json.dumps(runs, indent=1) + "\n")
                print(key, runs[key], flush=True)
    table = markdown(runs, options.ranks, options.seeds, options.epochs)
    options.out.with_suffix(".md").write_text(table)
    draw(runs, options.ranks, options.seeds, options.epochs, options.out.with_suffix(".png"))
    print(table)


def markdown(runs: dict[str, dict[str, Any]], ranks: int, seeds: int, epochs: int) -> str:
    """The table: mean and spread (largest minus smallest) over seeds."""
    rows = [
        "| base | SlowMo | test accuracy, % (spread) | training loss | consensus distance | kB per rank and step |",
        "|---|---|---|---|---|---|",
    ]
    for label in VARIANTS:
        for name in ("base", "SlowMo"):
            keys = [f"{label} | {name} | seed {s} | {ranks} ranks | {epochs} epochs" for s in range(seeds)]
            found = [runs[k] for k in keys]
            accuracy = [100 * r["test_accuracy"] for r in found]

            def mean(key: str, found: list[dict[str, Any]] = found) -> float:
                return statistics.mean(r[key] for r in found)

            rows.append(
                f"| {label} | {'yes' if name == 'SlowMo' else 'no'} "
                f"| {statistics.mean(accuracy):.2f} ({max(accuracy) - min(accuracy):.2f}) | {mean('train_loss'):.4f} "
                f"| {mean('consensus'):.3g} | {mean('sent_bytes_per_step') / 1000:.1f} |"
            )
    return "\n".join(rows) + "\n"


def draw(runs: dict[str, dict[str, Any]], ranks: int, seeds: int, epochs: int, path: Path) -> None:
    """Test accuracy against bytes sent: an arrow from each base to the same base with SlowMo, bars for the spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for i, label in enumerate(VARIANTS):
        points = []
        for name in ("base", "SlowMo"):
            found = [runs[f"{label} | {name} | seed {s} | {ranks} ranks | {epochs} epochs"] for s in range(seeds)]
            accuracy = [100 * r["test_accuracy"] for r in found]
            x, y = statistics.mean(r["sent_bytes_per_step"] for r in found) / 1000, statistics.mean(accuracy)
            bars = [[y - min(accuracy)], [max(accuracy) - y]]
            face = "white" if name == "base" else f"C{i}"
            text = label if name == "SlowMo" else None
            axes.errorbar(x, y, bars, fmt="o", ms=8, color=f"C{i}", mfc=face, capsize=3, elinewidth=1, label=text)
            points.append((x, y))
        axes.annotate("", points[1], points[0], arrowprops={"arrowstyle": "->", "color": f"C{i}", "lw": 1.5})
    axes.set_xscale("log")
    axes.set_xlabel("sent per rank and step, kB")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Fashion-MNIST, {ranks} ranks, {epochs} epochs: each base (open) and with SlowMo (filled)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
