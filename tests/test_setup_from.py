"""setup --from URL: from a bucket straight into the slot, on the machine that trained and on one that lost its disk."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from ckptstore import listing, staging
from ckptstore.backends import open_backend
from ckptstore.backends.fsspec import FsspecBackend
from ckptstore.choose import Selection
from ckptstore.errors import StorageError
from ckptstore.listing import scan
from ckptstore.model import MANIFEST_NAME, Level, Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer.mirror import mirror
from ckptstore.transfer.push import push
from ckptstore.two_places import choice
from ckptstore.verify import verify
from tests import commands, servers, trees
from tests.test_push_pull import flip
from tests.test_remote_looking import upload

OLD = ("--areal-version", "0.3.4", "--world-size", "2")  #: reads exports as they are, with optimizer shards beside them
NEW = ("--areal-version", "1.0.4")  #: reads DCP, which is made of an export
WEIGHTS = "model.safetensors"


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else f"memory://setup-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
def run(tmp_path, monkeypatch, url):
    """A run of three checkpoints that are all pushed; the machine that trained it has only the first left."""
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.delenv("CKPTSTORE_URL", raising=False)
    path = trees.make_run(tmp_path, steps=(46, 93, 140), slot="era_a", slot_step=46, recover_info=46)
    trees.set_age(tmp_path / "logs", 3600)
    for checkpoint in CheckpointStore(path).list():
        push(open_backend(path), checkpoint, open_backend(url))
    shutil.copytree(path, tmp_path / "kept")
    for step in (93, 140):
        shutil.rmtree(trees.checkpoint(path, step))
    return path


def yaml_of(run: Path) -> Path:
    return run.parents[3] / "logs/alice/gsm8k-grpo/trial0/config.yaml"


def slot_of(run: Path) -> Path:
    return run / "default/recover_checkpoint"


def test_dry_run(run, url, capfd):
    before = sorted(run.rglob("*"))
    done = commands.invoke(capfd, "setup", "--run", run, "--from", url, "--dry-run", "--json", *OLD)
    assert done.code == 0, done.out
    assert done.json["checkpoint"]["step"] == 140
    assert done.json["checkpoint"]["parts"][0]["path"] == f"{url}/default/{trees.folder_name(140)}"
    assert sorted(run.rglob("*")) == before
    text = commands.invoke(capfd, "setup", "--run", run, "--from", url, "--dry-run", *OLD).out
    assert url in text


@pytest.mark.parametrize("words", [OLD, NEW, ("--as-is",)], ids=["era-a", "dcp", "as-is"])
def test_into_the_slot(run, url, capfd, tmp_path, words):
    """Every way in: copied, converted, as it is. The slot is whole and COMMITTED, and nothing is left of the way."""
    done = commands.invoke(capfd, "setup", "--run", run, "--from", url, "--json", *words)
    assert done.code == 0, done.out
    assert (done.json["done"], done.json["checkpoint"]["step"]) == (True, 140)
    assert done.json["strategies"]["fetched"] == done.json["checkpoint"]["bytes"]
    found = CheckpointStore(run).scan()
    assert found.slot is not None
    assert (found.slot.step, found.slot.status) == (140, Status.COMMITTED)
    assert verify(open_backend(run), found.slot, Level.FULL).ok
    if words != NEW:
        source = trees.checkpoint(tmp_path / "kept", 140)
        assert (slot_of(run) / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
        assert (slot_of(run) / WEIGHTS).stat().st_mtime_ns == (source / WEIGHTS).stat().st_mtime_ns
    if words != ("--as-is",):
        assert found.recover_info is not None
        assert found.recover_info.step == 140
    side = run.parent / ".ckptstore/trial0"
    assert sorted(name for name in os.listdir(side) if not name.startswith("old-")) in ([], ["lock"])
    assert [checkpoint.step for checkpoint in found.checkpoints] == [46]


def test_the_same_as_from_the_disk(run, url, capfd, tmp_path):
    """File by file what setup makes of a local checkpoint."""
    other = tmp_path / "other/checkpoints/alice/gsm8k-grpo/trial0"
    shutil.copytree(tmp_path / "kept", other)
    for words in (("--run", run, "--from", url), ("--run", other)):
        assert commands.invoke(capfd, "setup", "--step", 93, *words, *NEW).code == 0
    names = sorted(path.name for path in slot_of(other).iterdir())
    assert sorted(path.name for path in slot_of(run).iterdir()) == names
    for name in names:
        if name != MANIFEST_NAME:
            assert (slot_of(run) / name).read_bytes() == (slot_of(other) / name).read_bytes(), name


def test_bounds_and_undo(run, url, capfd):
    done = commands.invoke(capfd, "setup", "--run", run, "--from", url, "--before-step", 140, "--json", *OLD)
    assert done.json["checkpoint"]["step"] == 93
    assert commands.invoke(capfd, "setup", "--run", run, "--undo").code == 0
    info = CheckpointStore(run).scan().recover_info
    assert info is not None
    assert info.step == 46


def test_damage_there_takes_the_next(run, url, capfd):
    """One that is wrong in the store is found while it is fetched; the one before it is taken, and it is said."""
    backend = open_backend(url)
    key = f"default/{trees.folder_name(140)}/{WEIGHTS}"
    data = bytearray(backend.get(key))
    data[-1] ^= 1
    backend.put(key, data)
    backend.put(m := f"default/{trees.folder_name(140)}/{MANIFEST_NAME}", backend.get(m))
    done = commands.invoke(capfd, "setup", "--run", run, "--from", url, "--json", *OLD)
    assert done.code == 0, done.out
    assert done.json["checkpoint"]["step"] == 93
    assert [skipped["step"] for skipped in done.json["skipped"]] == [140]


def test_an_outage_takes_no_other(run, capfd, monkeypatch, tmp_path):
    """A store that does not answer says nothing of a checkpoint."""
    url = f"memory://outage-{tmp_path.name}-{os.getpid()}"
    upload(tmp_path / "kept", open_backend(url))
    before = {path: path.stat() for path in slot_of(run).iterdir()}
    real = FsspecBackend.view

    def broken(self, key, offset_bytes, length_bytes):
        if "globalstep140" in key:
            raise StorageError("planted outage", operation="reading", path=f"{self.location}/{key}")
        return real(self, key, offset_bytes, length_bytes)

    monkeypatch.setattr(FsspecBackend, "view", broken)
    done = commands.invoke(capfd, "setup", "--run", run, "--from", url, *OLD)
    assert done.code == 1
    assert "planted outage" in done.err
    assert {path: path.stat() for path in slot_of(run).iterdir()} == before


def test_an_interrupted_one_goes_on(run, url, capfd, monkeypatch):
    """What was fetched is kept."""
    with monkeypatch.context() as planted:
        planted.setattr(staging, "_describe", interrupted)
        assert commands.invoke(capfd, "setup", "--run", run, "--from", url, *OLD).code == 130
    done = commands.invoke(capfd, "setup", "--run", run, "--from", url, "--json", *OLD)
    assert done.code == 0, done.out
    assert done.json["reused_bytes"] == done.json["checkpoint"]["bytes"]
    assert done.json["strategies"]["fetched"] == 0


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


def test_nothing_to_do_the_second_time(run, url, capfd):
    for expected in (True, False):
        done = commands.invoke(capfd, "setup", "--run", run, "--from", url, "--json", *OLD)
        assert done.code == 0, done.out
        if expected:
            assert done.json["done"]
    assert CheckpointStore(run).scan().slot.step == 140


def test_read_back(run, url, capfd, monkeypatch):
    """A disk that gives back other bytes than were written."""
    real = staging.fill

    def fill(source, part, manifest, target, *, progress):
        filled = real(source, part, manifest, target, progress=progress)
        flip(Path(target) / WEIGHTS, 100)
        return filled

    monkeypatch.setattr(staging, "fill", fill)
    done = commands.invoke(capfd, "setup", "--run", run, "--from", url, "--verify-after-write", *OLD)
    assert done.code == 1
    assert "disk gives back" in done.err or "bytes from" in done.err
    assert CheckpointStore(run).scan().slot.step != 140


# --- a machine that lost its disk ----------------------------------------------------------------------------------


def test_a_new_machine(run, url, capfd, tmp_path):
    """The run's folder is made; the slot and recover_info are there, and AReaL would go on after the step."""
    fileroot = tmp_path / "fresh"
    fileroot.mkdir()
    words = ("--fileroot", fileroot, "-e", "gsm8k-grpo", "-t", "trial0", "--user", "alice", "--from", url)
    would = commands.invoke(capfd, "setup", *words, "--dry-run", *OLD)
    assert would.code == 1
    assert "is made and filled" in would.err
    assert list(fileroot.iterdir()) == []
    done = commands.invoke(capfd, "setup", *words, "--config", yaml_of(run), "--json", *OLD)
    assert done.code == 0, done.out
    found = CheckpointStore(fileroot / "checkpoints/alice/gsm8k-grpo/trial0").scan()
    assert found.slot is not None
    assert (found.slot.step, found.slot.status) == (140, Status.COMMITTED)
    assert found.recover_info is not None
    assert (found.recover_info.step, found.recover_info.problems) == (140, ())


