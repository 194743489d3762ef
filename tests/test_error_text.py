"""What is shown where no command line prints it: of an error by a script's traceback, of a value by a notebook."""

from __future__ import annotations

import pickle
import traceback

import pytest

from ckptstore import CheckpointStore, CircuitBreaker, errors


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


def test_a_value_in_a_notebook_is_no_page_of_digests(tmp_path) -> None:
    """A manifest has one for each 8 MiB: of 140 GB eighteen thousand numbers."""
    (tmp_path / "files").mkdir()
    for number in range(100):
        (tmp_path / "files" / f"shard-{number}").write_bytes(b"x")
    store = CheckpointStore(tmp_path / "mine")
    for value in (store.save(1, tmp_path / "files"), store.get(1), store.verify(1), store.resume_point()):
        assert len(repr(value)) < 800
    assert len(repr(store.restore(1, tmp_path / "back"))) < 800


def test_a_store_that_is_not_there_yet_says_what_that_may_mean(tmp_path) -> None:
    store = CheckpointStore(tmp_path / "mine")
    for look in (store.list, store.latest, store.resume_point, lambda: store.get(1), lambda: store.verify(1)):
        with pytest.raises(errors.NotFoundError) as caught:
            look()
        assert caught.value.hint == "Nothing has been saved there yet, or it is another place."
