"""What `push` and `pull` share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import click

from ckptstore.backends import Backend, Bandwidth, is_url
from ckptstore.cli.common import WhichOption
from ckptstore.cli.opening import pick
from ckptstore.cli.render import problem
from ckptstore.cli.urls import URL_VARIABLE
from ckptstore.errors import AccessError, CkptStoreError, NothingToResumeError, RankError, StorageError, UsageError
from ckptstore.listing import Listing
from ckptstore.model import Checkpoint

LATEST = click.option("--latest", is_flag=True, cls=WhichOption, help="The newest whole one.")
EVERYTHING = click.option("--all", "everything", is_flag=True, cls=WhichOption, help="All whole ones.")


def url_option(name: str, what: str) -> Callable[[Any], Any]:
    """An option that names a run's URL, by default $CKPTSTORE_URL."""
    return click.option(name, "url", metavar="URL", envvar=URL_VARIABLE, default="", help=f"{what}. [${URL_VARIABLE}]")


_RATE = re.compile(r"(?i)([0-9]+(?:\.[0-9]+)?) *([kmgt]?)(i?)b?(?:/s)?")


def _rate(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Bytes a second: 200MB/s, 0.5GiB/s, 1000000."""
    if value is None:
        return None
    match = _RATE.fullmatch(value.strip())
    number = float(match[1]) if match else 0.0
    if match is None or number <= 0 or (match[3] and not match[2]):
        raise click.BadParameter(f"{value!r} is no rate: say 200MB/s, 0.5GiB/s, or bytes a second")
    return number * float(1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " ")


MAX_BANDWIDTH = click.option(
    "--max-bandwidth",
    "bytes_per_s",
    callback=_rate,
    default=None,
    metavar="RATE",
    help="No more than this over all streams of this machine, 200MB/s say, to spare what else uses the network.",
)


def bounded(bytes_per_s: float | None, processes: int = 1) -> Bandwidth | None:
    """The bound that --max-bandwidth says, for one of `processes` of this machine."""
    return None if bytes_per_s is None else Bandwidth(bytes_per_s / processes)


def url_or_usage(url: str, option: str) -> str:
    """The URL that was said. UsageError for none, and for what is none."""
    if not url:
        raise UsageError(f"{option} is missing", hint=f"Say {option} s3://BUCKET/PREFIX, or set ${URL_VARIABLE}.")
    if not is_url(url):
        hint = f"Say {option} s3://BUCKET/PREFIX. From folder to folder `cp -rp` will do: a manifest goes with its files."
        raise UsageError(f"{option} {url} is no URL", hint=hint)
    return url


def chosen(listing: Listing, steps: Sequence[int], *, latest: bool, everything: bool) -> list[Checkpoint]:
    """The checkpoints that the command line means. NotFoundError for a step that is not there."""
    if bool(steps) + latest + everything != 1:
        raise UsageError("name steps, or say --latest, or --all", hint="`ckptstore list` shows which there are.")
    if steps:
        return pick(listing, steps)
    if latest:
        whole = [newest] if (newest := listing.latest()) else []
    else:
        whole = [checkpoint for checkpoint in listing.checkpoints if checkpoint.status.usable]
    if not whole:
        raise NothingToResumeError(f"there is no whole checkpoint in {listing.run.path}", hint="`ckptstore list` says why.")
    return whole


IN_A_ROW = 2  #: failures of the store itself, each after many tries: it is gone


class Failed(NamedTuple):
    """A checkpoint that was not moved, and why."""

    step: int
    error: CkptStoreError


def move_each(
    picked: Sequence[Checkpoint], move: Callable[[Checkpoint], object], *, store: Backend, failed: list[Failed]
) -> None:
    """`move` them all: one that cannot go, added to `failed`, does not hold up those after it.

    The error of one that was picked alone is raised, and so is that of another rank, which ends all. Where `store` itself
    fails several times running, the others are not tried.
    """
    running = 0
    for number, checkpoint in enumerate(picked):
        try:
            move(checkpoint)
            running = 0
        except RankError:
            raise
        except CkptStoreError as error:
            if len(picked) == 1:
                raise
            failed.append(Failed(checkpoint.step, error))
            running = running + 1 if isinstance(error, StorageError | AccessError) and store.location in str(error) else 0
            if running == IN_A_ROW:
                untried = StorageError(f"not tried, since {store.location} failed {running} times running")
                failed.extend(Failed(other.step, untried) for other in picked[number + 1 :])
                return


def print_failed(failed: Sequence[Failed], doing: str) -> None:
    """To stderr, one by one."""
    for one in failed:
        problem(f"step {one.step} is not {doing}: {one.error}", hint=one.error.hint)


def failed_json(failed: Sequence[Failed]) -> list[dict[str, Any]]:
    """The field `failed` of a document."""
    return [
        {"step": one.step, "error": str(one.error), "hint": one.error.hint, "exit_code": one.error.exit_code} for one in failed
    ]


def exit_code(failed: Sequence[Failed]) -> int:
    """Of the whole command: 0 where all went, 3 where something is damaged."""
    return max((one.error.exit_code for one in failed), default=0)
