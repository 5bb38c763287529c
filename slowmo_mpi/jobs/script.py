"""A job's script: a pure function from configuration, site and request to bash."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2

from .. import shipped
from ..config import Config, load, toml_value, units_s
from ..errors import UsageError, did_you_mean
from . import shell
from .site import Site

CONFIG = "config.toml"  # in the job's folder


@dataclass(frozen=True)
class Request:
    """What the command line asks for; what is None or empty the site's profile says.

    time: such as "4h". array: the specs of `sweep`. chain: how many jobs follow one another. keep: whether the job has
    a configuration of its own in its folder.
    """

    nodes: int = 1
    ranks_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    array: tuple[str, ...] = ()
    chain: int = 1
    keep: bool = False


@dataclass(frozen=True)
class Job:
    """All that a template may speak of.

    arguments: the words of the command that made this. label: a name that every scheduler takes. workdir: where
    relative paths of the configuration start. folder: of the job, absolute. tasks: a sweep's settings, one tuple
    for each task. cores_per_rank: 0 where the site does not say. time_s: the limit in seconds, 0 for the site's own.
    venv: a word of bash, empty for none. stuck: attempts in a row that may come no further.
    """

    arguments: tuple[str, ...]
    site: Site
    name: str
    label: str
    workdir: str
    folder: str
    config: str
    settings: tuple[str, ...]
    tasks: tuple[tuple[str, ...], ...]
    chain: int
    nodes: int
    ranks: int
    ranks_per_node: int
    cores_per_rank: int
    time_s: int
    warning_s: int
    partition: str
    account: str
    venv: shell.Raw
    stuck: int = 3


def make(
    path: str, overrides: tuple[str, ...], site: Site, asked: Request, arguments: tuple[str, ...], now: str
) -> tuple[Job, Config]:
    """The job that trains the configuration at `path`, and that configuration. now: a part of the folder's name.

    Raises: UsageError for what can be known not to work before it waits in a queue.
    """
    config = load(path, overrides)
    tasks = sweep(asked.array)
    for task in tasks:
        load(path, (*overrides, *task))
    scratch = os.path.expanduser(os.path.expandvars(site.scratch))
    if "$" in scratch:
        raise UsageError(f"scratch = {scratch!r} has a variable that is not set here.", "Write the folder itself.")
    parent = Path(scratch, config.run.folder).absolute()
    folders = (parent / f"{config.run.name}-job-{now}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    folder = next(f for f in folders if not os.path.exists(f))  # several may be submitted in one second
    ranks_per_node = asked.ranks_per_node or site.ranks_per_node or site.gpus_per_node or 1
    limit = asked.time or site.time
    time_s = seconds(limit, "The time limit") if limit else 0
    warning_s = seconds(site.warning, "warning =")
    here = "" if site.image or sys.prefix == sys.base_prefix else sys.prefix
    job = Job(
        arguments=arguments, site=site, name=config.run.name, label=label(config.run.name), workdir=os.getcwd(),
        folder=str(folder), config=str(folder / CONFIG if asked.keep else Path(path).absolute()),
        settings=() if asked.keep else overrides, tasks=tasks, chain=asked.chain, nodes=asked.nodes,
        ranks=asked.nodes * ranks_per_node, ranks_per_node=ranks_per_node,
        cores_per_rank=site.cores_per_node // ranks_per_node, time_s=time_s,
        warning_s=min(warning_s, time_s // 4) if time_s else warning_s,
        partition=asked.partition or site.partition, account=asked.account or site.account,
        venv=shell.expand(site.venv) if site.venv else shell.quote(here) if here else shell.Raw(),
    )  # fmt: skip
    check(job)
    return job, config


def label(name: str) -> str:
    """A job's name for the scheduler: of the characters that all of them take; at most 15, which is Torque's limit."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:15]
    return plain if plain[:1].isalpha() else f"j{plain[:14]}"


def seconds(text: str, what: str) -> int:
    """A time such as "1h30m", "90m", "1:30:00" or "1-00:00:00" in seconds. Raises: UsageError."""
    clocked = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    total = units_s("{}d{}h{}m{}s".format(*clocked.groups(default="0")) if clocked else text)
    if not total:
        raise UsageError(f"{what} {text!r} is not a time.", "Type for example 4h, 1d12h or 04:00:00.")
    return total


def clock(total_s: int) -> str:
    """Seconds as HH:MM:SS, as all schedulers read it."""
    return f"{total_s // 3600:02d}:{total_s % 3600 // 60:02d}:{total_s % 60:02d}"


