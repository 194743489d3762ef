"""The slot beside a copy of the same save: the copy's digests tell what became of the slot's bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptstore import adopt, native
from ckptstore import side as side_folders
from ckptstore.backends import open_backend
from ckptstore.cli.progress import Progress
from ckptstore.errors import AlreadyExistsError
from ckptstore.ledger import Writer
from ckptstore.listing import scan
from ckptstore.lock import RunLock
from ckptstore.model import Status
from ckptstore.transfer.mirror import mirror
from tests import commands, trees
from tests.crashing import content, without_manifest

OLD = ("--areal-version", "0.3.4", "--world-size", "2")
WEIGHTS = "model.safetensors"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The slot of step 150 is adopted, and the trainer has ended."""
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.delenv("CKPTSTORE_URL", raising=False)
    path = trees.make_run(tmp_path, steps=[46], slot="era_a", slot_step=150, recover_info=150)
    trees.set_age(path, 3600)
    trees.write_recover_info(path, 150, world_size=2)
    trees.set_age(path / "recover_info", 3600)
    trees.set_age(tmp_path / "logs", 3600)
    adopt.adopt(open_backend(path))
    return path


def slot_of(run: Path) -> Path:
    return run / "default/recover_checkpoint"


def save_again(path: Path) -> None:
    """The trainer's next save of the same step: other bytes, and another time."""
    was = path.stat()
    trees.bitflip(path)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns - 10**10))


def kept(run: Path) -> Path:
    return run.parent / ".ckptstore/trial0/adopted/globalstep150"


def test_a_rotten_slot_gives_way_to_its_copy(run: Path, capfd) -> None:
    """`verify` finds it, `list` remembers it, `setup` puts the copy in."""
    good = content(slot_of(run))
    whole = commands.invoke(capfd, "verify", "--slot", "--run", run, "--json")
    assert (whole.code, whole.json["reports"][0]["status"]) == (0, "COMPLETE")
    assert f"its copy, {kept(run)}/default" in str(whole.json["reports"][0]["notes"])
    words = ("setup", "--run", run, *OLD, "--json")
    done = commands.invoke(capfd, *words).json
    assert done["nothing_to_do"] == "the slot already holds step 150, every digest verified"
    trees.bitflip(slot_of(run) / WEIGHTS)
    would = commands.invoke(capfd, *words, "--dry-run").json
    assert (would["checkpoint"]["kind"], would["checkpoint"]["step"]) == ("adopted", 150)
    assert [(one["step"], one["status"]) for one in would["skipped"]] == [(150, "CORRUPT")]
    found = commands.invoke(capfd, "verify", "--slot", "--run", run)
    assert found.code == 3
    assert f"digest differs from its copy's, {kept(run)}/default" in commands.flat(found.out)
    listed = commands.invoke(capfd, "list", "--run", run)
    assert "CORRUPT" in listed.out
    assert commands.invoke(capfd, "list", "--recover-info", "--run", run, "--json").json["slot"]["status"] == "CORRUPT"
    with pytest.raises(AlreadyExistsError, match="adopted already"):  # a watch has nothing to do, and says nothing
        adopt.adopt(open_backend(run))
    done = commands.invoke(capfd, *words)
    assert (done.code, done.json["done"]) == (0, True), done.err
    assert without_manifest(content(slot_of(run))) == good
    slot = scan(open_backend(run)).slot
    assert slot is not None
    assert (slot.status, slot.step) == (Status.COMMITTED, 150)


