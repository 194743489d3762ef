"""That a store gives no answer: said while it is still asked, so that nobody takes a wrong endpoint for a hang."""

from __future__ import annotations

import logging
import threading
import time

from ckptstore.backends import profile, wording

log = logging.getLogger(__name__)

NOTICE_S = 5.0  #: without an answer, before anything is said
AGAIN_S = 20.0  #: between two such lines, whatever waits

_lock = threading.Lock()
_next_s = 0.0


def notice(location: str, silent_s: float) -> None:
    """Log that requests about `location` have had no answer for `silent_s`, if that is long and was not said just now."""
    global _next_s
    if silent_s < NOTICE_S:
        return
    with _lock:
        now_s = time.monotonic()
        if now_s < _next_s:
            return
        _next_s = now_s + AGAIN_S
    endpoint = profile.endpoint() if location.startswith("s3://") else ""
    where = f"{location} ({wording.shown(endpoint)})" if endpoint else location
    log.warning("ckptstore: no answer from %s for %.0f s, still trying", where, silent_s)
