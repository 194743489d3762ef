"""What `push` and `pull` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from ckptstore.backends import is_url
from ckptstore.cli.common import URL_VARIABLE, WhichOption, pick
from ckptstore.errors import NothingToResumeError, UsageError
from ckptstore.listing import Listing
from ckptstore.model import Checkpoint

LATEST = click.option("--latest", is_flag=True, cls=WhichOption, help="The newest whole one.")
EVERYTHING = click.option("--all", "everything", is_flag=True, cls=WhichOption, help="All whole ones.")


def url_option(name: str, what: str) -> Callable[[Any], Any]:
    """An option that names a run's URL, by default $CKPTSTORE_URL."""
    return click.option(
        name, "url", metavar="URL", envvar=URL_VARIABLE, default="", help=f"{what}. [${URL_VARIABLE}]".capitalize()
    )


def url_or_usage(url: str, option: str) -> str:
    """The URL that was said. UsageError for none, and for what is none."""
    if not url:
        raise UsageError(f"{option} is missing", hint=f"Say {option} s3://BUCKET/PREFIX, or set ${URL_VARIABLE}.")
    if not is_url(url):
        raise UsageError(f"{option} {url} is no URL", hint=f"Say {option} s3://BUCKET/PREFIX.")
    return url


def chosen(listing: Listing, steps: Sequence[int], *, latest: bool, everything: bool) -> list[Checkpoint]:
    """The checkpoints that the command line means. NotFoundError for a step that is not there."""
    if bool(steps) + latest + everything != 1:
        raise UsageError("name steps, or say --latest, or --all", hint="`ckptstore list` shows which there are.")
    if steps:
        return pick(listing, steps)
    whole = [checkpoint for checkpoint in listing.checkpoints if checkpoint.status.usable]
    if not whole:
        raise NothingToResumeError(f"there is no whole checkpoint in {listing.run.path}", hint="`ckptstore list` says why.")
    return whole[-1:] if latest else whole