def sweep(specs: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The tasks of a job array, each the settings section.key=value that it adds.

    Each spec is "section.key=value,value,..." (several make a grid), or a file with a line of settings for each task.
    Raises: UsageError.
    """
    axes: list[list[tuple[str, ...]]] = []
    for spec in specs:
        name, equals, values = spec.partition("=")
        if equals and not os.path.isfile(spec):  # which is False, too, for what is too long to name a file
            axes.append([(f"{name.strip()}={value}",) for value in _values(values)])
            continue
        try:
            lines = Path(spec).read_text(encoding="utf-8").splitlines()
            axes.append([tuple(words) for text in lines if (words := shlex.split(text, comments=True))])
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--array {spec}: {error}.",
                "Give section.key=value,value or a file with a line of settings for each task.",
            ) from None
    tasks = tuple(tuple(itertools.chain(*parts)) for parts in itertools.product(*axes)) if axes else ()
    if axes and len(tasks) < 2:
        raise UsageError("A sweep of fewer than two tasks is none.", "Give more values, or --set section.key=value.")
    return tasks


def _values(text: str) -> list[str]:
    """ "0.1,0.2" or "[1, 2],[3, 4]" or 'a,"b,c"' in parts: TOML where it is TOML, else split at commas."""
    try:
        return [toml_value(v) for v in tomllib.loads(f"x = [{text}]")["x"]]
    except tomllib.TOMLDecodeError:
        return [part.strip() for part in text.split(",")]


def check(job: Job) -> None:
    """Refuse what cannot work. Raises: UsageError."""
    site = job.site
    if site.gpus_per_node and job.ranks_per_node > site.gpus_per_node:
        raise UsageError(
            f"{job.ranks_per_node} ranks on a node with {site.gpus_per_node} GPUs: each rank needs one of its own.",
            f"Type --ranks-per-node {site.gpus_per_node}, and more --nodes.",
        )
    if site.cores_per_node and job.ranks_per_node > site.cores_per_node:
        raise UsageError(
            f"{job.ranks_per_node} ranks on a node with {site.cores_per_node} cores.",
            f"Type --ranks-per-node {site.cores_per_node} or less.",
        )
    if site.scheduler == "none" and (job.nodes > 1 or job.tasks or job.chain > 1):
        raise UsageError(
            "Without a scheduler there is one machine, and one job at a time.",
            "Leave out --nodes, --array and --chain, or name a --site.",
        )
    for path in (job.workdir, job.folder, job.config) if site.image else ():
        if set(",:") & set(path):
            raise UsageError(f"Apptainer cannot show {path} to the container: it has a , or a :.", "Rename it.")
    if job.chain > 1 and job.tasks:
        raise UsageError(
            "--chain and --array exclude each other.", "Each task of an array goes on by itself; leave out --chain."
        )
    if site.scheduler in ("pbs", "torque") and not job.time_s:
        raise UsageError(
            "PBS gives no warning before a job's end that all sites agree on: the run must know its time limit.",
            "Type for example --time 4h, or write time = in the site profile.",
        )


def render(job: Job, template: str | None = None) -> str:
    """The script. template: a file of the user's own, which may extend or include ours.

    Raises: UsageError where the template is wrong, or a value cannot stand where it puts it.
    """
    folders = [shipped.folder("jobs") / "templates", *([Path(template).resolve().parent] if template else [])]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(f) for f in reversed(folders)]), undefined=jinja2.StrictUndefined,
        finalize=shell.quote, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=True,
    )  # fmt: skip
    for name in ("e", "escape", "forceescape", "safe", "tojson", "urlize", "xmlattr"):  # they would go unquoted
        del environment.filters[name]
    filters = (shell.words, shell.expand, shell.directive, shell.line, clock)
    environment.filters |= {f.__name__: f for f in filters}
    name = Path(template).name if template else f"{job.site.scheduler.replace('none', 'local')}.sh.j2"
    known = vars(job)
    try:
        return environment.get_template(name).render(known)
    except jinja2.UndefinedError as error:
        word = re.search(r"'(\w+)' is undefined", str(error))
        raise UsageError(
            f"Template {name}: {error}.{did_you_mean(word[1], known) if word else ''}",
            f"A template may use: {', '.join(known)}.",
        ) from None
    except jinja2.TemplateNotFound as error:
        raise UsageError(
            f"There is no template {error.name}.", "Give a file, or extend one of ours: slurm.sh.j2."
        ) from None
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"Template {error.name}, line {error.lineno}: {error.message}.", "Mend it there.") from None
    except RecursionError:
        raise UsageError(
            f"Template {name} extends or includes itself.", "Give it a name that none of ours has."
        ) from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, OSError) as error:  # expressions, files
        raise UsageError(f"Template {name}: {error}.", "Mend it there.") from None
