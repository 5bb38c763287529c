"""slowmo report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import SlowmoError, UsageError
from .say import note

if TYPE_CHECKING:
    from ..report.compare import Comparison


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--target", default="", metavar="METRIC=VALUE", help="Also the wall time until a metric has come so far.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default="report", show_default=True,
              metavar="FOLDER", help="Where report.html and the pictures go.")  # fmt: skip
@click.option("--follow", is_flag=True, help="Show runs while they go on, until they have ended.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON, and write nothing.")
@click.option("--csv", "as_csv", is_flag=True, help="Print every record of every run as CSV, and write nothing.")
@click.option("--tensorboard", "board", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
              help="Write TensorBoard event files there, a folder per run, and nothing else.")  # fmt: skip
def report(
    runs: tuple[str, ...], target: str, output: Path, follow: bool, as_json: bool, as_csv: bool, board: Path | None
) -> None:
    """Compare runs: a table on stdout, pictures (PNG) and one HTML page that needs nothing else.

    RUN is a run folder, or a folder that holds some. Runs are told apart by the settings in which they differ;
    finished ones that differ in run.seed alone are one row, with mean and spread. Runs that go on, were stopped
    or killed are shown as far as they came. A metric is named as in metrics.jsonl; train/loss and eval/loss
    tell the two apart.

    \b
    Example:
      slowmo report runs/mine-20260131-120000 runs/other-20260131-130000
      slowmo report runs --target accuracy=0.9 -o comparison
      slowmo report runs/mine-20260131-120000 --follow
      slowmo report runs --csv > runs.csv
    """
    if sum((follow, as_json, as_csv, board is not None)) > 1:
        raise UsageError("--follow, --json, --csv and --tensorboard exclude each other.", "Type one of them.")
    from ..report import compare, export, table
    from ..report.runs import find

    if follow:
        from ..report.follow import follow as watch

        watch(runs, click.echo)
        return
    comparison = compare.compare(find(runs), target)
    if as_json:
        click.echo(json.dumps(table.data(comparison), indent=2))
    elif as_csv:
        click.echo(export.csv_text(comparison), nl=False)
    elif board is not None:
        export.tensorboard(comparison, board)
        note(f"wrote event files, a folder for each run; look at them with: tensorboard --logdir {board}")
    else:
        click.echo(table.text(comparison))
        _draw(comparison, output)


def _draw(comparison: Comparison, output: Path) -> None:
    """Pictures and page, once the table has been printed."""
    from ..report import figures, page

    drawn = figures.figures(comparison)
    if not drawn:
        note("no run has written a metric yet: there is nothing to draw")
        return
    try:
        text = page.page(
            comparison, drawn, "Comparison of runs" if len(comparison.runs) > 1 else comparison.runs[0].name
        )
        output.mkdir(parents=True, exist_ok=True)
        for figure in [figures.overview(drawn, comparison), *drawn]:
            figures.png(figure, comparison, output / f"{figure.name}.png")
        (output / "report.html").write_text(text, encoding="utf-8")
    except OSError as error:
        raise SlowmoError(f"{output} cannot be written: {error.strerror}.", "Give another folder: -o FOLDER.") from None
    note(f"wrote {output / 'report.html'} and {len(drawn) + 1} pictures: {output}/*.png")
