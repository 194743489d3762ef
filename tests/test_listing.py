"""What `scan` makes of real, messy runs: every status has its evidence, and nothing that lies there makes it fail."""

from __future__ import annotations

import os
import stat

import pytest

from ckptstore.backends import LocalBackend
from ckptstore.errors import AccessError, NotFoundError
from ckptstore.listing import scan
from ckptstore.manifest import Manifest
from ckptstore.model import MANIFEST_NAME, Level, Status
from ckptstore.seal import seal
from ckptstore.side import side_folder
from ckptstore.verify import verify
from tests import trees
from tests.users import as_nobody, open_way_to

EXPORTS = (46, 93, 140, 187)


@pytest.fixture
def run(tmp_path):
    return trees.make_run(tmp_path, steps=EXPORTS)


def listed(trial):
    return scan(LocalBackend(trial))


def at(trial, step):
    (checkpoint,) = listed(trial).at_step(step)
    return checkpoint


def problems(checkpoint):
    return " | ".join(map(str, checkpoint.findings))


def notes(trial):
    return " | ".join(listed(trial).notes)


def seal_step(trial, step):
    backend = LocalBackend(trial)
    return seal(backend, scan(backend).at_step(step)[0])


def test_a_healthy_run(run):
    """Steps, epochs, content and sizes as they are; COMPLETE without a manifest; slot and recover_info apart."""
    trees.write_model(run / "default/recover_checkpoint")
    listing = listed(run)
    assert [checkpoint.step for checkpoint in listing.checkpoints] == list(EXPORTS)
    newest = listing.checkpoints[-1]
    assert (newest.epoch, newest.epoch_step, newest.log_step, newest.kind) == (3, 46, 188, "export")
    assert (newest.status, newest.format, newest.holds) == (Status.COMPLETE, "hf", ("weights", "tokenizer", "config"))
    folder = trees.checkpoint(run, 187)
    assert newest.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert newest.file_count == len(trees.MODEL_FILES)
    assert newest.saved_at_s == pytest.approx(max(path.stat().st_mtime for path in folder.iterdir()))
    assert listing.slot is not None
    assert not listing.notes


