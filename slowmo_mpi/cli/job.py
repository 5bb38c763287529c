"""slowmo job."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time

import click

from ..units import clock
from .say import config_argument, note


class _Job(click.Group):
    """`slowmo job CONFIG` is short for `slowmo job script CONFIG`."""

    default = "script"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [self.default, *args]
        ctx.obj = tuple(args[1:])  # for the script, which says how it was written
        return super().parse_args(ctx, args)


@click.group(cls=_Job, subcommand_metavar="CONFIG [OPTIONS] | status RUN")
def job() -> None:
    """From a configuration to a job for Slurm, PBS or Torque; and how the job does.

    `slowmo job CONFIG` is short for `slowmo job script CONFIG`. Works on a login node, without MPI.

    \b
    Example:
      slowmo job my.toml --nodes 4 --time 4h
      slowmo job my.toml --site cray-ex --submit
      slowmo job status runs/my-job-20261123-101500
    """


@job.command()
@config_argument
@click.option(
    "--site", envvar="SLOWMO_SITE", metavar="NAME|FILE.toml",
    help="Site profile: one of ours, or a file. Default: $SLOWMO_SITE, else by the scheduler that is found here.",
)  # fmt: skip
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Number of nodes.")
@click.option(
    "--ranks-per-node", type=click.IntRange(1), help="Ranks on each node. Default: the profile's, or one per GPU."
)
@click.option("--time", "limit", metavar="TIME", help="Time limit, such as 4h or 04:00:00. Default: the profile's.")
@click.option("--partition", metavar="NAME", help="Partition or queue. Default: the profile's.")
@click.option("--account", metavar="NAME", help="Account that pays. Default: the profile's.")
@click.option(
    "--array", "sweep", multiple=True, metavar="KEY=V,V,...|FILE",
    help="A sweep as a job array: section.key=value,value,... (several make a grid), or a file with a line of settings "
    "for each task.",
)  # fmt: skip
@click.option(
    "--chain", type=click.IntRange(2), metavar="N",
    help="N jobs, each after the one before, in place of one that is requeued.",
)  # fmt: skip
@click.option("--template", type=click.Path(exists=True, dir_okay=False), help="A template of your own (Jinja2).")
@click.option("--submit", is_flag=True, help="Submit it, from a new job folder; the job's id goes to stdout.")
@click.option("--dry-run", is_flag=True, help="Print the commands that --submit would run, and do nothing.")
@click.pass_obj
def script(
    arguments: tuple[str, ...],
    config: str,
    overrides: tuple[str, ...],
    site: str | None,
    nodes: int,
    ranks_per_node: int | None,
    limit: str | None,
    partition: str | None,
    account: str | None,
    sweep: tuple[str, ...],
    chain: int | None,
    template: str | None,
    submit: bool,
    dry_run: bool,
) -> None:
    """Print the script of a job that trains CONFIG, or submit it.

    The job runs slowmo doctor, then slowmo train. Warned before its time limit it stops with a checkpoint, is
    requeued and goes on, until the run is done or three attempts in a row came no further. --submit keeps script
    and configuration in a job folder; without it the script comes on stdout and refers to CONFIG.

    \b
    Example:
      slowmo job my.toml > job.sh
      slowmo job my.toml --nodes 8 --time 12h --site my-site.toml --submit
      slowmo job my.toml --array slowmo.tau=12,48 --array slowmo.beta=0.2,0.6 --submit
      slowmo job my.toml --chain 5 --submit --dry-run
    """
    from ..config import dump
    from ..jobs import script as scripts
    from ..jobs import site as sites
    from ..jobs import submit as submitting

    asked = scripts.Request(
        nodes, ranks_per_node, limit, partition, account, sweep, chain or 1, keep=submit or dry_run
    )  # fmt: skip
    profile = sites.load(site or sites.usual())
    made, settings = scripts.make(config, overrides, profile, asked, arguments, time.strftime("%Y%m%d-%H%M%S"))
    text = scripts.render(made, template)
    if dry_run:
        place = shlex.quote(made.folder)
        click.echo(f"mkdir -p {place} # for {submitting.SCRIPT} and {scripts.CONFIG}")
        for i in range(made.chain):
            words = shlex.join(submitting.command(made, f"ID{i}" if i else ""))
            click.echo(f"cd {place} && {words}{f' # prints ID{i + 1}' if made.chain > 1 else ''}")
    elif submit:
        note(f"job folder: {made.folder}")
        for number in submitting.submit(made, text, dump(settings)):
            click.echo(number)
    else:
        click.echo(text, nl=False)


@job.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run: str, as_json: bool) -> None:
    """Say how a job does: what the scheduler says, and step, loss, time left and last checkpoint of its run.

    RUN is a job folder, a run folder in one, or the id of a job whose folder is below the working directory. A
    scheduler's command that is not here is left out.

    \b
    Example:
      slowmo job status runs/my-job-20261123-101500
      slowmo job status 4711 --json
    """
    from ..jobs.status import status as ask

    found = ask(run)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(s) for s in found], indent=2))
        return
    rows = [("task", "job", "state", "attempt", "step", "loss", "samples/s", "left", "checkpoint", "last attempt")]
    for s in found:
        of_limit = f" {s.elapsed}/{s.limit}" if s.limit else ""
        state = f"{s.state or 'unknown'}{of_limit}{f' ({s.reason})' if s.reason else ''}"
        saved = f"step {s.checkpoint_step}, {clock(s.checkpoint_age_s)} ago" if s.checkpoint_age_s is not None else "-"
        rows.append(
            (
                s.task or "-", s.job or "-", state + (f", {s.waiting} more waiting" if s.waiting else ""),
                str(s.attempts), f"{s.step if s.step is not None else '-'}/{s.steps or '-'}",
                f"{s.loss:.4g}" if s.loss is not None else "-",
                f"{s.samples_per_s:,.0f}" if s.samples_per_s is not None else "-",
                clock(s.left_s) if s.left_s is not None else "-", saved, s.outcome or "-",
            )
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
