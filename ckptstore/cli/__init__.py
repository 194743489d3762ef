"""The command line: one module a verb, each a thin skin over the library. Exit codes and JSON fields: docs/cli.md."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

import ckptstore
from ckptstore.errors import CkptStoreError

VERBS = ("list", "setup", "resume", "show", "verify", "seal", "clean")

HELP = """From a crash to resumed training, and never onto a bad checkpoint.

\b
After a crash:
  ckptstore list      what is there, and what of it is whole
  ckptstore setup     put the newest good checkpoint where the trainer resumes
  ckptstore resume    both, guided, and the exact command that goes on training

Run without arguments, it shows what `resume` would do, and changes nothing.

\b
Where the run is: -e EXPERIMENT -t TRIAL below --fileroot DIR ($CKPTSTORE_FILEROOT),
or --config run.yaml (the trainer's own), or --run DIR.
"""

EPILOG = "Exit codes: 0 fine, 1 failed, 2 usage, 3 damage found, 4 nothing to resume from, 130 interrupted."


class _Verbs(click.Group):
    """Imports a verb's module only when it is used: `list` must start in a blink."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"ckptstore.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=_Verbs,
    help=HELP,
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(ckptstore.__version__, prog_name="ckptstore")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Bare: the first screen of `resume`."""
    if ctx.invoked_subcommand is None:
        resume = importlib.import_module("ckptstore.cli.resume")
        ctx.invoke(resume.command, plan_only=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Errors are printed, never raised: what was found, and what to try."""
    try:
        result: Any = cli.main(
            args=None if arguments is None else list(arguments), prog_name="ckptstore", standalone_mode=False
        )
    except click.exceptions.Exit as done:
        return done.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except CkptStoreError as error:
        _print_error(error)
        return error.exit_code
    except BrokenPipeError:
        # `ckptstore list | head`: the reader has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return result if isinstance(result, int) else 0


def _print_error(error: CkptStoreError) -> None:
    from ckptstore.cli.render import safe

    click.echo(f"{click.style('error:', fg='red', bold=True)} {safe(str(error))}", err=True)
    if error.hint:
        click.echo(f"  {click.style('try:', bold=True)} {safe(error.hint)}", err=True)