def test_a_missing_run_is_an_error_that_names_it(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        listed(tmp_path / "nowhere")


def test_an_empty_run(tmp_path):
    (tmp_path / "trial").mkdir()
    listing = listed(tmp_path / "trial")
    assert (listing.checkpoints, listing.slot, listing.recover_info, listing.newest_file) == ((), None, None, "")


# --- models -------------------------------------------------------------------------------------------------------


def test_sharded_whole_and_with_a_missing_shard(tmp_path):
    """A shard that the names themselves show to be missing is PARTIAL, and named."""
    run = trees.make_run(tmp_path, steps=(46, 93), sharded=True)
    assert at(run, 46).status is Status.COMPLETE
    assert at(run, 46).format == "hf-sharded"
    trees.remove_shard(trees.checkpoint(run, 93), 2)
    checkpoint = at(run, 93)
    assert checkpoint.status is Status.PARTIAL
    assert "model-00002-of-00003.safetensors: shard missing" in problems(checkpoint)


def test_sharded_without_its_index(tmp_path):
    """The index is written after the last shard: without it, the save did not end."""
    run = trees.make_run(tmp_path, steps=(46,), sharded=True)
    (trees.checkpoint(run, 46) / "model.safetensors.index.json").unlink()
    assert at(run, 46).status is Status.PARTIAL
    assert "index.json" in problems(at(run, 46))


def test_an_index_without_shards(tmp_path):
    run = trees.make_run(tmp_path, steps=(46,), sharded=True)
    for number in (1, 2, 3):
        trees.remove_shard(trees.checkpoint(run, 46), number)
    assert at(run, 46).status is Status.PARTIAL


def test_a_truncated_shard_is_found_by_structure_not_by_a_look(tmp_path):
    """`list` reads no weights: sizes alone cannot show it. Level structure must."""
    run = trees.make_run(tmp_path, steps=(46,), sharded=True)
    trees.truncate(trees.checkpoint(run, 46) / "model-00002-of-00003.safetensors", 10)
    checkpoint = at(run, 46)
    assert checkpoint.status is Status.COMPLETE
    report = verify(LocalBackend(run), checkpoint, Level.STRUCTURE)
    assert not report.ok
    assert "model-00002-of-00003.safetensors: truncated" in problems(report.checkpoint)


def test_bin_model(run):
    trees.write_bin_model(run / "default" / trees.folder_name(10))
    assert (at(run, 10).format, at(run, 10).status) == ("hf-bin", Status.COMPLETE)


def test_lora(run):
    folder = trees.write_lora(run / "default" / trees.folder_name(10))
    checkpoint = at(run, 10)
    assert checkpoint.format == "lora"
    assert "weights" in checkpoint.holds
    (folder / "adapter_model.safetensors").unlink()
    assert at(run, 10).status is Status.PARTIAL
    assert "adapter_model.safetensors: missing" in problems(at(run, 10))


def test_no_config(run):
    (trees.checkpoint(run, 187) / "config.json").unlink()
    assert at(run, 187).status is Status.PARTIAL
    assert "config.json" in problems(at(run, 187))


def test_tokenizer_missing_at_one_step_only(run):
    """It is written last: where the others have it, its absence shows a save that was cut short."""
    for path in trees.checkpoint(run, 187).iterdir():
        if path.name.startswith(("tokenizer", "vocab")):
            path.unlink()
    assert at(run, 187).status is Status.PARTIAL
    assert "tokenizer" in problems(at(run, 187))
    assert at(run, 140).status is Status.COMPLETE


def test_no_tokenizer_anywhere_is_no_damage(run):
    for step in EXPORTS:
        for path in trees.checkpoint(run, step).iterdir():
            if path.name.startswith(("tokenizer", "vocab")):
                path.unlink()
    assert all(checkpoint.status is Status.COMPLETE for checkpoint in listed(run).checkpoints)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_zero_length_files(run, name):
    trees.zero_length(trees.checkpoint(run, 187) / name)
    assert at(run, 187).status is Status.PARTIAL
    assert f"{name}: is empty" in problems(at(run, 187))


def test_an_empty_text_file_is_no_damage(run):
    trees.zero_length(trees.checkpoint(run, 187) / "merges.txt")
    assert at(run, 187).status is Status.COMPLETE


# --- folders ------------------------------------------------------------------------------------------------------


def test_empty_epoch_folder_left_by_a_crash(run):
    """AReaL makes the folder before the first byte."""
    trees.empty_epoch(run, 200)
    checkpoint = at(run, 200)
    assert (checkpoint.status, checkpoint.format) == (Status.PARTIAL, "empty")
    assert "no files" in problems(checkpoint)


def test_tmp_folder_in_progress_is_a_note_not_a_checkpoint(run):
    trees.tmp_folder(run, 200)
    assert not listed(run).at_step(200)
    assert ".tmp" in notes(run)


def test_near_miss_names_are_no_checkpoints(run):
    """Copies, other trainers' names and names in another script never count, even with a whole model inside."""
    before = listed(run).checkpoints
    trees.near_misses(run)
    assert listed(run).checkpoints == before
    assert "AReaL gives no such names" in notes(run)


def test_a_deep_tree_is_judged_not_followed_for_ever(run):
    deep = trees.checkpoint(run, 187)
    for level in range(12):
        deep = deep / f"level{level}"
    deep.mkdir(parents=True)
    assert at(run, 187).status is Status.PARTIAL
    assert "nested too deeply" in problems(at(run, 187))


def test_old_guides_slot_is_pointed_out(run):
    trees.stray_slot(run)
    assert "AReaL never reads it" in notes(run)
    assert listed(run).slot is None


def test_an_empty_stray_slot_says_nothing(run):
    (run / "recover_checkpoint").mkdir()
    assert not listed(run).notes


# --- parts --------------------------------------------------------------------------------------------------------


def test_two_parts_are_one_checkpoint(tmp_path):
    run = trees.make_run(tmp_path, steps=(46, 93), parts=("default", "critic"))
    assert [part.name for part in at(run, 93).parts] == ["default", "critic"]
    assert at(run, 93).status is Status.COMPLETE
    assert at(run, 93).file_count == 2 * len(trees.MODEL_FILES)


def test_critic_without_its_default_twin(tmp_path):
    run = trees.make_run(tmp_path, steps=(46, 93), parts=("default", "critic"))
    trees.critic_only(run, 140)
    assert at(run, 140).status is Status.PARTIAL
    assert "its part default is missing" in problems(at(run, 140))


def test_default_without_its_critic_twin(tmp_path):
    run = trees.make_run(tmp_path, steps=(46, 93), parts=("default", "critic"))
    trees.write_model(trees.checkpoint(run, 140))
    assert at(run, 140).status is Status.PARTIAL
    assert "its part critic is missing" in problems(at(run, 140))


def test_one_stray_critic_does_not_condemn_the_run(run):
    """In a run without critic, a folder somebody put there says nothing of the other steps."""
    trees.critic_only(run, 200)
    assert all(at(run, step).status is Status.COMPLETE for step in EXPORTS)
    assert at(run, 200).status is Status.PARTIAL


def test_one_part_damaged_makes_the_checkpoint_damaged(tmp_path):
    run = trees.make_run(tmp_path, steps=(46, 93), parts=("default", "critic"))
    trees.zero_length(trees.checkpoint(run, 93, "critic") / "model.safetensors")
    assert at(run, 93).status is Status.PARTIAL
    assert "critic/model.safetensors" in problems(at(run, 93))


# --- links and odd files ------------------------------------------------------------------------------------------


def test_links_are_never_followed_out_of_the_run(run, tmp_path):
    """A linked file makes its checkpoint PARTIAL; a linked folder is pointed out, and is none."""
    trees.symlink_file(trees.checkpoint(run, 187) / "model.safetensors", tmp_path / "elsewhere/model.safetensors")
    outside = trees.write_model(tmp_path / "outside")
    (run / "default" / trees.folder_name(200)).symlink_to(outside)
    (run / "linked-part").symlink_to(tmp_path / "elsewhere")
    checkpoint = at(run, 187)
    assert checkpoint.status is Status.PARTIAL
    assert "model.safetensors: is a symlink" in problems(checkpoint)
    assert not listed(run).at_step(200)
    assert "is a link: not followed" in notes(run)


def test_a_linked_slot_is_not_followed(run, tmp_path):
    (run / "default/recover_checkpoint").symlink_to(trees.write_model(tmp_path / "outside"))
    assert listed(run).slot is None
    assert "recover_checkpoint is a link" in notes(run)


def test_a_linked_manifest_does_not_count(run, tmp_path):
    seal_step(run, 187)
    manifest = trees.checkpoint(run, 187) / MANIFEST_NAME
    trees.symlink_file(manifest, tmp_path / "elsewhere" / MANIFEST_NAME)
    assert at(run, 187).status is Status.COMPLETE
    assert "its manifest cannot be read" in " ".join(at(run, 187).parts[0].notes)


def test_pipes_are_not_opened(run):
    """Opening a pipe for reading would hang for ever."""
    os.mkfifo(trees.checkpoint(run, 187) / "pipe")
    path = trees.checkpoint(run, 140) / "config.json"
    path.unlink()
    os.mkfifo(path)
    assert "pipe: is a" in problems(at(run, 187))
    assert at(run, 187).status is Status.PARTIAL
    assert not verify(LocalBackend(run), at(run, 140), Level.FULL).ok


def test_odd_names_are_listed(run):
    """Names that no manifest may hold: bytes that are not UTF-8, line feeds, terminal codes."""
    folder = os.fsencode(trees.checkpoint(run, 187))
    for name in (b"\xff\xfe.txt", b"a\nb.txt", b"\x1b[2J.txt"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"x")
    assert at(run, 187).status is Status.COMPLETE
    assert at(run, 187).file_count == len(trees.MODEL_FILES) + 3


# --- access -------------------------------------------------------------------------------------------------------


def scan_as_nobody(trial):
    open_way_to(trial)
    return as_nobody(lambda: listed(trial))


@pytest.mark.root
def test_another_users_files_are_listed_like_any(run):
    for path in [trees.checkpoint(run, 187), *trees.checkpoint(run, 187).iterdir()]:
        os.chown(path, 12345, 12345)
    (checkpoint,) = scan_as_nobody(run).at_step(187)
    assert checkpoint.status is Status.COMPLETE


@pytest.mark.root
def test_unreadable_folders_are_partial_with_the_reason_and_hide_nothing(run):
    """Another user's umask must not make `list` fail, nor call what it cannot see empty."""
    trees.checkpoint(run, 187).chmod(0o700)
    trees.write_dcp_slot(run / "default/recover_checkpoint").chmod(0o700)
    listing = scan_as_nobody(run)
    (checkpoint,) = listing.at_step(187)
    assert (checkpoint.status, checkpoint.format) == (Status.PARTIAL, "unknown")
    assert problems(checkpoint) == "default: cannot be read (Permission denied)"
    assert listing.slot.status is Status.PARTIAL
    assert "Permission denied" in problems(listing.slot)
    assert listing.at_step(140)[0].status is Status.COMPLETE


@pytest.mark.root
def test_unreadable_part_folder_is_noted(run):
    trees.write_model(run / "critic" / trees.folder_name(46))
    (run / "critic").chmod(0o700)
    listing = scan_as_nobody(run)
    assert "critic: cannot be read (Permission denied)" in listing.notes
    assert listing.at_step(187)[0].status is Status.COMPLETE


@pytest.mark.root
def test_unreadable_metadata_of_a_slot(run):
    """`scan` reads a DCP slot's .metadata: one that it may not read is a finding, not a failure."""
    slot = trees.write_dcp_slot(run / "default/recover_checkpoint")
    (slot / ".metadata").chmod(0o600)
    listing = scan_as_nobody(run)
    assert listing.slot.status is Status.PARTIAL
    assert ".metadata: cannot be read" in problems(listing.slot)


@pytest.mark.root
def test_unreadable_manifest_is_noted(run):
    seal_step(run, 187)
    (trees.checkpoint(run, 187) / MANIFEST_NAME).chmod(0o600)
    (checkpoint,) = scan_as_nobody(run).at_step(187)
    assert checkpoint.status is Status.COMPLETE
    assert "its manifest cannot be read" in checkpoint.parts[0].notes[0]


@pytest.mark.root
def test_unreadable_run_is_an_access_error(run):
    run.chmod(0o700)
    assert isinstance(scan_as_nobody(run), AccessError)


# --- manifests ----------------------------------------------------------------------------------------------------


def test_sealed_is_committed(run):
    seal_step(run, 187)
    assert at(run, 187).status is Status.COMMITTED
    assert at(run, 187).file_count == len(trees.MODEL_FILES), "our manifest is not one of its files"


def test_saved_since_is_complete_not_corrupt(run):
    """The trainer rewrote a file in place: the manifest no longer counts, and proves no damage."""
    seal_step(run, 187)
    (trees.checkpoint(run, 187) / "model.safetensors").write_bytes(trees.safetensors_bytes(trees.TENSORS, seed=5))
    checkpoint = at(run, 187)
    assert checkpoint.status is Status.COMPLETE
    assert "saved since by the trainer (model.safetensors)" in checkpoint.parts[0].notes[0]


def test_a_sealed_file_that_went_away_is_partial(run):
    """Nothing but the manifest could tell that merges.txt was ever there."""
    seal_step(run, 187)
    (trees.checkpoint(run, 187) / "merges.txt").unlink()
    assert at(run, 187).status is Status.PARTIAL
    assert "merges.txt: listed in the manifest, and missing" in problems(at(run, 187))


def test_a_sealed_file_that_lost_its_end_is_corrupt(run):
    """Another size at the same time of change: no trainer did that."""
    seal_step(run, 187)
    path = trees.checkpoint(run, 187) / "merges.txt"
    times = path.stat()
    trees.truncate(path, 3)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert at(run, 187).status is Status.CORRUPT


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000, b"null", b'{"format": "ckptstore.manifest"}'])
def test_garbage_for_a_manifest(run, content):
    """It does not count, says so, and the checkpoint is judged without it."""
    (trees.checkpoint(run, 187) / MANIFEST_NAME).write_bytes(content)
    assert at(run, 187).status is Status.COMPLETE
    assert "its manifest does not count" in at(run, 187).parts[0].notes[0]