def test_the_variable_counts_where_the_run_is_not_here(run, url, capfd, tmp_path, monkeypatch):
    """And only there: a run that is here is meant itself."""
    monkeypatch.setenv("CKPTSTORE_URL", url)
    here = commands.invoke(capfd, "setup", "--run", run, "--dry-run", "--json", *OLD)
    assert here.json["checkpoint"]["step"] == 46
    assert f"--from {url} takes" in here.err  # the bucket may have newer ones by another machine
    there = tmp_path / "fresh/checkpoints/alice/gsm8k-grpo/trial0"
    words = ("--run", there, "--yes", "--json", "--script", "train.py", "--config", yaml_of(run), *OLD)
    done = commands.invoke(capfd, "resume", *words, f"cluster.fileroot={tmp_path / 'fresh'}")
    assert done.code == 0, done.out
    assert done.json["checkpoint"]["step"] == 140
    assert "CKPTSTORE_URL" in done.err
    assert "train.py" in done.json["command"]


def test_from_does_not_go_back_behind_what_is_here(run, url, capfd, tmp_path):
    """A disk that came back holds what was never pushed; whoever names the URL's step, or bounds it, gets that."""
    shutil.copytree(trees.checkpoint(tmp_path / "kept", 140), here := run / "default" / trees.folder_name(187))
    trees.set_age(run, 600)
    words = ("setup", "--run", run, "--from", url, "--dry-run", "--json", *OLD)
    done = commands.invoke(capfd, *words)
    assert (done.json["checkpoint"]["step"], done.json["checkpoint"]["parts"][0]["path"]) == (187, str(here))
    assert f"newer than step 140, the newest good one in {url}" in done.json["why"]
    shown = commands.flat(commands.invoke(capfd, "setup", "--run", run, "--from", url, "--dry-run", *OLD).out)
    assert "newer than step 140" in shown
    assert "--step 140 takes that one" in shown
    for bound in (("--max-step", 140), ("--step", 140)):
        named = commands.invoke(capfd, *words, *bound).json
        assert (named["checkpoint"]["step"], named["checkpoint"]["parts"][0]["path"][:8]) == (140, url[:8])
    trees.truncate(here / WEIGHTS)
    damaged = commands.invoke(capfd, *words).json
    assert damaged["checkpoint"]["step"] == 140
    assert "what is newer here does not count" in str(damaged["notes"])
    assert "step 187" in str(damaged["notes"])


