"""Retention: which steps stay, and that deleting them can be interrupted anywhere."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptstore import CheckpointStore, retention
from ckptstore.errors import CkptStoreError, RefusedError, UsageError
from ckptstore.model import Status
from ckptstore.retention import Candidate, Keep, decide
from ckptstore.saves import steps
from tests import commands, trees
from tests.crashing import Crash, Operations, content
from tests.test_steps import step_folder, write

GOOD, TORN = Status.COMMITTED, Status.PARTIAL


def kept(candidates: list[Candidate], keep: Keep, **more: Any) -> list[int]:
    return [one.candidate.step for one in decide(candidates, keep, **more) if one.keep]


def made(*numbers: int, **more: Any) -> list[Candidate]:
    return [Candidate(number, GOOD, **more) for number in numbers]


def test_each_rule() -> None:
    ten = made(*range(10, 110, 10))
    assert kept(ten, Keep(last=2)) == [90, 100]
    assert kept(ten, Keep(every=40)) == [40, 80, 100]
    assert kept(ten, Keep(last=1, every=50)) == [50, 100]
    for more in range(10, 25):
        assert kept(ten, Keep(last=more)) == list(range(10, 110, 10))
    assert kept(ten, Keep(last=1), pinned={30, 7}) == [30, 100]
    scored = [Candidate(step, GOOD, {"r": value}) for step, value in ((1, 0.5), (2, 0.9), (3, 0.9), (4, 0.1), (5, 0.2))]
    assert kept(scored, Keep(best=1, metric="r")) == [3, 5], "of equals the newer one"
    assert kept(scored, Keep(best=2, metric="r", mode="min")) == [4, 5]
    assert kept(scored, Keep(best=2, metric="other")) == [5]


def at_hours(*hours: float) -> list[Candidate]:
    """Steps 1, 2, … saved at these times."""
    return [Candidate(step, GOOD, saved_at_s=1e9 + 3600 * hour) for step, hour in enumerate(hours, 1)]


def test_one_in_so_many_hours() -> None:
    assert kept(at_hours(0, 1, 2, 3, 4, 5, 6, 7), Keep(every_hours=3)) == [1, 4, 7, 8], "and the newest"
    assert kept(at_hours(0, 2.9, 3.1, 6.0, 6.1, 7), Keep(every_hours=3)) == [1, 3, 5, 6], "from what is kept, not by the clock"
    assert kept(at_hours(0, 50, 51, 100), Keep(every_hours=3)) == [1, 2, 4], "after a pause"
    assert kept(at_hours(0, 0.5, 1), Keep(every_hours=0.5)) == [1, 2, 3]
    assert kept(at_hours(0, 1, 2), Keep(every_hours=100, last=2)) == [1, 2, 3]
    bad = [Candidate(0, TORN, saved_at_s=1e9 - 9e4), Candidate(9, GOOD, healthy=False, saved_at_s=1e9 - 8e4)]
    assert kept([*bad, *at_hours(0, 1, 5)], Keep(every_hours=3)) == [0, 1, 3, 9], "only good ones count, and 9 is the newest"
    unknown = [Candidate(4, GOOD), *at_hours(0, 1)]
    assert kept(unknown, Keep(every_hours=3)) == [1, 2, 4], "a time that is not known says nothing: 2 may be the newest"
    again = [
        Candidate(1, GOOD, saved_at_s=1e9 + 9000),
        Candidate(2, GOOD, saved_at_s=1e9),
        Candidate(3, GOOD, saved_at_s=1e9 + 1),
    ]
    assert kept(again, Keep(every_hours=1)) == [1, 2, 3], "by time: step 1 was saved again"


def test_training_that_went_back() -> None:
    """To step 500, after step 1000: what it saves since is not deleted, nor is what it left, for the other's sake."""
    left = [Candidate(step, GOOD, saved_at_s=1e9 + step) for step in range(100, 1001, 100)]
    since = [Candidate(step, GOOD, saved_at_s=1e9 + 2000 + step) for step in (550, 650, 750)]
    assert kept([*left, since[0]], Keep(last=3)) == [550, 800, 900, 1000]
    assert kept([*left, *since], Keep(last=3)) == [550, 650, 750, 800, 900, 1000]
    assert kept([*left, *since], Keep(every=1000)) == [750, 1000], "the newest of both"
    onward = [Candidate(step, GOOD, saved_at_s=1e9 + 2000 + step) for step in (1050, 1150, 1250)]
    assert kept([*left, *since, *onward], Keep(last=3)) == [1050, 1150, 1250]
    same_second = [Candidate(step, GOOD, saved_at_s=1e9) for step in (550, 900, 1000)]
    assert kept(same_second, Keep(last=1), saved=550) == [550, 1000], "whatever the clocks say"
    bad = [Candidate(550, GOOD, healthy=False), *left]
    assert kept(bad, Keep(last=1), saved=550) == [550, 1000]