def test_a_manifest_never_hides_damage_that_the_names_show(tmp_path):
    """COMMITTED needs both: a valid manifest and no finding."""
    run = trees.make_run(tmp_path, steps=(46,))
    folder = trees.checkpoint(run, 46)
    seal_step(run, 46)
    trees.zero_length(folder / "model.safetensors")
    manifest = Manifest(step=46, epoch=0, epoch_step=46, part="default", origin="seal", files=(), chunk_bytes=8 << 20)
    entries = manifest_entries(folder)
    (folder / MANIFEST_NAME).write_bytes(Manifest(**{**fields(manifest), "files": entries}).to_bytes())
    assert at(run, 46).status is Status.PARTIAL


def fields(manifest):
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}


def manifest_entries(folder):
    from ckptstore.manifest import FileEntry

    return tuple(
        FileEntry(path.name, (info := path.stat()).st_size, info.st_mtime_ns, info.st_ino, 0, (0,) if info.st_size else ())
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_NAME
    )


def test_a_draft_manifest_left_by_a_crash_counts_as_nothing(run):
    (trees.checkpoint(run, 187) / ".ckptstore.manifest.0a1b2c3d").write_bytes(b"{")
    assert at(run, 187).status is Status.COMPLETE
    assert at(run, 187).file_count == len(trees.MODEL_FILES)
    seal_step(run, 187)
    assert at(run, 187).status is Status.COMMITTED


