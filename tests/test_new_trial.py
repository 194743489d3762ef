"""`--new-trial`: a fresh trial that resumes from the checkpoint, by one rename; the old trial is untouched."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from ckptstore import native, recovery
from ckptstore.backends import open_backend
from ckptstore.choose import Selection
from ckptstore.errors import AlreadyExistsError, NotCommitted, UsageError
from ckptstore.listing import scan
from ckptstore.plan import Options
from tests import trees


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return trees.make_run(tmp_path, steps=[46, 93], slot="era_a", slot_step=93, recover_info=93)


def test_the_new_trial_holds_slot_and_recover_info(run: Path) -> None:
    before = content(run)
    recovery.setup(open_backend(run), Selection(step=93), Options(new_trial="trial1"))
    new = scan(open_backend(run.parent / "trial1"))
    assert new.slot is not None
    assert new.recover_info is not None
    assert (new.slot.step, new.slot.status.value) == (93, "COMMITTED")
    assert (new.recover_info.step, new.recover_info.problems) == (93, ())
    assert content(run) == before
    assert [name for name in os.listdir(run.parent / ".ckptstore/trial0") if name.startswith("stage-")] == []


def test_an_existing_trial_is_never_replaced(run: Path) -> None:
    (run.parent / "trial1").mkdir()
    with pytest.raises(AlreadyExistsError):
        recovery.setup(open_backend(run), Selection(step=93), Options(new_trial="trial1"))
    assert os.listdir(run.parent / "trial1") == []


def test_a_failing_rename_leaves_no_trial(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(a: object, b: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(native, "rename_noreplace", refuse)
    with pytest.raises(NotCommitted):
        recovery.setup(open_backend(run), Selection(step=93), Options(new_trial="trial1"))
    assert not (run.parent / "trial1").exists()


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "../trial9"])
def test_names_that_are_no_trial_are_refused(run: Path, name: str) -> None:
    with pytest.raises(UsageError):
        recovery.plan(open_backend(run), Selection(step=93), Options(new_trial=name))
