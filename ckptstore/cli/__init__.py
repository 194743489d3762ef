"""The command line: one module a verb, each a thin skin over the library. Exit codes and JSON fields: docs/cli.md."""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import click

import ckptstore
from ckptstore.errors import CkptStoreError

VERBS = (
    "list", "setup", "resume", "show", "verify", "seal", "push", "pull", "repair", "adopt", "watch", "status", "plot", "doctor",
    "prune", "clean",
)  # fmt: skip

INTERRUPTED = 130  #: as shells say it

HELP = """From a crash to resumed training, and never onto a bad checkpoint.

\b
After a crash:
  ckptstore list      what is there, and what of it is whole
  ckptstore setup     put the newest good checkpoint where the trainer resumes
  ckptstore resume    both, guided, and the exact command that goes on training

Run without arguments, it shows what `resume` would do, and changes nothing.

\b
Where the run is, after the verb (nothing, where only one run fits):
  -e EXPERIMENT -t TRIAL below --fileroot DIR or $CKPTSTORE_FILEROOT,
  or --config run.yaml (the trainer's own), or --run DIR
"""

EPILOG = "Exit codes: 0 fine, 1 failed, 2 usage, 3 damage found, 4 nothing to resume from, 130 interrupted."


class _Verbs(click.Group):
    """Imports a verb's module only when it is used: `list` must start in a blink."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"ckptstore.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS:
            near = difflib.get_close_matches(args[0], VERBS, n=1, cutoff=0.5)
            raise click.UsageError(f"there is no verb {args[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""), ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Verbs,
    help=HELP,
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
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
    gc.set_threshold(100_000)  # a listing of ten thousand makes a million objects and hardly a cycle: a tenth of its time
    try:
        code = run(arguments)
    except KeyboardInterrupt:  # once more, while it was being said
        code = INTERRUPTED
    if code == INTERRUPTED:
        # Threads may sit in requests that no store answers. Nothing of theirs is waited for, and none of them begins anything.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Errors are printed, never raised: what was found, and what to try.

    With --json an error is a JSON document on stdout as well.
    """
    words = [*(sys.argv[1:] if arguments is None else arguments)]  # `list` is our verb's module in here
    for name in ("stdin", "stdout", "stderr"):  # in this order: closed ones must not become the numbers of files that we open
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - for good
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no ✓ must not end a setup
    try:
        return _run(words)
    except BrokenPipeError:  # `ckptstore list | head`: the reader has gone
        _drop(sys.stdout)
        return 1
    except OSError as error:
        if error.filename is not None:
            raise
        _drop(sys.stdout)
        hint = "`ckptstore list` tells what was done."
        try:
            _report(f"writing the output: {error.strerror}", hint=hint, exit_code=1, as_json=False)
        except OSError:
            _drop(sys.stderr)  # it goes to the same full disk
        return 1


def _run(words: list[str]) -> int:
    as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
    try:
        result: Any = cli.main(args=words, prog_name="ckptstore", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _report("interrupted", exit_code=INTERRUPTED, as_json=as_json)
    except click.ClickException as error:
        verb = f"ckptstore {words[0]}" if words and words[0] in VERBS else "ckptstore"
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else verb
        hint = _after_a_verb(error, words) or f"`{path} --help`"
        return _report(error.format_message(), hint=hint, exit_code=error.exit_code, as_json=as_json)
    except CkptStoreError as error:
        facts = tuple(getattr(error, "facts", ()))
        return _report(str(error), facts, error.hint, exit_code=error.exit_code, as_json=as_json)
    return result if isinstance(result, int) else 0


def _after_a_verb(error: click.ClickException, words: list[str]) -> str:
    """What to type where a verb's option was given to bare `ckptstore`."""
    if not isinstance(error, click.NoSuchOption) or not words[0].startswith("-"):
        return ""
    resume: click.Command = importlib.import_module("ckptstore.cli.resume").command
    known = {name for option in resume.params for name in option.opts}
    if error.option_name.partition("=")[0] not in known:
        return ""
    typed = shlex.join(words)
    return f"Options follow a verb: `ckptstore resume --plan {typed}` is what bare `ckptstore` does; `ckptstore --help`"


def _drop(stream: TextIO) -> None:
    """Send what is left of a stream nowhere: Python would complain again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report(message: str, facts: Sequence[str] = (), hint: str = "", *, exit_code: int, as_json: bool) -> int:
    from ckptstore.cli.render import print_json, problem

    if as_json:
        print_json({"error": message, "facts": [*facts], "hint": hint, "exit_code": exit_code})
    if exit_code == INTERRUPTED:
        click.echo(f"\n{message}", err=True)
    else:
        problem(message, facts=facts, hint=hint)
    return exit_code
