"""slowmo init."""

from __future__ import annotations

import click


@click.command()
@click.argument("task", default="digits")
def init(task: str) -> None:
    """Print a commented configuration for TASK with every key, on stdout.

    TASK is fashion-mnist, digits, quadratic, one of the paper's experiments, cifar10, imagenet or wmt16, or your own
    "package.module:factory".

    \b
    Example:
      slowmo init fashion-mnist > my.toml
      slowmo init imagenet
    """
    from .. import presets

    click.echo(presets.commented(task), nl=False)
