"""Power cuts of both nodes at once: they resume from the same step, whole, and what was decided is finished."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("torch.distributed.checkpoint")

from ckptstore.saves import node_sets, steps
from ckptstore.torch import nodes, resuming
from tests import powercut
from tests import warm as warm  # the other rank has torch imported
from tests.powercut_both import KINDS, Order, Word, both_campaign
from tests.powercut_nodes import PREPARED
from tests.powercut_writers import NEW, NOTHING, OLD
from tests.test_powercut import no_folder_fsync, planted
from tests.test_powercut_nodes import no_fsync_of_files, no_fsync_of_the_mark

pytestmark = powercut.MARKS

SAVED = {
    f"{NOTHING} beside {NOTHING}": OLD,
    f"{PREPARED} beside {NOTHING}": OLD,
    f"{NOTHING} beside {PREPARED}": OLD,
    f"{PREPARED} beside {PREPARED}": OLD,
    f"{NEW} beside {PREPARED}": NEW,
    f"{NEW} beside {NEW}": NEW,
}  #: what the disks hold at one moment of a save, and what comes of it


def test_which_cuts_are_of_one_moment() -> None:
    """Told at 5 of one disk and heard at 3 of the other, and the answer told at 4 and heard at 7."""
    order = Order([[Word("a", True, 5), Word("b", False, 7)], [Word("a", False, 3), Word("b", True, 4)]])
    for cuts in ((0, 0), (4, 3), (5, 3), (5, 9), (7, 0), (7, 3), (8, 4), (9, 9)):
        assert order.can_be(cuts), cuts
    for cuts in ((4, 4), (0, 9), (8, 3), (9, 0)):
        assert not order.can_be(cuts), cuts


def test_two_nodes_and_a_power_cut() -> None:
    """The short form: prefixes of what was written and what was flushed, one of each pair of what the disks hold."""
    result = both_campaign("save-over", parts=0, each=1)
    assert result.bad == 0, result.examples
    assert set(result.whole) == {f"{here}: {verdict}" for here, verdict in SAVED.items()}


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_no_bad_pair(kind: str) -> None:
    result = both_campaign(kind, parts=3)
    print(f"\n{result.row()} {dict(result.whole)}")
    assert result.bad == 0, result.examples
    assert result.resumed == result.contents
    assert len(result.whole) >= 2


# --- planted bugs: each must be caught ------------------------------------------------------------------------------


def not_waiting_for(patch: pytest.MonkeyPatch, ignored: str) -> None:
    """The coordinator does not wait until all say this word."""
    await_all = nodes._await

    def hasty(channel: nodes.Channel, word: str, *more: Any) -> None:
        if word != ignored:
            await_all(channel, word, *more)

    patch.setattr(nodes, "_await", hasty)


def published_before_all_are_prepared(patch: pytest.MonkeyPatch) -> None:
    not_waiting_for(patch, "prepared")


def published_before_it_is_told(patch: pytest.MonkeyPatch) -> None:
    """By a node that is prepared, and has not heard that the coordinator has published."""
    wait = nodes._wait
    patch.setattr(nodes, "_wait", lambda channel, key, *more: None if key == "commit" else wait(channel, key, *more))


def settled_before_all_have_it(patch: pytest.MonkeyPatch) -> None:
    """The old one goes while another node has not published."""
    not_waiting_for(patch, "committed")


def old_one_not_kept(patch: pytest.MonkeyPatch) -> None:
    publish = steps.publish
    patch.setattr(steps, "publish", lambda draft, manifest, **options: publish(draft, manifest))


def resume_settles_first(patch: pytest.MonkeyPatch) -> None:
    """As before, by `resume_step`."""
    finish = resuming._finish

    def hasty(store: Any, group: Any, ranks: Any, cut: Any) -> None:
        for save in cut:
            if (there := ranks[0].held.get(save.step)) and there[1] is not None:
                node_sets.settle(store.folder, save.step, there[1])
        finish(store, group, ranks, cut)

    patch.setattr(resuming, "_finish", hasty)


def test_planted_published_before_all_are_prepared() -> None:
    with planted(published_before_all_are_prepared):
        result = both_campaign("save", parts=0, each=1)
    assert result.wrong > 0, result.row()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("bug", "rank", "kind", "seen"),
    [
        (published_before_all_are_prepared, 0, "save", "wrong"),
        (published_before_all_are_prepared, 0, "save-over", "wrong"),
        (published_before_it_is_told, 1, "save", "wrong"),
        (published_before_it_is_told, 1, "save-over", "wrong"),
        (settled_before_all_have_it, 0, "save-over-eager", "wrong"),
        (old_one_not_kept, 0, "save-over", "wrong"),
        (no_fsync_of_the_mark, 0, "save", "wrong"),
        (no_fsync_of_the_mark, 1, "save", "wrong"),
        (no_fsync_of_the_mark, 1, "save-over", "wrong"),
        (no_fsync_of_files, 1, "save", "wrong"),
        (no_folder_fsync, 0, "save", "broken"),
        (no_folder_fsync, 1, "save", "wrong"),
        (resume_settles_first, 0, "resume-over-eager", "wrong"),
        (no_folder_fsync, 1, "resume-over", "wrong"),
    ],
)
def test_planted(bug: Any, rank: int, kind: str, seen: str) -> None:
    with planted(bug):
        result = both_campaign(kind, parts=0, rank=rank, until=seen)
    print(
        f"\n{bug.__name__} on node {rank}: {result.row()} {dict(result.whole)}\n{result.examples[:2]} … {result.examples[-1:]}"
    )
    assert getattr(result, seen) > 0, result.row()
