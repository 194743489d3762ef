"""CheckpointStore: one run's checkpoints from Python, the same as the command line. No algorithm of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ckptstore import native, recovery, retention
from ckptstore import side as side_folders
from ckptstore.backends import Bandwidth, open_backend
from ckptstore.choose import ResumePoint, Selection, resume_point
from ckptstore.errors import (
    AlreadyExistsError,
    CkptStoreError,
    CommitUncertain,
    IntegrityError,
    ManifestError,
    NotFoundError,
    UsageError,
    from_os_error,
)
from ckptstore.listing import Listing, backend_for, scan
from ckptstore.manifest import Manifest
from ckptstore.model import Checkpoint, Level, Part
from ckptstore.parts import folder_of, read_manifest
from ckptstore.plan import Options
from ckptstore.recovery import Outcome
from ckptstore.retention import Decision, Keep
from ckptstore.saves import background, saving, steps
from ckptstore.saves.background import OnBusy, SaveHandle
from ckptstore.saves.saving import Metrics
from ckptstore.seal import seal
from ckptstore.transfer.mirror import Mirror
from ckptstore.verify import Notify, Report, verify_all


class CheckpointStore:
    """The checkpoints of one run, given by its folder (AReaL: `{fileroot}/checkpoints/{user}/{experiment}/{trial}`) or URL.

    Any other folder or URL, empty or not there yet, becomes a store of steps with the first `save`: one folder `step-N` each.

    Every call looks at the disk anew; nothing is cached. Thread-safe. All errors are subclasses of CkptStoreError.

    >>> store = CheckpointStore("/workspace/outputs/grpo/checkpoints/root/gsm8k-grpo/trial0")   # doctest: +SKIP
    >>> store.resume_point(max_step=187).checkpoint.step                                        # doctest: +SKIP
    187
    """

    def __init__(self, location: str | Path) -> None:
        self.backend = open_backend(location)

    def __repr__(self) -> str:
        return f"CheckpointStore({self.backend.location!r})"

    def scan(self) -> Listing:
        """Everything known about the run: checkpoints, slot, recover_info, notes. NotFoundError when it is missing."""
        if steps.needs_mending(self.backend.location):
            with contextlib.suppress(CkptStoreError), steps.locked(self.backend.location, "mending"):
                pass  # whoever holds the lock has mended it
        try:
            return scan(self.backend)
        except NotFoundError as error:  # no empty store: a place that is misspelt would look like one
            error.hint = error.hint or "Nothing has been saved there yet, or it is another place."
            raise

    def save(
        self,
        step: int,
        directory: str | Path,
        *,
        metrics: Metrics | None = None,
        keep: Keep | None = None,
        progress: native.Progress | None = None,
    ) -> Manifest:
        """Copy a folder's files into the store as `step`: digested in the one read, durable, visible only when whole.

        A step that is there already stays until the new one is durable, then is replaced in one act. `metrics` are for
        retention: numbers of any kind; a step whose loss is NaN or infinite does not count. `keep` prunes afterwards. Errors:
        NotCommitted and CommitUncertain as in errors.py; RefusedError for a run of AReaL's, links and devices; NoSpaceError;
        SourceChangedError. At a URL it is sent there, as docs/saving.md says.
        """
        source = os.path.abspath(directory)
        numbers, keep = saving.numbers_of(metrics), retention.checked_keep(keep)
        return self._save(step, source, steps.files_in(source), metrics=numbers, keep=keep, progress=progress)

    def save_async(
        self,
        step: int,
        directory: str | Path,
        *,
        metrics: Metrics | None = None,
        keep: Keep | None = None,
        on_busy: OnBusy = "wait",
        nice: int = 10,
    ) -> SaveHandle:
        """Save a folder's files in the background: returns at once. Otherwise as `save`.

        What is saved is the folder as it is at the call; a file that is changed or removed before it is copied fails the save
        (SourceChangedError, NotFoundError). `handle.staged` says that all is copied: from then on the folder may change or
        go. That is shortly before `handle.committed`, so that `handle.wait()` serves for both. One save a store is in flight,
        those of ckptstore.torch.save_async counted: meanwhile the next call waits (`on_busy` "wait"), saves nothing and says
        so ("skip"), or raises BusyError ("raise"). A failure that nobody has waited for is raised here, and nothing is saved
        then. `nice` is the priority of the writing threads.
        """
        source = os.path.abspath(directory)
        files, numbers, keep = steps.files_in(source), saving.numbers_of(metrics), retention.checked_keep(keep)

        def stage(handle: SaveHandle) -> Callable[[], Manifest]:
            options = native.CopyOptions(nice=nice)
            copied = handle.mark_staged
            return lambda: self._save(step, source, files, metrics=numbers, keep=keep, options=options, copied=copied)

        return background.submit(self.backend.location, step, stage, on_busy=on_busy)

    def _save(
        self,
        step: int,
        source: str,
        files: Sequence[native.FileSpec],
        *,
        metrics: Mapping[str, float],
        keep: Keep | None,
        options: native.CopyOptions | None = None,
        progress: native.Progress | None = None,
        copied: Callable[[], None] = lambda: None,
    ) -> Manifest:
        draft = saving.begin(self.backend, step)
        try:
            written = saving.write_folder(draft, source, files, options=options, progress=progress)
            copied()
            manifest = saving.commit(draft, written, metrics=metrics, source=os.path.basename(source))
        finally:
            saving.abandon(draft)
        retention.prune_after(self.backend, step, keep)
        return manifest

    def prune(self, keep: Keep, *, unmirrored: bool = False, dry_run: bool = False) -> Sequence[Decision]:
        """Delete the steps that no rule of `keep` keeps; with `dry_run` only the decisions. See retention.prune.

        Of a store that is mirrored, what is not safe there yet stays, unless `unmirrored`.
        """
        decide = retention.plan if dry_run else retention.prune
        retention.checked_keep(keep)
        return decide(self.backend, keep, unmirrored=unmirrored)

    def mirror(self, url: str, *, max_bytes_per_s: float | None = None) -> Mirror:
        """From now on push each finished checkpoint to the run at `url`, in the background: see mirror.Mirror.

        `with store.mirror("s3://BUCKET/runs/trial0") as mirror:` around the training; `mirror.lag` says how far it is behind.
        """
        return Mirror(self.backend, url, bandwidth=None if max_bytes_per_s is None else Bandwidth(max_bytes_per_s))

    @property
    def folder(self) -> str:
        """The folder of a store on this machine. UsageError where it is at a URL."""
        self._need_folder()
        return self.backend.location

    def list(self) -> Sequence[Checkpoint]:
        """All checkpoints by step, the recover slot not among them (it is `scan().slot`). Level quick."""
        return self.scan().checkpoints

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.list())

    def get(self, step: int) -> Checkpoint:
        """The checkpoint of a global step, or the slot that was adopted at it. NotFoundError names the steps that exist."""
        return _at(self.scan(), step)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is COMMITTED or COMPLETE, None without one. `resume_point` looks harder.

        Not one that training has left: it went back, and goes on with lower numbers (`checkpoint.left` says when).
        """
        return self.scan().latest()

    def verify(self, step: int, level: Level | str = Level.FULL, *, progress: native.Progress | None = None) -> Report:
        """Verify one checkpoint. Damage is in the report; only a failing medium raises."""
        notify = None if progress is None else lambda _, done, total: progress(done, total)
        return verify_all(self.backend, [self.get(step)], Level(level), notify)[0]

    def seal(self, step: int, *, progress: native.Progress | None = None) -> Sequence[Manifest]:
        """Write a manifest for what the trainer wrote. IntegrityError for a checkpoint that is not whole."""
        self._need_folder()
        checkpoint = self.get(step)
        if checkpoint.store:
            raise UsageError(f"step {step} is a slot that was adopted: it has its manifest since", hint="`verify` reads it.")
        return seal(self.backend, checkpoint, progress=progress)

    def resume_point(
        self,
        *,
        before_step: int | None = None,
        max_step: int | None = None,
        include_bad: bool = False,
        notify: Notify | None = None,
    ) -> ResumePoint:
        """The newest checkpoint that is healthy and passes level structure, those skipped and why; or NothingToResumeError.

        Of a slot that may be it all bytes are read, of which `notify` is told.
        """
        wanted = Selection(before_step=before_step, max_step=max_step, include_bad=include_bad)
        return resume_point(self.backend, self.scan(), wanted, notify=notify)

    def setup(
        self,
        selection: Selection | None = None,
        options: Options | None = None,
        *,
        notify: Notify | None = None,
    ) -> Outcome:
        """Make a checkpoint the one that the trainer resumes from: see recovery.setup. From a URL: Selection(url=…)."""
        self._need_folder()
        return recovery.setup(self.backend, selection or Selection(), options or Options(), notify=notify)

    def _recorded(self, checkpoint: Checkpoint, part: Part) -> Manifest | None:
        backend = backend_for(self.backend, checkpoint)
        try:
            return read_manifest(backend, folder_of(backend, part))
        except NotFoundError:
            return None
        except ManifestError as error:  # else what is restored would be compared with nothing
            raise IntegrityError(
                f"the manifest of {part.path} cannot be trusted: {error}",
                hint="Restore another step, or remove that file: what is restored is not compared with anything then.",
            ) from error

    def _need_folder(self) -> None:
        if not self.backend.is_folder:
            raise UsageError(
                f"{self.backend.location} is no folder of this machine",
                hint="`ckptstore pull` brings its checkpoints to a folder; setup takes them from it by Selection(url=…).",
            )

    def restore(
        self, step: int, destination: str | Path, *, progress: native.Progress | None = None
    ) -> dict[str, native.CopyResult]:
        """Copy a checkpoint to a new folder, digests checked in the same read; durable.

        One sub-folder a part (AReaL's models); of a store of steps, the files themselves.

        AlreadyExistsError for a destination that exists: nothing is overwritten. DigestMismatchError for damage; the
        destination appears under its name only when all of it is right.
        """
        self._need_folder()
        target = os.path.abspath(destination)
        if os.path.lexists(target):
            raise AlreadyExistsError(f"{target} exists already", hint="Name a new folder.")
        listing = self.scan()
        checkpoint = _at(listing, step)
        if not checkpoint.status.usable:
            raise IntegrityError(f"step {step} is {checkpoint.status}: {'; '.join(map(str, checkpoint.findings[:3]))}")
        draft = f"{target}.ckptstore-{secrets.token_hex(8)}"
        results = {}
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.mkdir(draft, 0o700)
        except OSError as error:
            raise from_os_error(error, doing="creating", path=draft) from error
        before = 0

        def onward(done_bytes: int, _: int) -> None:
            if progress is not None:
                progress(before + done_bytes, checkpoint.size_bytes)

        try:
            for part in checkpoint.parts:
                folder = draft if listing.framework == "steps" else os.path.join(draft, part.name)
                os.makedirs(folder, 0o700, exist_ok=True)
                recorded = self._recorded(checkpoint, part)
                valid = recorded is not None and recorded.inspect(part.files).holds
                expected = {entry.path: entry.chunks for entry in recorded.files} if recorded and valid else {}
                if lacking := expected.keys() - {file.name for file in part.files}:
                    raise IntegrityError(f"step {step}: {min(lacking)} was saved, and is missing", hint="Restore another step.")
                specs = [
                    native.FileSpec(file.name, file.size_bytes, file.mtime_ns, file.inode, expected.get(file.name))
                    for file in part.files
                ]
                chunk_bytes = recorded.chunk_bytes if recorded and valid else native.CHUNK_BYTES
                results[part.name] = native.copy_files(
                    part.path, folder, specs, options=native.CopyOptions(chunk_bytes=chunk_bytes), progress=onward
                )
                before += part.size_bytes
            side_folders.sync_folder(draft)
            side_folders.rename_in(draft, target)
        except OSError as error:
            raise from_os_error(error, doing="restoring to", path=target) from error
        finally:
            side_folders.remove_tree(draft)
        try:
            side_folders.sync_folder(os.path.dirname(target))
        except OSError as error:
            raise CommitUncertain(f"{target} is there, whole, and the disk has not confirmed it: {error.strerror}") from error
        return results


def _at(listing: Listing, step: int) -> Checkpoint:
    found = listing.at_step(step) or [checkpoint for checkpoint in listing.adopted if checkpoint.step == step]
    if not found:
        there = sorted({checkpoint.step for checkpoint in (*listing.checkpoints, *listing.adopted)})
        raise NotFoundError(f"no checkpoint of step {step!r} in {listing.run.path}", hint=f"There are {there[-20:]}.")
    return found[-1]


def needed(store: object) -> None:
    """UsageError for what is no CheckpointStore: a path, which torch.save takes."""
    if not isinstance(store, CheckpointStore):
        raise UsageError(
            f"a CheckpointStore is needed, and this is {store!r:.80}",
            hint="CheckpointStore(LOCATION) is the one of a folder or a URL.",
        )
