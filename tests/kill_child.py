"""A setup that kills itself, for real, at a chosen operation on the file system. Run by test_kill.py.

python -m tests.kill_child RUN STEP AT before|after exchange|rename

AT 0: none; then the operations are printed, one a line.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from ckptstore import recovery
from ckptstore.backends import open_backend
from ckptstore.choose import Selection
from ckptstore.plan import Options
from tests.crashing import Operations


class Killing(Operations):
    """SIGKILL: no handler, no `finally`, no flush."""

    def perform(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mine = len(self.log) + 1 == self.at
        if mine and self.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = super().perform(name, call, *args, **kwargs)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def main() -> None:
    run, step, at, when, method = sys.argv[1:]
    operations = Killing(at=int(at), when=when)
    with operations.watched(exchange=method == "exchange"):
        recovery.setup(open_backend(run), Selection(step=int(step)), Options(world_size=2))
    if at == "0":
        print("\n".join(operations.details))


if __name__ == "__main__":
    main()
