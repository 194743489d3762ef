"""Where bytes live. `open_backend` is the only place that knows all backends."""

from __future__ import annotations

from pathlib import Path

from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import UsageError


def open_backend(location: str | Path) -> Backend:
    """The backend for a path or a `file://` URL. Other URLs are not supported yet, and say so (UsageError)."""
    text = str(location)
    if text.startswith("file://"):
        return LocalBackend(text.removeprefix("file://"))
    if "://" in text:
        scheme = text.split("://", 1)[0]
        raise UsageError(
            f"{scheme}:// locations are not supported by this version of ckptstore",
            hint="Copy the run to a local disk first, or mount it.",
        )
    return LocalBackend(text)


__all__ = ["Backend", "LocalBackend", "open_backend"]
