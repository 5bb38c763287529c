"""slowmo plan."""

from __future__ import annotations

import json

import click

from ..units import size
from .say import config_argument


@click.command()
@config_argument
@click.option("-n", "--ranks", type=click.IntRange(1), default=4, show_default=True, help="Number of ranks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(config: str, overrides: tuple[str, ...], ranks: int, as_json: bool) -> None:
    """Say what CONFIG needs on N ranks: memory, bytes on the wire, rounds, mixing. Starts no MPI, reads no data.

    \b
    Example:
      slowmo plan my.toml -n 32 --set base.topology=base:k=1
    """
    from .. import config as configuration

    settings = configuration.load(config, overrides)  # what is wrong there is told before torch is imported
    from ..plan import plan as make

    p = make(settings, ranks)
    if as_json:
        click.echo(json.dumps(p.as_dict(), indent=2))
        return
    base, outer = p.base_bytes_per_step, p.outer_bytes_per_step
    rows = [
        ("parameters", f"{p.parameters:,}"),
        ("memory per rank", f"{size(p.memory_bytes)}, activations not counted"),
        ("  model, gradients", f"{size(p.model_bytes)} + {size(p.gradient_bytes)}"),
        ("  optimizer", size(p.optimizer_bytes)),
        ("  anchor and slow momentum", size(p.slow_bytes)),
        *([("  what rounding took", size(p.error_bytes))] if p.error_bytes else []),
        *([("  parameters as autocast", size(p.cast_bytes))] if p.cast_bytes else []),
        ("  messages", size(p.message_bytes)),
        ("sent per rank and step", f"{size(base + outer)} ({size(base)} base, {size(outer)} outer step)"),
        ("  AllReduce-SGD would send", size(p.allreduce_bytes_per_step)),
    ]
    rows.append(("checkpoint", f"{size(p.checkpoint_bytes)} in mid-round, all ranks together"))
    if p.steps is not None:
        rounds = f", {p.rounds:,} rounds" if p.rounds is not None else ""
        rows.append(("steps", f"{p.steps:,}{rounds}"))
    if p.topology is not None:
        steps = p.steps_to_average if p.steps_to_average is not None else "very many"
        mixing = f"spectral gap {p.spectral_gap:.3g} per cycle, {steps} steps to average to 1e-6"
        rows.append(("graph", f"{p.topology}: {mixing}"))
    for name, value in rows:
        click.echo(f"{name:<28}{value}")