def test_a_higher_step_of_a_history_that_was_left_stays_behind(run, url, capfd, tmp_path):
    """Step 187 is here since before somebody went back to 93, and trained and pushed the present 140."""
    shutil.copytree(trees.checkpoint(tmp_path / "kept", 140), run / "default" / trees.folder_name(187))
    trees.set_age(run / "default" / trees.folder_name(187), 90_000)
    done = commands.invoke(capfd, "setup", "--run", run, "--from", url, "--dry-run", "--json", *OLD).json
    assert done["checkpoint"]["step"] == 140
    assert "step 187 is here, and was saved before" in str(done["notes"])


def test_weights_there_do_not_replace_optimizer_state_here(run, url, capfd):
    """By the rule of one place: state is worth 20 steps. The bucket's export of step 140 is weights alone."""
    words = ("setup", "--run", run, "--from", url, "--dry-run", "--json", *OLD)
    for step, chosen in ((119, 140), (120, 140), (121, 121), (140, 140)):
        trees.write_recover_info(run, step, world_size=2)
        trees.set_age(run, 600)
        done = commands.invoke(capfd, *words).json
        assert done["checkpoint"]["step"] == chosen, step
        assert ("its optimizer state is worth more" in done["why"]) == (step > 120), done["why"]
    assert commands.invoke(capfd, *words, "--prefer", "newest").json["checkpoint"]["kind"] == "export"


