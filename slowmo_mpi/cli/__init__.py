"""The command `slowmo`: parsing and printing, nothing else.

No module here imports torch, mpi4py or h5py before a command runs, so that every --help answers at once.
"""

from __future__ import annotations

import sys

import click

from .. import __version__
from ..errors import DONE, INTERRUPTED, SlowmoError, UsageError
from .doctor import doctor
from .init import init
from .plan import plan
from .say import say_once
from .topology import topology
from .train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="slowmo")
def slowmo() -> None:
    """Train PyTorch models over MPI with SlowMo, gossip and local steps.

    Data goes to stdout, everything else to stderr. Exit codes: 0 done; 1 failed; 2 wrong usage or
    configuration; 3 a check found a fault; 130 Ctrl-C.

    \b
    Example:
      slowmo init fashion-mnist > my.toml
      slowmo plan my.toml -n 4
      slowmo train my.toml -n 4
    """


for command in (init, train, plan, topology, doctor):
    slowmo.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with the documented code; a mistake is told without a traceback.

    What goes wrong here goes wrong in every rank that a launcher started; only its rank 0 speaks.
    """
    error: SlowmoError
    try:
        code = slowmo.main(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else DONE)
    except SlowmoError as mistake:
        error = mistake
    except click.UsageError as mistake:
        context = mistake.ctx.command_path if mistake.ctx else "slowmo"
        error = UsageError(mistake.format_message(), f"Type `{context} --help`.")
    except click.ClickException as mistake:
        error = SlowmoError(mistake.format_message())
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of stdout has seen enough
        sys.stderr.close()
        sys.exit(DONE)
    say_once(error)
    sys.exit(error.exit_code)
