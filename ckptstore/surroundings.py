"""What lies around a place where a run was looked for: near names, other runs, closed folders, links."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

from ckptstore.frameworks.areal.layout import RunRef


def near_name(value: str, found: list[RunRef], name: str) -> str:
    """The existing name that `value` almost is; empty when it exists, or nothing is near."""
    names = sorted({str(getattr(run, name)) for run in found})
    if not value or value in names:
        return ""
    folded = {other.casefold(): other for other in names}
    near = difflib.get_close_matches(value.casefold(), list(folded), n=1, cutoff=0.6)
    return folded[near[0]] if near else ""


def overview(found: list[RunRef]) -> list[str]:
    """The runs by user, for people."""
    lines = []
    users = sorted({run.user for run in found})
    for user in users[:8]:
        runs = [f"{run.experiment}/{run.trial}" for run in found if run.user == user]
        lines.append(f"user {user}: {some_of(runs)}")
    return lines + ([f"and {len(users) - 8} more users"] if len(users) > 8 else [])


def closed_folders(place: str) -> list[str]:
    """Folders on the way to the runs that this user may not look into."""
    below = [os.path.join(place, name) for name in names_in(place)]
    unreadable = [path for path in (place, *below) if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK)]
    return [above] if (above := closed_above(place)) else unreadable[:4]


def closed_above(path: str) -> str:
    """The folder above `path` that this user may not look into; empty where there is none."""
    above = os.path.dirname(path)
    while above != os.path.dirname(above) and not os.path.isdir(above):
        above = os.path.dirname(above)
    return "" if os.access(above, os.X_OK) else above


def links_in(place: str) -> list[str]:
    """Links on the way to the runs."""
    level, links = [place], []
    for _ in ("user", "experiment", "trial"):
        level = [os.path.join(path, name) for path in level[:200] for name in names_in(path)]
        links += [path for path in level if os.path.islink(path) and os.path.isdir(path)]
        level = [path for path in level if not os.path.islink(path)]
    return links[:4]


def names_in(path: str) -> list[str]:
    """What is in a folder, hidden things left out; nothing where it cannot be told."""
    try:
        return sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError:
        return []


def some_of(names: Sequence[str], limit: int = 8) -> str:
    """The first of them, for people."""
    if not names:
        return "nothing"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
