"""slowmo topology: look at communication graphs before a job runs on them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slowmo_mpi.errors import FAULT_FOUND, SlowmoError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from slowmo_mpi.topology import Edge, Topology

WIDTH = 100  # of a line of edges
SHOWN = 16  # the most ranks whose matrix and edges are printed in full

ranks_option = click.option(
    "-n", "--ranks", type=click.IntRange(min=1), help="Number of ranks; a .toml file knows its own."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group()
def topology() -> None:
    """Who talks with whom: list, show and check communication graphs.

    \b
    Example:
      slowmo topology list
      slowmo topology show base:k=2 -n 12 --png base.png
    """


@topology.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the families of graphs and the graph files that come along.

    \b
    Example:
      slowmo topology list
    """
    from slowmo_mpi.topology import FAMILIES, describe, files

    contents = {path.name: describe(path) for path in files()}
    if as_json:
        families = [
            {
                "name": family.name,
                "doc": family.doc,
                "admits": family.admits,
                "parameters": [
                    {"name": p.name, "default": p.default, "doc": p.doc, "values": p.range} for p in family.parameters
                ],
            }
            for family in FAMILIES.values()
        ]
        listed = [{"name": name, **content} for name, content in contents.items()]
        click.echo(json.dumps({"families": families, "files": listed}, indent=2))
        return
    wide = max(map(len, [*FAMILIES, *contents]))
    click.echo("# families: NAME or NAME:key=value,key=value")
    for family in FAMILIES.values():
        only = "" if family.admits.startswith("any") else f" ({family.admits})"
        click.echo(f"{family.name:{wide}}  {family.doc}{only}")
        for p in family.parameters:
            default = "" if p.default is None else f" (default {p.default})"
            click.echo(f"{'':{wide}}    {p.name}= {p.doc}{default}")
    click.echo("# files")
    for name, content in contents.items():
        about = content.get("description", "")
        click.echo(f"{name:{wide}}  {content.get('ranks')} ranks: {about}")


@topology.command()
@click.argument("spec")
@ranks_option
@json_option
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw the graph into this file.")
def show(spec: str, ranks: int | None, as_json: bool, png: Path | None) -> None:
    """Show a graph: its messages step by step, its product and how fast it averages.

    SPEC is a family, a family with parameters, or a .toml file.

    \b
    Example:
      slowmo topology show exponential -n 8
      slowmo topology show two-racks.toml --png racks.png
    """
    graph = _load(spec, ranks)
    if png is not None:
        from slowmo_mpi.picture import draw

        draw(graph, png)
        click.echo(f"Wrote {png}.", err=True)
    if as_json:
        steps = [[list(edge) for edge in edges] for edges in graph.steps]
        click.echo(json.dumps({**_facts(graph), "steps": steps}))
        return
    click.echo(f"{graph.name}, {_count(graph.ranks, 'rank')}, a cycle of {_count(graph.period, 'step')}")
    click.echo(f"symmetric           {_yes(graph.symmetric)}")
    click.echo(f"doubly stochastic   {_yes(graph.doubly_stochastic)}")
    click.echo(f"spectral gap        {graph.spectral_gap:.6g} of a cycle")
    click.echo(f"steps to 1e-6       {_steps(graph)}")
    for k, edges in enumerate(graph.steps):
        click.echo()
        for line in _edge_lines(k, edges, graph.ranks):
            click.echo(line)
    if graph.ranks <= SHOWN:
        click.echo("\nproduct of a cycle (row: to, column: from)")
        for line in _matrix_lines(graph.cycle):
            click.echo(line)


@topology.command()
@click.argument("spec")
@ranks_option
@json_option
def check(spec: str, ranks: int | None, as_json: bool) -> None:
    """Check a graph; the exit code is 3 when it has a fault, the reason is on stderr.

    \b
    Example:
      slowmo topology check mygraph.toml -n 8 && sbatch job.sh
    """
    try:
        graph = _load(spec, ranks)
    except SlowmoError as error:
        if as_json:
            click.echo(json.dumps({"ok": False, "reason": error.message, "hint": error.hint}))
        click.echo(str(error), err=True)
        click.get_current_context().exit(FAULT_FOUND)
    if as_json:
        click.echo(json.dumps({"ok": True, **_facts(graph)}))
        return
    kind = "doubly stochastic" if graph.doubly_stochastic else "only for push-sum (sgp, osgp)"
    if graph.symmetric:
        kind = "symmetric"
    click.echo(
        f"{graph.name} is good for {_count(graph.ranks, 'rank')}: {_count(graph.period, 'step')} a cycle, "
        f"{kind}, spectral gap {graph.spectral_gap:.4g}, 1e-6 after {_steps(graph)} steps."
    )


def _load(spec: str, ranks: int | None) -> "Topology":
    from slowmo_mpi.topology import load, ranks_of

    if ranks is None:
        if not spec.endswith(".toml"):
            raise UsageError(f"Topology {spec!r} needs a number of ranks.", "Add for example -n 8.")
        ranks = ranks_of(spec)
    return load(spec, ranks)


def _facts(graph: "Topology") -> dict[str, Any]:
    return {
        "name": graph.name,
        "ranks": graph.ranks,
        "period": graph.period,
        "symmetric": graph.symmetric,
        "doubly_stochastic": graph.doubly_stochastic,
        "contraction": graph.contraction,
        "spectral_gap": graph.spectral_gap,
        "steps_to_average": graph.steps_to_average(),
    }


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _steps(graph: "Topology") -> str:
    steps = graph.steps_to_average()
    return "more than a million" if steps is None else str(steps)


def _edge_lines(step: int, edges: "tuple[Edge, ...]", ranks: int) -> Iterator[str]:
    """The messages of a step, `0 -> 1` one way and `0 <-> 1` both ways, wrapped; a long step is cut short."""
    sent = {(e.source, e.target): e.weight for e in edges if e.source != e.target}
    if not sent:
        yield f"step {step}: no messages"
        return
    weights = {f"{weight:.4g}" for weight in sent.values()}
    one = len(weights) == 1
    yield f"step {step}: " + (f"weight {weights.pop()}" if one else "weights after the colon")
    words = []
    for (i, j), weight in sorted(sent.items()):
        both = sent.get((j, i)) == weight
        if not both or i < j:
            words.append(f"{i} {'<->' if both else '->'} {j}" + ("" if one else f": {weight:.4g}"))
    limit = len(words) if ranks <= SHOWN else 4 * SHOWN
    wide = max(map(len, words)) + 3
    per_line = max(1, (WIDTH - 2) // wide)
    shown = [f"{word:{wide}}" for word in words[:limit]]
    for first in range(0, len(shown), per_line):
        yield "  " + "".join(shown[first : first + per_line]).rstrip()
    if len(words) > limit:
        yield f"  and {len(words) - limit} more (--json has all)"


def _matrix_lines(matrix: "np.ndarray") -> Iterator[str]:
    yield "      " + "".join(f"{source:7d}" for source in range(len(matrix)))
    for target, row in enumerate(matrix):
        yield f"{target:6d}" + "".join(f"{weight:7.3f}" if weight else "      ." for weight in row)
