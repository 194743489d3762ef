"""Where bytes live. `open_backend` is the only place that knows all backends."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from ckptstore.backends.bandwidth import Bandwidth
from ckptstore.backends.base import Backend, Blob
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import UsageError

OBJECT_SCHEMES = ("s3", "gs", "az")


def open_backend(location: str | Path, *, bandwidth: Bandwidth | None = None) -> Backend:
    """The backend for a path or a URL: s3, gs and az by obstore, any other scheme by fsspec.

    Credentials and endpoints come from the environment or the cloud's own profile files; UsageError for a URL that has some
    in it, and where the library that a scheme needs is not installed. Nothing is asked of the medium yet. `bandwidth` bounds
    what goes over a network, for all backends together that are opened with it.
    """
    backend = _open(location)
    backend.bandwidth = bandwidth
    return backend


def _open(location: str | Path) -> Backend:
    text = os.fspath(location)
    if not text:
        raise UsageError("the place of the run is empty text", hint="Name a folder or a URL; this folder is `.`.")
    if not is_url(text):
        return LocalBackend(text.removeprefix("file://"))
    url = normal_url(text)
    if urlsplit(url).scheme in OBJECT_SCHEMES:
        from ckptstore.backends.object import ObjectBackend

        return ObjectBackend(url)
    from ckptstore.backends.fsspec import FsspecBackend

    return FsspecBackend(url)


def is_url(location: str) -> bool:
    """Whether it names something that is no path of this machine."""
    return "://" in location and not location.startswith("file://")


def normal_url(text: str) -> str:
    """`text` without slashes at the end. UsageError, without repeating it, for one with credentials in it."""
    parts = urlsplit(text)
    if "@" in parts.netloc and parts.password is not None:
        raise UsageError(
            f"a {parts.scheme}:// URL with credentials in it: they would end in logs and in the shell's history",
            hint="Leave them out; they are taken from the environment, as the cloud's own tools do (docs/object-stores.md).",
        )
    if parts.query or parts.fragment:
        raise UsageError(
            f"a {parts.scheme}:// URL with `?` or `#` in it: options and tokens belong in the environment",
            hint="docs/object-stores.md lists the variables.",
        )
    if parts.scheme in OBJECT_SCHEMES and (not parts.netloc or "@" in parts.netloc):
        raise UsageError(
            f"a {parts.scheme}:// URL that names no bucket, or something before an @",
            hint=f"Say {parts.scheme}://BUCKET/PREFIX.",
        )
    if parts.scheme in OBJECT_SCHEMES and {"", ".", ".."} & set((parts.path.strip("/") or "-").split("/")):
        raise UsageError(f"{text}: no name between two slashes of a prefix may be empty, `.` or `..`")
    return text.rstrip("/")


__all__ = ["OBJECT_SCHEMES", "Backend", "Bandwidth", "Blob", "LocalBackend", "is_url", "normal_url", "open_backend"]
