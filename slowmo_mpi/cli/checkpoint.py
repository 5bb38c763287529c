"""slowmo checkpoint: look at checkpoints, prove them, take the model out, compare two."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FAULT_FOUND
from ..units import size
from .say import note

if TYPE_CHECKING:
    from ..checkpoint.compare import Comparison

SHOWN = 12  # the most parameters, or changes of the ranks' states, that are printed; --json has all
SHORT = 40  # characters of a value that differs

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group()
def checkpoint() -> None:
    """List, show, verify, export and compare checkpoints. No MPI is started, and nothing is changed.

    RUN is a run folder. Where a FILE is asked for, a run folder stands for its newest checkpoint.

    \b
    Example:
      slowmo checkpoint list runs/mine-20260131-120000
      slowmo checkpoint export runs/mine-20260131-120000 model.safetensors
    """


@checkpoint.command("list")
@click.argument("run")
@json_option
def list_(run: str, as_json: bool) -> None:
    """List the checkpoints of RUN, newest first.

    "whole" means that the structure is proved and no shard is missing; `verify` proves the data too. A
    damaged one is listed with its fault.

    \b
    Example:
      slowmo checkpoint list runs/mine-20260131-120000
    """
    from ..checkpoint.inspect import listed

    found = [asdict(c) for c in listed(run)]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    rows: list[tuple[str, ...]] = [("step", "round", "ranks", "layout", "size", "written", "file", "state")]
    for c in found:
        inside = [c["step"], c["round"], c["ranks"], c["layout"], size(c["bytes"]), c["written"]]
        words = ["-" if x is None else str(x) for x in inside]
        rows.append((*words, Path(c["file"]).name, c["fault"] or "whole"))
    _table(rows, right=3)


@checkpoint.command()
@click.argument("file")
@json_option
def show(file: str, as_json: bool) -> None:
    """Show what is in FILE.

    Its attributes, versions, data, parameters and configuration.

    \b
    Example:
      slowmo checkpoint show runs/mine-20260131-120000
      slowmo checkpoint show step-00001200.h5 --json
    """
    from ..checkpoint.inspect import contents, opened

    with opened(file) as found:
        c = contents(found)
    if as_json:
        click.echo(json.dumps(c, indent=2))
        return
    click.echo(c["file"])
    files, ranks = len(c["files"]), c["attributes"]["ranks"]  # an index and its shards, or one
    for name, value in c["attributes"].items():
        click.echo(f"{name:<12}{value}")
    click.echo(f"{'size':<12}{size(c['bytes'])}{f' in {files} files' if files > 1 else ''}")
    click.echo(f"{'checksums':<12}{c['slabs']} slabs of data, {size(c['slab_bytes'])}; and the structure")
    click.echo(f"{'versions':<12}{', '.join(f'{k} {v}' for k, v in c['versions'].items())}")
    click.echo(f"{'model':<12}{c['elements']:,} parameters in {len(c['parameters'])} tensors, ", nl=False)
    click.echo(f"{len(c['model'])} keys in its state_dict")

    click.echo(f"\ndata (of two sizes: one row for each of {ranks} ranks; of one: the same on all)")
    _table([(d["name"], d["type"], _shape(d["shape"]), size(d["bytes"])) for d in c["datasets"]], indent=2)
    click.echo("\nparameters (where each lies in z, anchor and u)")
    first = c["parameters"][:SHOWN]
    _table([(p["name"], p["vector"], str(p["start"]), _shape(p["shape"])) for p in first], indent=2)
    if len(c["parameters"]) > SHOWN:
        click.echo(f"  and {len(c['parameters']) - SHOWN} more (--json has all)")
    if c["config"]:
        click.echo(f"\nconfiguration\n{c['config'].rstrip()}")


@checkpoint.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@json_option
def verify(files: tuple[str, ...], as_json: bool) -> None:
    """Prove every byte of each FILE, shards included.

    A folder stands for all checkpoints in it. Prints "ok" or the fault of each, a line per file. The
    exit code is 3 when one has a fault or is missing.

    \b
    Example:
      slowmo checkpoint verify runs/mine-20260131-120000 && sbatch resume.sh
    """
    from ..checkpoint.inspect import verified

    found = []
    for file, fault in verified(files):
        found.append({"file": file, "ok": not fault, "fault": fault or None})
        if not as_json:
            click.echo(f"{file}: {fault or 'ok'}")
    if as_json:
        click.echo(json.dumps(found, indent=2))
    faults = sum(not f["ok"] for f in found)
    if faults:
        note(f"{faults} of {len(found)} not whole")
        click.get_current_context().exit(FAULT_FOUND)


@checkpoint.command()
@click.argument("file")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=click.IntRange(min=0), help="That worker's own model, not the average of all.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def export(file: str, out: Path, rank: int | None, force: bool) -> None:
    """Write the model in FILE as a state_dict into OUT.

    OUT ends in .safetensors or .pt. The model is the average of all workers, de-biased, messages in
    flight included, with the mean of batch-norm's statistics. It loads without this package:
    safetensors.torch.load_file(OUT), or torch.load(OUT). The data are proved first.

    \b
    Example:
      slowmo checkpoint export runs/mine-20260131-120000 model.safetensors
      slowmo checkpoint export step-00001200.h5 worker-3.pt --rank 3
    """
    from ..checkpoint import export as exporting
    from ..checkpoint.inspect import opened

    exporting.check_target(out, force)
    with opened(file) as found:
        found.prove()
        tensors = exporting.state_dict(found, rank)
        what = f"the average of {found.ranks}" if rank is None else f"rank {rank} of {found.ranks}"
        exporting.save(tensors, out)
        note(f"Wrote {out}: step {found.step}, {what}, {len(tensors)} tensors, {size(out.stat().st_size)}.")


@checkpoint.command()
@click.argument("a")
@click.argument("b")
@json_option
def diff(a: str, b: str, as_json: bool) -> None:
    """Say what differs between A and B.

    Attributes, configuration, versions, parameters, the ranks' states and their vectors are compared.
    The exit code is 0 when training goes on alike from both (every vector and every rank's state is the
    same to the bit), and 3 when not. What the training loop keeps for itself (extra) is compared but not
    counted: it holds times. The data are proved first.

    \b
    Example:
      slowmo checkpoint diff run-a/checkpoints/step-00000100.h5 run-b/checkpoints/step-00000100.h5
    """
    from ..checkpoint.compare import compare
    from ..checkpoint.inspect import opened

    with opened(a) as first, opened(b) as second:
        first.prove()
        second.prove()
        found = compare(first, second)
        paths = str(first.path), str(second.path)
    if as_json:
        click.echo(json.dumps({"a": paths[0], "b": paths[1], "same": found.same, **_finite(asdict(found))}, indent=2))
    else:
        click.echo(f"A  {paths[0]}\nB  {paths[1]}")
        _print(found)
    if not found.same:
        click.get_current_context().exit(FAULT_FOUND)


def _print(found: Comparison) -> None:
    for title in ("attributes", "config", "versions", "parameters"):
        pairs = getattr(found, title)
        _section(title, [(name, f"{_short(x)} | {_short(y)}") for name, (x, y) in pairs.items()])
    by_change: dict[tuple[str, str], list[int]] = {}
    for change in found.state:
        by_change.setdefault((change.path, f"{_short(change.a)} | {_short(change.b)}"), []).append(change.rank)
    rows = [(path, f"{told}  ({_ranks(ranks)})") for (path, told), ranks in by_change.items()]
    _section("ranks' states", [("not compared", found.state_note)] if found.state_note else rows)
    rows = []
    for name, c in found.vectors.items():
        told = f"{c.differ:,} of {c.elements:,} elements differ, by {c.largest:.3g} at most" if c.differ else "the same"
        rows.append((name, c.note or told))
    _section("vectors", rows, limit=len(rows))
    click.echo("Training goes on alike from both." if found.same else "Training goes on differently from them.")


def _section(title: str, rows: list[tuple[str, str]], limit: int = SHOWN) -> None:
    if rows:
        click.echo(title)
        _table(rows[:limit], indent=2)
        if len(rows) > limit:
            click.echo(f"  and {len(rows) - limit} more (--json has all)")


def _table(rows: Iterable[tuple[str, ...]], indent: int = 0, right: int = 0) -> None:
    """Columns as wide as their widest cell, the first `right` of them flush right."""
    rows = list(rows)
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        sides: list[Callable[[str, int], str]] = [str.rjust if i < right else str.ljust for i in range(len(row))]
        cells = [side(cell, w) for side, cell, w in zip(sides, row, wide, strict=True)]
        click.echo(" " * indent + "  ".join(cells).rstrip())


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:SHOWN])) + (", ..." if len(ranks) > SHOWN else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"


def _shape(shape: list[int]) -> str:
    return "scalar" if not shape else " x ".join(map(str, shape))


def _short(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."


def _finite(value: Any) -> Any:
    """For JSON, which has no number for infinity and nan."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