@pytest.mark.parametrize("there", ["older", "nothing", "half"])
def test_a_pod_that_starts_again_keeps_what_it_saved(run, url, capfd, tmp_path, monkeypatch, there):
    """The slot of step 150 was never pushed: the pod's start command, with --from and nobody to ask, goes on after it."""
    monkeypatch.setattr("ckptstore.fresh._FLEETING", frozenset())
    trees.write_recover_info(run, 150, world_size=2)
    trees.set_age(run, 600)
    slot = {path.name: path.read_bytes() for path in slot_of(run).iterdir()}
    source = url if there == "older" else f"{url}-other"
    if there == "half":
        target = open_backend(source)
        for name in ("config.json", "tokenizer.json"):
            target.put(f"default/{trees.folder_name(140)}/{name}", b"{}")
    words = ("resume", "--config", yaml_of(run), "--run", run, "--from", source, "--exec", *OLD)
    trainer = (sys.executable, "-c", "print('Train step 152', flush=True)")
    for asked in ("--yes", "--or-start"):
        ran = commands.invoke(capfd, *words, asked, f"cluster.fileroot={tmp_path}", "--", *trainer)
        assert ran.code == 0, ran.err
        assert "Train step 152" in ran.out
        assert "resumed at global step 151" in ran.err
        assert {path.name: path.read_bytes() for path in slot_of(run).iterdir()} == slot
    if there != "older" and source.startswith("s3"):
        gone = commands.invoke(capfd, "setup", "--run", run, "--from", "s3://no-such-bucket/x", *OLD)
        assert (gone.code, "no such bucket" in gone.err) == (1, True)


def test_a_folder_made_in_a_console_is_a_url_that_nothing_was_pushed_to(tmp_path, s3):
    servers.make_folder(f"{s3}-new")
    run = open_backend(trees.make_run(tmp_path, steps=[46]))
    taken = choice(run, scan(run), Selection(url=f"{s3}-new"), None)
    assert (taken.point.checkpoint.step, taken.notes[0][:23]) == (46, "taken from this machine")


def test_whoever_goes_back_is_told_of_the_mirror(run, url, capfd, tmp_path):
    """Steps 93 and 140 are there, of the time that is left: trained anew they are refused; the old ones would be resumed."""
    words = ("setup", "--run", run, "--dry-run", "--json", *OLD)
    text = f"{url} holds steps up to 140"
    assert text not in str(commands.invoke(capfd, *words, "--from", url).json["notes"])
    back = commands.invoke(capfd, *words, "--from", url, "--before-step", 93)
    assert back.json["checkpoint"]["step"] == 46
    assert text in str(back.json["notes"])
    assert text not in str(commands.invoke(capfd, *words).json["notes"])  # not mirrored by this machine
    for step in (93, 140):
        shutil.copytree(trees.checkpoint(tmp_path / "kept", step), run / "default" / trees.folder_name(step))
    trees.set_age(run, 3600)
    mirror(open_backend(run), url)
    assert text not in str(commands.invoke(capfd, *words).json["notes"])
    assert text in str(commands.invoke(capfd, *words, "--before-step", 93).json["notes"])
    assert text not in str(commands.invoke(capfd, *words, "--before-step", 93, "--new-trial", "trial1").json["notes"])
    (record,) = run.parent.rglob("mirror.json")
    record.write_text("{")
    torn = commands.invoke(capfd, *words)
    assert torn.code == 0
    assert "mirror.json is damaged" in str(torn.json["notes"])


def test_a_new_box_is_told_what_to_say(url, run, capfd, tmp_path, monkeypatch):
    """The README's command without the run's names: which run shall it be?"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CKPTSTORE_FILEROOT", raising=False)
    done = commands.invoke(capfd, "setup", "--from", url)
    assert done.code == 1
    assert "--config run.yaml" in done.err
    assert f"filled from {url}" in " ".join(done.err.split())


def test_a_url_a_folder_too_high_or_too_low(run, url, capfd):
    """It holds something, so nothing starts fresh; and the run's own URL is named."""
    push(open_backend(run), CheckpointStore(run).get(46), open_backend(f"{url}/other/trial1"))
    assert "\n\n\n" not in commands.invoke(capfd, "list", "--run", url).out
    for said, meant in ((f"{url}/other", f"{url}/other/trial1"), (f"{url}/default", url)):
        done = commands.invoke(capfd, "setup", "--run", run, "--from", said, "--dry-run", *OLD)
        assert done.code == 4
        assert f"a run lies at {meant}" in " ".join(done.err.split())
        listed = commands.invoke(capfd, "list", "--run", said)
        assert f"a run lies at {meant}" in " ".join(listed.err.split())


