"""Power cuts at the level of the disk's blocks, on ext4: each state is the old one or the new one, whole.

The table of docs/reliability.md is `python -m tests.powercut_writers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptstore import native, retention
from ckptstore import side as side_folders
from ckptstore.saves import steps
from tests import powercut
from tests.powercut_writers import NEW, OTHERS, OURS, Prune, Resave, Result, Save, campaign

pytestmark = powercut.MARKS


def test_save_and_power_cuts() -> None:
    """The short form: the prefixes of what was written, and what was flushed."""
    result = campaign(Save, parts=0)
    assert result.bad == 0, result.examples
    assert result.whole["nothing"] > 5, "cuts before it is visible"
    assert result.whole[NEW] > 5, "cuts after it has returned"


@pytest.mark.soak
@pytest.mark.parametrize("name", OURS)
def test_no_bad_state(name: str) -> None:
    if "torch" in name or "dcp" in name:
        pytest.importorskip("torch")
    result = campaign(OURS[name], parts=3)
    print(f"\n{result.row()} {dict(result.whole)}")
    assert result.bad == 0, result.examples
    assert result.states > 60
    assert len(result.whole) > 1, "cuts before and after the commit"


@pytest.mark.soak
def test_the_harness_sees_what_others_do() -> None:
    """Without any fsync, torch.save leaves files that are there and empty."""
    pytest.importorskip("torch")
    result = campaign(OTHERS["torch.save"], parts=1)
    assert result.wrong_after > 0, result.row()
    assert result.lost_after > 0, result.row()


# --- planted bugs: each must be caught ------------------------------------------------------------------------------


def not_durable(patch: pytest.MonkeyPatch, name: str) -> None:
    """A function of the engine that leaves its files to the page cache."""
    real = getattr(native, name)

    def undurable(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **(kwargs | {"options": native.CopyOptions(durable=False)}))

    patch.setattr(native, name, undurable)


def no_file_fsync(patch: pytest.MonkeyPatch) -> None:
    not_durable(patch, "copy_files")


def no_folder_fsync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(side_folders, "sync_folder", lambda path: None)


def manifest_before_data(patch: pytest.MonkeyPatch) -> None:
    """All is durable in the end, and the step is visible before its data is."""
    no_file_fsync(patch)
    publish = steps._publish

    def publish_first(draft: steps.Draft, manifest: Any, **options: Any) -> None:
        publish(draft, manifest, **options)
        folder = Path(draft.root) / f"step-{draft.step}"
        for entry in manifest.files:
            native.fsync_path(folder / entry.path)

    patch.setattr(steps, "_publish", publish_first)


def rewrite_in_place(patch: pytest.MonkeyPatch) -> None:
    """A re-save that writes over the files of the step that is there, as dcp.save does."""
    publish = steps._publish

    def over(draft: steps.Draft, manifest: Any, **options: Any) -> None:
        folder = Path(draft.root) / f"step-{draft.step}"
        if folder.exists():
            for entry in manifest.files:
                (folder / entry.path).write_bytes((Path(draft.path) / entry.path).read_bytes())
                native.fsync_path(folder / entry.path)
        publish(draft, manifest, **options)

    patch.setattr(steps, "_publish", over)


def prune_in_place(patch: pytest.MonkeyPatch) -> None:
    def delete(backend: Any, keep: Any, **options: Any) -> list[retention.Decision]:
        decisions = retention.plan(backend, keep, **options)
        for one in decisions:
            folder = Path(backend.location, f"step-{one.candidate.step}")
            if not one.keep:
                for path in sorted(folder.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                    native.fsync_path(path.parent)
                folder.rmdir()
        native.fsync_path(backend.location)
        return decisions

    patch.setattr(retention, "prune", delete)


@contextlib.contextmanager
def planted(bug: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        yield


def test_planted_no_folder_fsync() -> None:
    with planted(no_folder_fsync):
        result = campaign(Save, parts=0)
    assert result.lost_after > 0, result.row()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("bug", "writer", "what"),
    [
        (no_file_fsync, Save, "wrong_after"),
        (no_file_fsync, Resave, "wrong_after"),
        (no_folder_fsync, Resave, "lost_after"),
        (manifest_before_data, Save, "wrong_before"),
        (rewrite_in_place, Resave, "wrong_before"),
        (prune_in_place, Prune, "wrong_before"),
        (no_folder_fsync, Prune, "lost_after"),
    ],
)
def test_planted(bug: Any, writer: type[Save], what: str) -> None:
    with planted(bug):
        result: Result = campaign(writer, parts=1)
    print(f"\n{bug.__name__}: {result.row()}")
    assert getattr(result, what) > 0, result.row()
