"""The command `slowmo`: parsing and printing, nothing else.

No module here imports torch, mpi4py or h5py before a command runs, so that every --help answers at once.
"""

from __future__ import annotations

import signal
import sys
import traceback
from functools import partial

import click

from .. import __version__
from ..errors import DONE, FAILED, INTERRUPTED, USAGE, SlowmoError
from .bench import bench
from .checkpoint import checkpoint
from .data import data
from .doctor import doctor
from .init import init
from .job import job
from .plan import plan
from .report import report
from .say import say
from .topology import topology
from .train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="slowmo")
def slowmo() -> None:
    """Train PyTorch models over MPI with SlowMo, gossip and local steps.

    Data goes to stdout, everything else to stderr. Exit codes: 0 done; 1 failed; 2 wrong usage or
    configuration; 3 a check found a fault; 75 stopped early with a checkpoint, run again; 130 Ctrl-C.

    \b
    Example:
      slowmo init fashion-mnist > my.toml
      slowmo plan my.toml -n 4
      slowmo train my.toml -n 4
    """


for command in (init, train, plan, job, report, topology, checkpoint, data, bench, doctor):
    slowmo.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with the documented code; a mistake is told without a traceback.

    What goes wrong here usually goes wrong in every rank that a launcher has started; one of them tells it.
    """
    from ..comm.launcher import fail_together, launched

    try:
        code = slowmo.main(arguments, prog_name="slowmo", standalone_mode=False)
    except SlowmoError as error:
        code = error.exit_code
        fail_together(code, partial(say, error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = USAGE
    except click.UsageError as error:
        code = USAGE
        context = error.ctx.command_path if error.ctx else "slowmo"
        fail_together(code, partial(say, SlowmoError(error.format_message(), f"Type `{context} --help`.")))
    except click.ClickException as error:
        code = error.exit_code
        fail_together(code, partial(say, SlowmoError(error.format_message())))
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception:  # a mistake of ours: its traceback, but of one rank
        code = FAILED
        fail_together(code, traceback.print_exc)
    code = code if isinstance(code, int) else DONE
    if code != DONE and launched() is not None:  # srun ends the others, who are leaving too: with codes of their own
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)