# --- the slot -----------------------------------------------------------------------------------------------------


def slot_of(trial):
    slot = listed(trial).slot
    assert slot is not None
    return slot


def test_dcp_slot_with_optimizer(tmp_path):
    run = trees.make_run(tmp_path, steps=(46,), slot="dcp", recover_info=60)
    slot = slot_of(run)
    assert (slot.step, slot.epoch, slot.epoch_step, slot.kind) == (60, 1, 13, "slot")
    assert (slot.format, slot.status) == ("dcp", Status.COMPLETE)
    assert {"weights", "optimizer"} <= set(slot.holds)


def test_dcp_slot_without_optimizer(tmp_path):
    run = trees.make_run(tmp_path, steps=(46,), slot="dcp", recover_info=60)
    trees.set_age(trees.write_dcp_slot(run / "default/recover_checkpoint", optimizer=False), 3600)
    assert slot_of(run).holds == ("weights",)


def test_era_a_slot(tmp_path):
    run = trees.make_run(tmp_path, steps=(46,), slot="era_a", recover_info=60)
    slot = slot_of(run)
    assert (slot.format, slot.step, slot.status) == ("hf+optim", 60, Status.COMPLETE)
    (run / "default/recover_checkpoint/optim_world_size_2_rank_1.pt").unlink()
    assert slot_of(run).status is Status.PARTIAL
    assert "rank_1.pt: optimizer shard missing" in problems(slot_of(run))


