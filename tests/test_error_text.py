"""What an error shows where no command line prints it: a script's traceback, a notebook."""

from __future__ import annotations

import pickle
import traceback

from ckptstore import CircuitBreaker, errors


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def test_a_traceback_ends_with_what_to_try() -> None:
    error = errors.StorageError("reading x: it failed", operation="reading", path="x", errno=5, hint="Try the old one.")
    assert shown(error).endswith("StorageError: reading x: it failed\nTry the old one.\n")
    assert str(error) == "reading x: it failed"
    error.add_note("a caller's own")
    error.hint = "Try another one."
    assert shown(error).endswith("it failed\nTry another one.\na caller's own\n")
    home = pickle.loads(pickle.dumps(error))  # noqa: S301 - as torch sends it to other ranks
    assert (shown(home), home.hint, home.errno) == (shown(error), "Try another one.", 5)
    error.hint = ""
    assert "Try" not in shown(error)


def test_what_to_type_after_a_halt_is_said_once(tmp_path) -> None:
    breaker = CircuitBreaker(str(tmp_path / "run"), threshold=2)
    halted = None
    try:
        for step, reward in enumerate([0.5, 0.0, 0.0]):
            breaker.observe({"grpo_actor/task_reward/avg": reward}, step)
    except errors.TrainingHalted as error:
        halted = error
    assert halted is not None
    assert halted.hint
    assert shown(halted).count(halted.command) == 1
