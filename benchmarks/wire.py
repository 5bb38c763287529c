"""The measurements of communication: `slowmo bench` on hosts with a slow network, one after the other.

    python benchmarks/wire.py                      all of them (about half an hour, root; see netlab.py)
    python benchmarks/wire.py allreduce overlap    some, by the beginning of their names
    python benchmarks/wire.py --list

Each is run by one command, which stands above its table; what was measured before is kept in --out (JSON), and the
page of all tables is written beside it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
from netlab import Lab

HERE = Path(__file__).resolve().parent
STEP = "step --model resnet18 --image 16 --repeat 7 --seconds 60"


@dataclass(frozen=True)
class Case:
    """One measurement: a `slowmo bench` command on so many hosts (0: this machine, no network) with a rate."""

    name: str
    hosts: int
    rate: str
    command: str
    ranks_per_host: int = 1

    def line(self) -> str:
        """The command that runs it alone."""
        if not self.hosts:
            return f"slowmo bench {self.command} -n {self.ranks_per_host}"
        ranks = f" --ranks-per-host {self.ranks_per_host}" if self.ranks_per_host > 1 else ""
        return (
            f"python benchmarks/netlab.py --hosts {self.hosts} --rate {self.rate}{ranks} -- slowmo bench {self.command}"
        )


SIZES = "4Mi,16Mi,100Mi,400Mi"
SMALL = "4,256,4Ki,16Ki,64Ki"
CASES = [
    *(
        Case(f"allreduce large {hosts}x{rate}", hosts, rate,
             f"allreduce --sizes {SIZES} --algorithms ring,mpi-blocking --against gloo --repeat 7 --seconds 40")
        for hosts in (2, 4) for rate in ("1gbit", "10gbit", "none")
    ),
    *(
        Case(f"allreduce small {hosts}x1gbit", hosts, "1gbit",
             f"allreduce --sizes {SMALL} --algorithms auto,mpi-blocking --against gloo --repeat 31")
        for hosts in (2, 4)
    ),
    Case("allreduce small, shared memory, 2 ranks", 0, "", f"allreduce --sizes {SMALL} --algorithms auto,mpi-blocking "
         "--against gloo --repeat 31", 2),
    Case("allreduce middle 4x1gbit", 4, "1gbit",
         "allreduce --sizes 256Ki,1Mi,2Mi --algorithms auto,halving,ring,mpi-blocking --against gloo --repeat 15"),
    Case("allreduce two-level 2x2x1gbit", 2, "1gbit",
         "allreduce --sizes 16Mi,100Mi --algorithms ring,two-level,mpi-blocking --against gloo --repeat 7", 2),
    Case("gossip 4x1gbit", 4, "1gbit", "gossip --sizes 1Mi,16Mi,100Mi --repeat 7"),
    Case("p2p 2x1gbit", 2, "1gbit", "p2p --sizes 4,64Ki,1Mi,64Mi --repeat 7"),
    Case("overlap 2x1gbit", 2, "1gbit", "overlap --model resnet18 --batch 8 --image 32 --repeat 7 --seconds 90"),
    Case("overlap 2x1gbit, long messages", 2, "1gbit",
         "overlap --model resnet18 --batch 8 --image 16 --repeat 7 --seconds 90"),
    *(
        Case(f"step 2x{rate}", 2, rate, f"{STEP} --batch 8 --bases allreduce,sgp,osgp --slowmo 12 --against ddp")
        for rate in ("1gbit", "10gbit", "none")
    ),
    Case("step 4x1gbit", 4, "1gbit", f"{STEP} --batch 2 --bases allreduce,osgp --slowmo 12 --against ddp"),
    Case("step, bfloat16, 4x1gbit", 4, "1gbit",
         f"{STEP} --batch 2 --bases osgp --slowmo 12 --dtype bfloat16 --against ddp"),
    *(
        Case(f"step, much computation, 4x{rate}", 4, rate,
             f"step --model resnet18 --image 32 --batch {batch} --bases sgp,osgp --slowmo 12 --repeat 5 --seconds 150")
        for rate, batch in (("1gbit", 16), ("10gbit", 8))
    ),
    *(  # the same work for each rank: the 8 have four times as much of it, on the same cores
        Case(f"step, shared memory, {ranks} ranks", 0, "", "step --model resnet18 --image 32 --batch 4 "
             "--bases allreduce,sgp,osgp --slowmo 0 --steps 4 --repeat 7 --seconds 50", ranks)
        for ranks in (2, 8)
    ),
    Case("outer", 0, "", "outer --lengths 1Mi,11Mi,25Mi --repeat 15", 1),
]  # fmt: skip


@click.command()
@click.argument("names", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "wire.json", show_default=True)
@click.option("--list", "only_list", is_flag=True, help="Only say what there is.")
def main(names: tuple[str, ...], out: Path, only_list: bool) -> None:
    """Measure CASES whose names begin with one of NAMES (all, without)."""
    chosen = [c for c in CASES if not names or c.name.startswith(names)]
    if only_list:
        click.echo("\n".join(f"{c.name:<42} {c.line()}" for c in chosen))
        return
    done = json.loads(out.read_text()) if out.exists() else {}
    for case in chosen:
        click.echo(f"{case.name}: {case.line()}", err=True)
        result = run(case)
        if result.returncode not in (0, 3):
            click.echo(result.stderr, err=True)
            sys.exit(f"{case.name} ended with code {result.returncode}.")
        done[case.name] = {"line": case.line(), **json.loads(result.stdout)}
        out.write_text(json.dumps(done, indent=1) + "\n")
        out.with_suffix(".tables.md").write_text("\n\n".join(map(table, done.values())) + "\n")
        click.echo(table(done[case.name]))


def run(case: Case) -> subprocess.CompletedProcess[str]:
    """Run it; its JSON is on stdout."""
    slowmo = [str(HERE.parent / "bin" / "slowmo"), "bench", *shlex.split(case.command), "--json"]
    if not case.hosts:
        return subprocess.run([*slowmo, "-n", str(case.ranks_per_host)], capture_output=True, text=True, check=False)
    with Lab(case.hosts, case.rate) as lab:
        return lab.run(slowmo, ranks_per_host=case.ranks_per_host, timeout=1200, capture=True)


def table(result: dict[str, object]) -> str:
    """A Markdown table of all numbers, with the command above it."""
    rows = result["rows"]
    assert isinstance(rows, list)
    keys = list(dict.fromkeys(k for row in rows for k in row))
    lines = [f"`{result['line']}`", "", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(shown(k, row.get(k)) for k in keys) + " |" for row in rows]
    return "\n".join(lines)


def shown(key: str, value: object) -> str:
    """A number in the unit that fits its key's: seconds as milliseconds."""
    if value is None:
        return ""
    if isinstance(value, float):
        if key.endswith("_s") and not key.endswith(("byte_s", "bit_s", "per_s")):
            return f"{1e3 * value:.3f} ms"
        return f"{value / 1e6:,.1f} MB/s" if key.endswith("byte_s") else f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    main()