def test_an_export_in_the_slot_has_no_step(tmp_path):
    """That recover_info lies beside it proves nothing: old guides copy exports there."""
    run = trees.make_run(tmp_path, steps=(46,), slot="hf", recover_info=60)
    assert slot_of(run).step == -1
    assert "not what the trainer saves there" in " ".join(slot_of(run).notes)


def test_slot_without_recover_info_has_no_step(tmp_path):
    run = trees.make_run(tmp_path, steps=(46,), slot="dcp")
    assert slot_of(run).step == -1
    assert "no recover_info" in " ".join(slot_of(run).notes)


def test_recover_info_older_than_the_weights(tmp_path):
    """A crash between both: the weights are of a later step than the counter says."""
    run = trees.make_run(tmp_path, steps=(46,), slot="dcp", recover_info=60)
    trees.set_age(run / "recover_info", 7200)
    slot = slot_of(run)
    assert (slot.step, slot.status) == (-1, Status.PARTIAL)
    assert "a save was cut short" in " ".join(slot.notes)


def test_clocks_a_few_seconds_apart_are_one_save(tmp_path):
    run = trees.make_run(tmp_path, steps=(46,), slot="dcp", recover_info=60)
    trees.set_age(run / "recover_info", 3603)
    assert slot_of(run).step == 60


def test_shard_newer_than_its_metadata(tmp_path):
    """AReaL overwrites in place: a crash then leaves new shards beside the old .metadata."""
    run = trees.make_run(tmp_path, steps=(46,), slot="dcp", recover_info=60)
    shard = run / "default/recover_checkpoint/__0_0.distcp"
    os.utime(shard, (shard.stat().st_mtime + 60,) * 2)
    assert slot_of(run).status is Status.PARTIAL
    assert "newer than .metadata" in problems(slot_of(run))


def test_mixed_slot(tmp_path):
    run = trees.make_run(tmp_path, steps=(46,), slot="dcp", recover_info=60)
    trees.write_model(run / "default/recover_checkpoint")
    assert (slot_of(run).format, slot_of(run).status) == ("mixed", Status.CORRUPT)


