"""Claims: who writes where below a step's folder in an object store.

The first writer creates a claim in the folder itself and puts its files under their final keys. Who finds a claim of other
bytes there makes an attempt: a folder of its own inside, with a claim of its own. A claim names the content (sizes and digests
of all files), so that an interrupted push finds its place again, and two that send the same bytes share one. Its owner renews
it while it lives: one that has not been renewed for long is dead (leftovers.py).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterable
from datetime import UTC, datetime

from ckptstore.backends.base import Backend
from ckptstore.errors import AlreadyExistsError, NotFoundError
from ckptstore.model import ATTEMPT_PREFIX, CLAIM_NAME

RENEW_S = 300.0  #: how often a living push renews its claim
CLEANING = "being removed"  #: the content of a claim whose files are on their way out


def read(target: Backend, folder: str) -> dict[str, object] | None:
    """The claim in `folder`; None without one, {} for one that cannot be understood: it is somebody's."""
    try:
        data = target.get(f"{folder}/{CLAIM_NAME}", length_bytes=65536)
    except NotFoundError:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def make(target: Backend, folder: str, content: str) -> bool:
    """Claim `folder` for `content`; False where somebody else has it claimed for other bytes."""
    try:
        target.put(f"{folder}/{CLAIM_NAME}", _described(content), if_absent=True)
        if target.creates_atomically:
            return True
    except AlreadyExistsError:
        pass  # somebody was faster, or our own first try came through after all
    return share(target, folder, content)


def share(target: Backend, folder: str, content: str) -> bool:
    """Renew the claim in `folder`, where it is one for `content`."""
    if not holds(target, folder, content):
        return False
    renew(target, folder, content)
    return True


def holds(target: Backend, folder: str, content: str) -> bool:
    """Whether the claim in `folder` is one for `content`."""
    return (read(target, folder) or {}).get("content") == content


def renew(target: Backend, folder: str, content: str) -> None:
    """Write the claim anew, whoever has it: its time says that somebody lives, or with CLEANING that all of it goes."""
    target.put(f"{folder}/{CLAIM_NAME}", _described(content))


def release(target: Backend, folder: str) -> None:
    """Take the claim away."""
    target.delete(f"{folder}/{CLAIM_NAME}")


def new_attempt() -> str:
    """The name of a folder that nobody else writes into."""
    return f"{ATTEMPT_PREFIX}{secrets.token_hex(8)}"


def attempts(names: Iterable[str]) -> list[str]:
    """The attempts among the names of a step's files, each relative to the step's folder."""
    return sorted({name.partition("/")[0] for name in names if name.startswith(ATTEMPT_PREFIX)})


def _described(content: str) -> bytes:
    at = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    return json.dumps({"content": content, "host": socket.gethostname(), "pid": os.getpid(), "at": at}).encode()
