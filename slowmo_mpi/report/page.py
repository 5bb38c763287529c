"""The comparison as one HTML page: nothing is loaded from elsewhere, no script; for a screen, a phone and paper."""

from __future__ import annotations

import base64
import re
import time
from html import escape

from .. import __version__
from ..config import toml_value
from .compare import Comparison
from .figures import GREY, Figure, Pen, named, pens, svg
from .runs import Run
from .table import are_words, cells, notes, span

STYLE = """
:root { color: #1f2933; background: #fff; font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
body { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p { margin: .3rem 0; max-width: 48rem; }
.quiet, figcaption { color: #52606d; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93em; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e8ec; }
th { white-space: normal; font-weight: 600; border-bottom: 1.5px solid #8a97a6; vertical-align: bottom; }
th.word, td.word { text-align: left; }
td.wrap { white-space: normal; overflow-wrap: anywhere; text-align: left; min-width: 10rem; }
td:first-child, th:first-child { padding-left: 0; }
ul { padding-left: 1.1rem; margin: .4rem 0; } li { overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.4rem; list-style: none; padding: 0; font-size: .92em; }
.legend svg { width: 2.2em; height: .7em; margin-right: .45em; vertical-align: baseline; }
figure { margin: 0; } figcaption { margin: .1rem 0 .2rem; max-width: 48rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: .5rem 1rem; }
.panels img { width: 100%; height: auto; display: block; }
code { font: .88em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1rem .8rem 2rem; } th, td { padding: .25rem .45rem; } }
@media print {
  @page { margin: 14mm; }
  :root { font-size: 9.5pt; }
  body { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  .wide table { font-size: 7.5pt; } th, td { padding: .2rem .35rem; white-space: normal; }
  .panels { grid-template-columns: 1fr 1fr; }
  figure, tr, .legend { break-inside: avoid; } h2 { break-after: avoid; }
}
"""


def page(comparison: Comparison, figures: list[Figure], title: str) -> str:
    """The page's text. Raises SlowmoError when matplotlib is not installed."""
    legend = _legend(comparison)
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="quiet">{escape(_about(comparison))}</p>', _table(comparison)]
    if told := notes(comparison):
        parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in told) + "</ul>")
    for figure in figures:
        images = "".join(f'<img src="{_embedded(svg(panel))}" alt="{escape(panel.says)}">' for panel in figure.panels)
        parts.append(
            f'<figure id="{escape(figure.name)}"><h2>{escape(figure.title)}</h2>'
            f"<figcaption>{escape(figure.note)}</figcaption>{legend if figure.legend else ''}"
            f'<div class="panels">{images}</div></figure>'
        )
    parts.append(_settings(comparison))
    parts.append(_runs(comparison))
    now = time.strftime("%Y-%m-%d %H:%M")
    parts.append(f'<p class="quiet">slowmo-mpi {__version__}, slowmo report, {now}.</p>')
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light"><title>{escape(title)}</title><style>{STYLE}</style>'
    )
    body = "\n".join(part for part in parts if part)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _about(comparison: Comparison) -> str:
    runs = comparison.runs
    tasks = dict.fromkeys(str(run.settings.get("task.name")) for run in runs)
    ranks = sorted({run.settings["ranks"] for run in runs if run.settings["ranks"]})
    many = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    settings = f" of {len(comparison.rows)} settings" if len(comparison.rows) < len(runs) else ""
    where = f", {', '.join(map(str, ranks))} ranks" if ranks else ""
    return f"{many}{settings}, {', '.join(tasks)}{where}"


def _table(comparison: Comparison) -> str:
    heads, lines = cells(comparison)
    kinds = [' class="word"' if word else "" for word in are_words(lines)]
    head = "".join(f"<th{kind}>{escape(h)}</th>" for h, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{_whole(escape(c))}</td>" for c, k in zip(line, kinds, strict=True)) + "</tr>"
        for line in lines
    )  # fmt: skip
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _whole(text: str) -> str:
    """A number stays beside its unit, on paper too, where lines are broken."""
    return re.sub(r"(?<=\d) (?=[A-Za-z])", "\N{NO-BREAK SPACE}", text)


def _legend(comparison: Comparison) -> str:
    drawn = pens(comparison)
    items = [(row.label, drawn[row.label]) for row in named(comparison)]
    if len(items) < len(comparison.rows):
        items.append((f"{len(comparison.rows) - len(items)} others", Pen(GREY)))
    return '<ul class="legend">' + "".join(f"<li>{_stroke(pen)}{escape(label)}</li>" for label, pen in items) + "</ul>"


def _stroke(pen: Pen) -> str:
    dash = "" if pen.dash == "-" else f' stroke-dasharray="{" ".join(f"{2.6 * x:g}" for x in pen.dash[1])}"'
    line = f'<line x1="0" y1="5" x2="32" y2="5" stroke="{pen.colour}" stroke-width="3"{dash}/>'
    return f'<svg viewBox="0 0 32 10" aria-hidden="true">{line}</svg>'


def _settings(comparison: Comparison) -> str:
    """What all runs have in common and is not a default."""
    hidden = ("run.name", "run.folder", "simulated")
    same = {k: v for k, v in comparison.common().items() if k not in hidden and v is not None}
    if not same:
        return ""
    items = " &nbsp; ".join(f"<code>{escape(k)} = {escape(toml_value(v))}</code>" for k, v in same.items())
    return (
        f"<h2>Settings of all runs</h2><p>{items}</p><p class='quiet'>Keys that are not listed have their defaults.</p>"
    )


def _runs(comparison: Comparison) -> str:
    """Where each run is, and by what it was made."""
    labels = {id(run): row.label for row in comparison.rows for run in row.runs}
    heads = ["run", "setting", "seed", "started", "time", "state", "command"]
    lines = "".join(
        "<tr>" + "".join(
            f'<td class="{"wrap" if i in (1, 6) else "word"}">{cell}</td>' for i, cell in enumerate(_run(run, labels))
        ) + "</tr>" for run in comparison.runs
    )  # fmt: skip
    head = "".join(f'<th class="word">{h}</th>' for h in heads)
    return f'<h2>Runs</h2><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _run(run: Run, labels: dict[int, str]) -> list[str]:
    command = run.manifest.get("command")
    words = [str(w) for w in command] if isinstance(command, list) else []
    typed = " ".join(["slowmo", *words[1:]]) if words else "-"
    started = str(run.manifest.get("started", "-"))[:16].replace("T", " ")
    label = labels[id(run)]
    cells_ = [run.name, "" if label == run.name else label, str(run.settings.get("run.seed")), started,
              _whole(span(run.time_s)), run.state]  # fmt: skip
    return [*map(escape, cells_), f"<code>{escape(typed)}</code>"]


def _embedded(picture: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture.encode()).decode()