def test_the_variable_still_counts_after_a_setup_that_failed(run, url, capfd, tmp_path, monkeypatch):
    """It had made the run's folder: the same command, in a pod's loop, must not end with "nothing has been saved"."""
    monkeypatch.setenv("CKPTSTORE_URL", url)
    there = tmp_path / "fresh/checkpoints/alice/gsm8k-grpo/trial0"
    words = ("--run", there, "--json", "--config", yaml_of(run), *OLD)
    assert commands.invoke(capfd, "setup", *words, "--before-step", "10").code == 4
    assert there.is_dir()
    would = commands.invoke(capfd, "setup", *words, "--dry-run")
    assert (would.code, would.json["checkpoint"]["step"]) == (0, 140)
    assert commands.invoke(capfd, "setup", *words).json["checkpoint"]["step"] == 140


@pytest.mark.parametrize("how", ["--from", "variable"])
def test_nothing_starts_fresh_while_the_bucket_has_the_run(run, url, capfd, tmp_path, monkeypatch, how):
    """A new box, and --or-start: the URL is a place that was named, too."""
    monkeypatch.setattr("ckptstore.fresh._FLEETING", frozenset())  # where the tests' folder lies
    # It would become the training, and end the tests with its code.
    monkeypatch.setattr("ckptstore.cli.resume._execute", lambda cmd: pytest.fail("started fresh"))
    fileroot = tmp_path / "fresh"
    if how == "variable":
        monkeypatch.setenv("CKPTSTORE_URL", url)
    source = ("--from", url) if how == "--from" else ()
    words = ("--exec", "--or-start", "--config", yaml_of(run), f"cluster.fileroot={fileroot}", *source, *OLD)
    ran = commands.invoke(capfd, "resume", *words, "--", "echo", "started")
    assert "starting fresh" not in ran.out
    assert ran.code == 0, ran.err
    found = CheckpointStore(fileroot / "checkpoints/alice/gsm8k-grpo/trial0").scan()
    assert found.slot is not None
    assert found.slot.step == 140


def test_fresh_only_where_the_bucket_could_be_read(run, url, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("ckptstore.fresh._FLEETING", frozenset())
    started = []
    monkeypatch.setattr("ckptstore.cli.resume._execute", lambda cmd: started.append(cmd.words) or sys.exit(0))
    words = ("--exec", "--or-start", "--config", yaml_of(run), f"cluster.fileroot={tmp_path / 'fresh'}", *OLD)
    with pytest.raises(SystemExit):
        commands.invoke(capfd, "resume", *words, "--from", f"{url}-empty", "--", "echo", "started")
    assert started == [("echo", "started")]
    if url.startswith("s3://"):
        for other in ("s3://no-such-bucket/runs/x", url):
            if other == url:
                monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
            assert commands.invoke(capfd, "resume", *words, "--from", other, "--", "echo", "started").code == 1
        assert len(started) == 1


def test_a_run_that_others_uploaded(run, capfd, tmp_path):
    """No manifests, recover_info and all: its recover_info is used where it is the step's."""
    url = f"memory://others-{tmp_path.name}-{os.getpid()}"
    source = tmp_path / "kept"
    upload(source, open_backend(url))
    there = tmp_path / "fresh/checkpoints/alice/gsm8k-grpo/trial0"
    words = ("setup", "--run", there, "--from", url, "--step", 46, "--json", *OLD)
    blind = commands.invoke(capfd, *words)
    assert blind.code == 1
    assert "nothing tells the learning rate" in blind.json["error"]
    done = commands.invoke(capfd, *words, "--config", yaml_of(run))
    assert done.code == 0, done.out
    for name in ("step_info.json", "saver_info.json"):
        assert (there / "recover_info" / name).read_bytes() == (source / "recover_info" / name).read_bytes()
    assert listing.scan(open_backend(there)).slot.step == 46


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--from", "/tmp/x"), "is no URL"),
        (("--from", "s3://a:hush@b/x"), "credentials"),
        (("--from", "memory://x", "--checkpoint-path", "/tmp"), "without --from"),
    ],
)
def test_usage(words, text, run, capfd):
    done = commands.invoke(capfd, "setup", "--run", run, *words)
    assert done.code == 2
    assert text in done.err
    assert "hush" not in done.err