@pytest.mark.parametrize("words", [("setup",), ("resume", "--yes", "--script", "train.py")])
def test_the_slot_is_read_once(run: Path, capfd, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    """It may be tens of gigabytes: the plan, and what carries it out under the lock, read it once; where it changed, again."""
    read = []
    digest_files, locked = native.digest_files, RunLock.__enter__
    monkeypatch.setattr(native, "digest_files", lambda *given, **options: (read.append(1), digest_files(*given, **options))[1])
    assert commands.invoke(capfd, *words, "--run", run, *OLD, "--json").code == 0
    assert len(read) == 1

    def meanwhile(lock: RunLock) -> RunLock:
        save_again(slot_of(run) / WEIGHTS)
        return locked(lock)

    monkeypatch.setattr(RunLock, "__enter__", meanwhile)
    done = commands.invoke(capfd, *words, "--run", run, *OLD, "--json").json
    assert done["nothing_to_do"] == "the slot already holds step 150, as the trainer saved it"


def test_the_reading_is_shown_and_a_plot_does_without(run: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of gigabytes are not read in silence, and not at all for a picture."""
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Progress, "notify", lambda self, *words: told.append(words))
    assert commands.invoke(capfd, "setup", "--run", run, *OLD, "--dry-run").code == 0
    size = sum(path.stat().st_size for path in slot_of(run).iterdir())
    assert told[-1] == ("verifying step 150 in the slot", size, size)
    writer = Writer(str(run.parent / ".ckptstore/trial0/metrics.jsonl"))
    writer.record(150, 0.0, {"grpo_actor/task_reward/avg": 0.7})
    writer.close()
    monkeypatch.setattr(native, "digest_files", lambda *given, **options: pytest.fail("the slot is read"))
    shown = commands.invoke(capfd, "plot", "--run", run)
    assert "would resume from step 150" in shown.out + shown.err, shown
    assert "digests match" not in shown.out


def test_a_torn_slot_is_seen_without_reading(run: Path, capfd) -> None:
    """Another size at the same time; no weights are read for that."""
    path = slot_of(run) / "tokenizer.json"
    was = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    slot = scan(open_backend(run)).slot
    assert slot is not None
    assert slot.status is Status.CORRUPT
    assert "not as long as the manifest says" in str(slot.findings)


def test_the_same_step_saved_again_is_no_damage(run: Path, capfd) -> None:
    """After a rollback: the copy is of the earlier save, whatever differs from it."""
    save_again(slot_of(run) / WEIGHTS)
    verified = commands.invoke(capfd, "verify", "--slot", "--run", run, "--json")
    assert (verified.code, verified.json["reports"][0]["status"]) == (0, "COMPLETE")
    done = commands.invoke(capfd, "setup", "--run", run, *OLD, "--json").json
    assert done["nothing_to_do"] == "the slot already holds step 150, as the trainer saved it"


def test_what_was_remembered_is_forgotten_with_the_next_save(run: Path, capfd) -> None:
    trees.bitflip(slot_of(run) / WEIGHTS)
    assert commands.invoke(capfd, "verify", "--slot", "--run", run).code == 3
    save_again(slot_of(run) / WEIGHTS)
    slot = scan(open_backend(run)).slot
    assert slot is not None
    assert slot.status is Status.COMPLETE


def test_what_was_remembered_is_forgotten_when_it_is_right_again(run: Path, capfd) -> None:
    trees.bitflip(slot_of(run) / WEIGHTS)
    assert commands.invoke(capfd, "verify", "--slot", "--run", run).code == 3
    assert commands.invoke(capfd, "verify", "--slot", "--run", run).code == 3
    trees.bitflip(slot_of(run) / WEIGHTS)
    again = commands.invoke(capfd, "verify", "--slot", "--run", run, "--json")
    assert (again.code, again.json["reports"][0]["status"]) == (0, "COMPLETE")
    assert commands.invoke(capfd, "list", "--recover-info", "--run", run, "--json").json["slot"]["status"] == "COMPLETE"


def test_an_adopted_step_is_shown_and_verified(run: Path, s3: str, capfd) -> None:
    """`list` shows it, and says `ckptstore verify 150`."""
    listed = commands.invoke(capfd, "list", "--run", run).out
    assert "ckptstore verify 150" in listed
    mirror(open_backend(run), s3)
    for where in (run, s3):
        done = commands.invoke(capfd, "verify", "150", "--run", where, "--json")
        assert (done.code, [one["kind"] for one in done.json["reports"]]) == (0, ["adopted"]), done.err
        whole = commands.invoke(capfd, "verify", "--run", where, "--json").json
        assert [(one["step"], one["kind"]) for one in whole["reports"]] == [(46, "export"), (150, "adopted")]
        shown = commands.invoke(capfd, "show", "150", "--run", where, "--json")
        assert shown.json["parts"][0]["manifest_sha256"], shown.err
        assert shown.json["kind"] == "adopted"
    assert "adopted, step 150" in commands.invoke(capfd, "verify", "150", "--run", run).out
    for words in (("push", "150", "--to", s3), ("seal", "150")):
        refused = commands.invoke(capfd, *words, "--run", run)
        assert refused.code == 1
        assert "it is a slot that was adopted" in refused.err
    trees.bitflip(kept(run) / "default" / WEIGHTS)
    assert commands.invoke(capfd, "verify", "--run", run).code == 3


def test_a_copy_in_a_bucket_vouches_too(run: Path, s3: str, capfd) -> None:
    """A pod that starts again with --from: what the slot holds is not fetched, unless it is damaged."""
    mirror(open_backend(run), s3)
    side_folders.remove_tree(str(kept(run)))
    words = ("setup", "--run", run, "--from", s3, *OLD, "--json")
    good = content(slot_of(run))
    done = commands.invoke(capfd, *words).json
    assert done["copied_bytes"] == 0
    assert content(slot_of(run)) == good
    trees.bitflip(slot_of(run) / WEIGHTS)
    done = commands.invoke(capfd, *words).json
    assert done["copied_bytes"] > 0
    assert without_manifest(content(slot_of(run))) == good
