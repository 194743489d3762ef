"""Power cuts on one of two nodes that save together: both resume from the same step, and what was decided is finished."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("torch.distributed.checkpoint")

from ckptstore import side as side_folders
from ckptstore.saves import steps
from ckptstore.torch import nodes
from tests import powercut
from tests import warm as warm  # the other rank has torch imported
from tests.powercut_nodes import KINDS, PREPARED, node_campaign
from tests.powercut_writers import NEW, NOTHING
from tests.test_powercut import no_folder_fsync, not_durable, planted

pytestmark = powercut.MARKS


def test_a_node_and_power_cuts() -> None:
    """The short form: the prefixes of what was written, and what was flushed."""
    result, shown = node_campaign("node", parts=0)
    assert result.bad == 0, result.examples
    assert {NOTHING, PREPARED, NEW} == set(shown), shown


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_no_bad_state(kind: str) -> None:
    result, shown = node_campaign(kind, parts=3)
    print(f"\n{result.row()} {dict(shown)}")
    assert result.bad == 0, result.examples
    assert shown[PREPARED] > 0
    assert shown[NEW] > 0


# --- planted bugs: each must be caught ------------------------------------------------------------------------------


def no_fsync_of_files(patch: pytest.MonkeyPatch) -> None:
    not_durable(patch, "write_files")


def no_fsync_of_the_mark(patch: pytest.MonkeyPatch) -> None:
    """Of the manifest, which says that a draft is prepared."""

    def write(path: str, data: bytes) -> None:
        Path(path).write_bytes(data)
        os.chmod(path, 0o600)

    patch.setattr(side_folders, "write_durably", write)


def mark_after_the_word(patch: pytest.MonkeyPatch) -> None:
    """All is durable before the step is published, and the manifest is not when the node says that it is prepared."""
    write_manifest, publish = side_folders.write_manifest, steps.publish
    later: list[Any] = []

    def publish_later(draft: steps.Draft, manifest: Any, **options: Any) -> None:
        while later:
            args, kwargs = later.pop()
            write_manifest(*args, **kwargs)
        publish(draft, manifest, **options)

    patch.setattr(side_folders, "write_manifest", lambda *args, **kwargs: later.append((args, kwargs)))
    patch.setattr(steps, "publish", publish_later)


def commit_before_it_has_published(patch: pytest.MonkeyPatch) -> None:
    await_all = nodes._await

    def hasty(channel: nodes.Channel, word: str, *more: Any) -> None:
        await_all(channel, word, *more)
        if word == "prepared":
            channel.tell("commit", {})

    patch.setattr(nodes, "_await", hasty)


def test_planted_mark_after_the_word() -> None:
    with planted(mark_after_the_word):
        result, _ = node_campaign("node", parts=0, until_bad=True)
    assert result.wrong_after > 0, result.row()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("bug", "kind"),
    [
        (no_fsync_of_files, "node"),
        (no_fsync_of_files, "node-over"),
        (no_fsync_of_the_mark, "node"),
        (no_folder_fsync, "node"),
        (no_fsync_of_the_mark, "coordinator"),
        (no_folder_fsync, "coordinator"),
        (commit_before_it_has_published, "coordinator"),
        (commit_before_it_has_published, "coordinator-over"),
        (no_folder_fsync, "resume"),
        (no_folder_fsync, "resume-over"),
    ],
)
def test_planted(bug: Any, kind: str) -> None:
    with planted(bug):
        result, _ = node_campaign(kind, parts=1, until_bad=True)
    print(f"\n{bug.__name__}, {kind}: {result.examples}")
    assert result.bad > 0, result.row()