def test_slot_without_metadata(tmp_path):
    run = trees.make_run(tmp_path, steps=(46,), slot="dcp", recover_info=60)
    (run / "default/recover_checkpoint/.metadata").unlink()
    assert slot_of(run).status is Status.PARTIAL


def test_slot_with_garbage_for_metadata(tmp_path):
    """Never unpickled; a finding."""
    run = trees.make_run(tmp_path, steps=(46,), slot="dcp", recover_info=60)
    (run / "default/recover_checkpoint/.metadata").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    trees.set_age(run / "default/recover_checkpoint", 3600)
    assert slot_of(run).status is Status.CORRUPT


def test_an_empty_slot_folder_is_no_slot(run):
    """AReaL's own helpers create it while they look."""
    (run / "default/recover_checkpoint").mkdir()
    assert listed(run).slot is None


@pytest.mark.parametrize("lost", trees.RECOVER_INFO_FILES)
def test_a_damaged_recover_info_is_told(tmp_path, lost):
    run = trees.make_run(tmp_path, steps=(46,), slot="dcp", recover_info=60)
    path = run / "recover_info" / lost
    trees.zero_length(path)
    info = listed(run).recover_info
    assert info is not None
    assert any(lost in problem for problem in info.problems)
    path.unlink()
    info = listed(run).recover_info
    assert info is not None
    assert any(lost in problem for problem in info.problems)


# --- around -------------------------------------------------------------------------------------------------------


def test_newest_file_is_the_trainers(run):
    """For "is it still running?": our manifests are ours, whenever they were written."""
    seal_step(run, 46)
    listing = listed(run)
    assert listing.newest_file.startswith(f"default/{trees.folder_name(187)}/")
    path = trees.checkpoint(run, 93) / "merges.txt"
    path.write_text("new")
    assert listed(run).newest_file == f"default/{trees.folder_name(93)}/merges.txt"


def test_our_side_folder_is_none_of_the_runs_files(run):
    """Where the trial is a mount of its own it lies inside, and our lock would look like a trainer at work."""
    (run / "default/.ckptstore").mkdir()
    (run / "default/.ckptstore/lock").write_text("x")
    listing = listed(run)
    assert ".ckptstore" not in listing.newest_file
    assert [checkpoint.step for checkpoint in listing.checkpoints] == list(EXPORTS)
    assert not listing.notes


def test_side_folder_is_never_inside_the_trial(run):
    """Every folder there counts as a model to AReaL."""
    side = side_folder(str(run), f"{run}/default/recover_checkpoint")
    assert side == f"{run.parent}/.ckptstore/{run.name}"
    assert os.path.commonpath([side, run]) != str(run)


def test_equal_steps_of_two_epochs_are_two_checkpoints(run):
    """A run that changed its steps per epoch has two folders with one globalstep."""
    trees.write_model(run / "default/epoch18epochstep7globalstep187")
    assert [checkpoint.epoch for checkpoint in listed(run).at_step(187)] == [3, 18]


def test_listing_writes_nothing(run):
    """No file, no folder, no time of change is touched by looking."""
    trees.write_dcp_slot(run / "default/recover_checkpoint")
    trees.write_recover_info(run, 60)

    def snapshot():
        return {
            path: (info.st_mtime_ns, info.st_mode, info.st_size if stat.S_ISREG(info.st_mode) else 0)
            for path in [run.parent, *run.parent.rglob("*")]
            if (info := path.lstat())
        }

    before = snapshot()
    listed(run)
    assert snapshot() == before


def test_files_that_vanish_while_listing(run, monkeypatch):
    """A trainer prunes while we look: what went away is left out or PARTIAL, never an error."""
    backend = LocalBackend(run)
    seal_step(run, 187)
    whole_tree = backend.tree

    def tree(*args, **kwargs):
        found = whole_tree(*args, **kwargs)
        (trees.checkpoint(run, 187) / MANIFEST_NAME).unlink()
        # As from a medium that lists without contents, or for a manifest too large to be read on the way.
        return {path: folder._replace(content=None) for path, folder in found.items()}

    monkeypatch.setattr(backend, "tree", tree)
    (checkpoint,) = scan(backend).at_step(187)
    assert checkpoint.status is Status.COMPLETE