def test_the_time_of_a_save(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it was committed, by its manifest, whatever the age of the files in it."""
    import datetime as times

    from ckptstore import manifest

    class Clock(times.datetime):
        hour = 0

        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2026, 1, 2, Clock.hour, 30, tzinfo=tz)

    monkeypatch.setattr(manifest, "datetime", Clock)
    store = CheckpointStore(room / "store")
    source = write(room / "source", "x", 50)
    for Clock.hour in (1, 2, 3, 4, 5, 6):
        store.save(Clock.hour, source)
    found = store.prune(Keep(every_hours=2), dry_run=True)
    assert [one.candidate.saved_at_s for one in found] == [1767315600 + 1800 + 3600 * hour for hour in range(6)]
    assert {one.candidate.step: one.why for one in found if one.keep} == {
        1: "one in 2 h",
        3: "one in 2 h",
        5: "one in 2 h",
        6: "the newest good one",
    }
    store.save(7, source, keep=Keep(every_hours=2))
    assert there(store) == [1, 3, 5, 7]


def test_planted_a_chain_from_what_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that counts from the step before, kept or not, keeps nothing of a run that saves often."""

    def wrong(span_s: float, good: Any) -> set[int]:
        ordered = sorted(good, key=lambda one: one.saved_at_s)
        return {b.step for a, b in itertools.pairwise(ordered) if b.saved_at_s - a.saved_at_s >= span_s}

    monkeypatch.setattr(retention, "_one_in", wrong)
    with pytest.raises(AssertionError):
        test_one_in_so_many_hours()


def test_only_good_ones_count() -> None:
    some = [*made(1, 2, 3), Candidate(4, TORN), Candidate(5, Status.CORRUPT), Candidate(6, Status.COMPLETE)]
    assert kept(some, Keep(last=2)) == [2, 3, 4, 5, 6], "what is not committed is not counted, and not deleted"
    sick = [*made(1, 2), *made(3, 4, healthy=False)]
    assert kept(sick, Keep(last=1)) == [2, 4], "nor does a save delete what it has just saved"
    assert kept(made(1, 2, healthy=False), Keep(last=1)) == [1, 2], "without a good one nothing is deleted"


def test_reasons() -> None:
    why = {
        one.candidate.step: one.why
        for one in decide(made(1, 2, 3, metrics={"r": 1.0}), Keep(last=1, every=2, best=1, metric="r"))
    }
    assert why == {1: "no rule keeps it", 2: "a multiple of 2", 3: "the newest good one; of the last 1; number 1 by r (1)"}


@pytest.mark.parametrize(
    "wrong", [
        {}, {"last": -1}, {"best": 1}, {"metric": "x", "last": 1}, {"last": 1, "mode": "best"}, {"every_hours": -1},
        {"every_hours": float("nan")}, {"every_hours": float("inf")}, {"every_hours": "3"}, {"last": 1.5}, {"last": True},
    ],
)  # fmt: skip
def test_usage(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Keep(**wrong)


candidates = st.lists(
    st.builds(
        Candidate,
        st.integers(0, 40),
        st.sampled_from(Status),
        st.dictionaries(st.just("r"), st.floats(), max_size=1),
        st.booleans(),
        saved_at_s=st.integers(0, 40).map(lambda hours: hours * 3600.0),
    ),
    unique_by=lambda one: one.step,
    max_size=12,
)
keeps = st.builds(Keep, st.integers(1, 5), st.integers(0, 7), every_hours=st.integers(0, 9)) | st.builds(
    lambda k: Keep(best=k, metric="r"), st.integers(1, 4)
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a machine may be busy
@given(candidates, keeps, st.sets(st.integers(0, 40)), st.integers(-1, 40))
def test_what_always_holds(some: list[Candidate], keep: Keep, pinned: set[int], saved: int) -> None:
    decisions = decide(some, keep, pinned=pinned, saved=saved)
    doomed = [one.candidate for one in decisions if not one.keep]
    assert sorted(one.candidate.step for one in decisions) == sorted(one.step for one in some)
    assert all(one.status is GOOD and one.step not in pinned and one.step != saved for one in doomed)
    good = [one for one in some if one.good]
    assert len([one for one in good if one not in doomed]) >= min(keep.last, len(good))
    if good:
        assert max(good, key=lambda one: (one.saved_at_s, one.step)) not in doomed
        assert max(one.step for one in good) not in {one.step for one in doomed}
        assert max(one.step for one in some if one.status is GOOD) not in {one.step for one in doomed}
    else:
        assert not doomed
    left = [one.candidate for one in decisions if one.keep]
    if keep.every_hours:
        times = sorted(one.saved_at_s for one in left if one.good and one.saved_at_s)
        for one in good:
            assert not one.saved_at_s or any(0 <= one.saved_at_s - at < keep.every_hours * 3600 for at in times)
    assert [one.keep for one in decide(left, keep, pinned=pinned, saved=saved)] == [True] * len(left), (
        "a second prune finds nothing"
    )


# --- on the disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def room(memory_path: Path) -> Path:
    return memory_path


def fill(room: Path, *numbers: int) -> CheckpointStore:
    shutil.rmtree(room / "store", ignore_errors=True)
    store = CheckpointStore(room / "store")
    for number in numbers:
        store.save(number, write(room / "source", f"m{number}", 50), metrics={"loss": float(number)})
    return store


def there(store: CheckpointStore) -> list[int]:
    return [one.step for one in store.list()]


def test_prune_and_keep_while_saving(room: Path) -> None:
    store = fill(room, 1, 2, 3, 4)
    planned = store.prune(Keep(last=2), dry_run=True)
    assert there(store) == [1, 2, 3, 4]
    assert store.prune(Keep(last=2)) == planned
    assert there(store) == [3, 4]
    store.save(5, room / "source", keep=Keep(last=1, best=1, metric="loss", mode="min"))
    assert there(store) == [3, 5], "5 has no such metric"
    assert sorted(path.name for path in Path(steps.side_of(store.folder)).iterdir()) == ["lock"]


def test_a_save_below_the_newest_is_kept(room: Path) -> None:
    """It was deleted in the moment in which it was saved, where training had gone back to an older step."""
    store = fill(room, 100, 200, 300)
    store.save(150, room / "source", keep=Keep(last=1))
    assert there(store) == [150, 300]


def test_the_newest_is_verified_before_anything_goes(room: Path) -> None:
    """What looks whole by its names and is not must not be all that stays."""
    store = fill(room, 1, 2)
    folder = step_folder(store, 2)
    (room / "st").mkdir()
    trees.write_model(room / "st", seed=1)
    store.save(3, room / "st")
    path = step_folder(store, 3) / "model.safetensors"
    times = os.stat(path)
    path.write_bytes(b"\xff" * times.st_size)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert store.get(3).status is GOOD, "quick does not see it"
    store.prune(Keep(last=1))
    assert there(store) == [2, 3]
    assert folder.is_dir()


def test_pins_hold(room: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(room, 1, 2, 3)
    assert commands.invoke(capfd, "status", "--run", store.folder, "--pin", "1").code == 0
    store.prune(Keep(last=1))
    assert there(store) == [1, 3]
    Path(steps.side_of(store.folder), "pins.json").write_text("{")
    with pytest.raises(CkptStoreError, match="damaged"):
        store.prune(Keep(last=1))
    assert there(store) == [1, 3]


def test_no_other_folder_is_pruned(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path, steps=(46, 93))
    with pytest.raises(CkptStoreError):
        CheckpointStore(run).prune(Keep(last=1))
    for number in (1, 2):
        (tmp_path / f"other/step-{number}").mkdir(parents=True)
    with pytest.raises(RefusedError, match="nothing was saved there"):
        CheckpointStore(tmp_path / "other").prune(Keep(last=1))
    assert len(list((tmp_path / "other").iterdir())) == 2


@pytest.mark.parametrize("how", ["crash", "error"])
def test_stopped_at_every_operation(room: Path, how: str) -> None:
    """Every step that is still there is whole, those that are kept are there, and the next prune ends it."""
    store = fill(room, 1, 2, 3, 4)
    before = {number: content(step_folder(store, number)) for number in (1, 2, 3, 4)}
    with Operations().watched() as seen:
        store.prune(Keep(last=2))
    assert len(seen.log) > 6
    for at in range(1, len(seen.log) + 1):
        for when in ("before", "after"):
            store = fill(room, 1, 2, 3, 4)
            cause: BaseException = Crash() if how == "crash" else OSError(errno.EIO, os.strerror(errno.EIO))
            before = {number: content(step_folder(store, number)) for number in (1, 2, 3, 4)}
            with Operations(at=at, when=when, how=cause).watched(), contextlib.suppress(Crash, CkptStoreError, OSError):
                store.prune(Keep(last=2))
            found = there(store)
            assert {3, 4} <= set(found)
            for number in found:
                assert content(step_folder(store, number)) == before[number]
                assert store.verify(number).ok
            store.prune(Keep(last=2))
            assert there(store) == [3, 4]
            store.save(5, room / "source")
            assert not [name for name in os.listdir(steps.side_of(store.folder)) if name.startswith("trash-")]


def test_planted_deleting_in_place(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep finds a prune that deletes a step where it lies."""

    def in_place(backend: Any, keep: Keep, *, unmirrored: bool = False) -> list[retention.Decision]:
        decisions = retention.plan(backend, keep)
        for one in decisions:
            if not one.keep:
                for path in sorted(Path(backend.location, f"step-{one.candidate.step}").rglob("*"), reverse=True):
                    os.rmdir(path) if path.is_dir() else os.unlink(path)
                os.rmdir(Path(backend.location, f"step-{one.candidate.step}"))
        return decisions

    monkeypatch.setattr(retention, "prune", in_place)
    with pytest.raises(AssertionError):
        test_stopped_at_every_operation(room, "crash")


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., commands.Result]:
    commands.isolate(monkeypatch, tmp_path)
    return functools.partial(commands.invoke, capfd)


def test_prune_on_the_command_line(room: Path, cli: Callable[..., commands.Result], tmp_path: Path) -> None:
    store = fill(room, 1, 2, 3)
    words = ("prune", "--run", store.folder, "--keep-last", "1")
    dry = cli(*words, "--dry-run")
    assert (dry.code, "2 of 3 would be deleted" in dry.out, there(store)) == (0, True, [1, 2, 3])
    document = cli(*words, "--keep-best", "1", "--metric", "loss", "--mode", "min", "--json").json
    assert (set(document), document["done"]) == ({"done", "steps"}, True)
    assert set(document["steps"][0]) == {"step", "status", "bytes", "keep", "why"}, "docs/cli.md"
    assert [(one["step"], one["keep"]) for one in document["steps"]] == [(1, True), (2, False), (3, True)]
    assert there(store) == [1, 3]
    assert cli("prune", "--run", store.folder).code == 2
    run = trees.make_run(tmp_path, steps=(46, 93))
    refused = cli("prune", "--run", run, "--keep-last", "1")
    assert refused.code == 1
    assert "nothing was saved there by ckptstore" in refused.err
    assert "stores of steps alone" in commands.flat(refused.err)


def test_prune_by_hours_and_by_the_configuration(room: Path, cli: Callable[..., commands.Result]) -> None:
    store = fill(room, 1, 2, 3)
    words = ("prune", "--run", store.folder, "--dry-run", "--json")
    assert [one["keep"] for one in cli(*words, "--keep-every-hours", "0.5").json["steps"]] == [True, False, True]
    config = room / "run.yaml"
    config.write_text("n: 2\nretention: {last: '${n}0', every_hours: 12, best: null}\n")
    # What is put together of text is text: said, not guessed.
    refused = cli(*words, "--config", config)
    assert (refused.code, "last is '20', and must be a whole number" in refused.err + refused.out) == (2, True)
    config.write_text("n: 2\nretention: {last: '${n}'}\n")
    assert [one["keep"] for one in cli(*words, "--config", config).json["steps"]] == [False, True, True]
    assert [one["keep"] for one in cli(*words, "--config", config, "retention.last=1").json["steps"]] == [False, False, True]
    assert [one["keep"] for one in cli(*words, "--config", config, "--keep-every", "2").json["steps"]] == [False, True, True]
    for text, problem in (
        ("other: 1", "no retention: block"),
        ("retention: [1]", "is a list, not a mapping"),
        ("retention: {latest: 2}", "there is no 'latest'"),
        ("retention: {}", "say what to keep"),
    ):
        config.write_text(text + "\n")
        refused = cli(*words, "--config", config)
        assert refused.code == 2
        assert problem in refused.err + refused.out
    assert there(store) == [1, 2, 3]
    assert cli("prune", "--run", store.folder, "--keep-every-hours", "0").code == 2
