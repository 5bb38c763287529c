"""How errors are told, and the options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from ..errors import SlowmoError

ERASE_LINE = "\033[2K\r"


def say(error: SlowmoError) -> None:
    """What is true, and what to type, on stderr in one piece (ranks share a terminal)."""
    bar = "SLOWMO_TERMINAL" in os.environ  # rank 0's may stand there
    hint = f"\n        {error.hint}" if error.hint else ""
    click.echo(f"{ERASE_LINE if bar else ''}slowmo: {error.message}{hint}", err=True, color=bar or None)


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
