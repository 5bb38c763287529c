"""How errors are told, and the options that several commands share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import click

from ..errors import SlowmoError

ALONE_S = 10.0  # a rank still alive so long after rank 0's mistake is alone with its own
ERASE_LINE = "\033[2K\r"


def say(error: SlowmoError) -> None:
    """What is true, and what to type, on stderr in one piece (ranks share a terminal)."""
    bar = ERASE_LINE if "SLOWMO_TERMINAL" in os.environ else ""  # rank 0's bar may stand there
    hint = f"\n        {error.hint}" if error.hint else ""
    click.echo(f"{bar}slowmo: {error.message}{hint}", err=True)


def say_once(error: SlowmoError) -> None:
    """As `say`, before the ranks have joined: all of them will have met the same error, so rank 0 speaks.

    mpirun ends the others when rank 0 fails. One that it leaves alive met an error that rank 0 did not (a file
    missing on its host), and tells it. srun leaves all alive, and names the ranks that failed.
    """
    from ..comm.launcher import launched

    claim = launched()
    if claim is not None and claim.rank > 0:
        if claim.launcher == "srun":
            return
        time.sleep(ALONE_S + claim.rank / 10)  # the first of several speaks, and so ends the job
    say(error)


def note(text: str) -> None:
    """A line for people, on stderr."""
    click.echo(text, err=True)


def config_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """CONFIG and --set, as every command that reads a configuration takes them."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Override a key of the configuration; may be repeated.",
    )(command)
    return click.argument("config", type=click.Path(dir_okay=False))(command)
