"""Stores to be damaged on purpose, every verb on them, and what must hold whatever the damage.

Truth is computed here, from the bytes alone: what was saved, what lies there now. Nothing of ckptstore's is believed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ckptstore import adopt, damage, halt, ledger, pins
from ckptstore import side as side_folders
from ckptstore.backends import open_backend
from ckptstore.cli import run as run_cli
from ckptstore.errors import CkptStoreError
from ckptstore.ledger import Record, Writer
from ckptstore.model import Finding, Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer import mirrored
from tests import mutations, trees

PATIENCE_S = 10.0  #: of one call on a store of a few hundred kilobytes, on a machine that does other things too
MEMORY_BYTES = 1 << 30  #: more than what the process has when it begins
DOCUMENTED = frozenset({0, 1, 2, 3, 4})  #: exit codes of docs/cli.md; nobody interrupts here
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
Bytes = dict[str, bytes]


class Hung(BaseException):
    """So that no `except Exception` swallows it."""


@contextlib.contextmanager
def bounded(what: str, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Raises out of whatever takes too long; too much memory is a MemoryError."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hung(what)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, patience_s, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Address space for no more than MEMORY_BYTES beside what is in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if "CKPTSTORE_SANITIZED" in os.environ:  # a sanitizer reserves terabytes
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- the stores -----------------------------------------------------------------------------------------------------


def areal_run(home: Path) -> Path:
    """A run with everything that ckptstore or AReaL ever puts beside a checkpoint; its folder."""
    run = trees.make_run(home, steps=[46, 93, 140, 187], slot="dcp", slot_step=187, recover_info=187)
    store = CheckpointStore(run)
    for step in (46, 93, 140):
        store.seal(step)
    adopt.adopt(open_backend(run))
    side = side_folders.side_folder(str(run), f"{run}/default/recover_checkpoint")
    torn = trees.checkpoint(run, 140) / "model.safetensors"
    trees.bitflip(torn)
    commit = json.loads((torn.parent / "ckptstore.manifest.json").read_text())["commit"]
    wrong = Finding("model.safetensors", "digest differs", Status.CORRUPT)
    damage.remember(side, {f"default/{torn.parent.name}": (commit, wrong)})
    pins.add(side, 46, path="default", why="best")
    mirrored.write(side, mirrored.Record("s3://bucket/run", {"epoch0epochstep46globalstep46": "0" * 64}, 46, 1.7e9, "slow"))
    writer = Writer(ledger.path_in(side))
    writer.judges(ledger.DEFAULT_JUDGES, 1.7e9)
    records = [Record(step, 1.7e9 + step, {"grpo_actor/task_reward/avg": 0.5, "grad_norm": 1.0}) for step in range(40, 190)]
    writer.records(records[:75], imported_at_s=1.8e9)
    for record in records[75:]:
        writer.record(record.step, record.at_s, record.metrics)
    writer.event("reset", 100, 1.7e9 + 100, since_step=90)
    writer.close()
    halt.write_first(side, halt.Trip(step=187, since_step=180, saw="reward was 0", command="ckptstore resume"))
    side_folders.open_stage(side, "0123")
    old = Path(side, "old-20260101T000000.000000Z-00000000/default")
    trees.write_model(old, seed=5)
    holder = {"host": "elsewhere", "pid": 7, "doing": "setup", "done_bytes": 1, "total_bytes": 9}
    Path(side, "lock").write_text(json.dumps(holder | {"started_at_s": 1.7e9, "heartbeat_at_s": 1.7e9}))
    logs = home / "logs" / "/".join(run.parts[-3:])
    (logs / "main.log").write_text("20260101-00:00:00 Train step 188/500 done.\nRuntimeError: CUDA out of memory\n" * 20)
    return run


def steps_store(home: Path) -> Path:
    """A store of steps: files of every format that is looked into."""
    root = home / "steps"
    store = CheckpointStore(root)
    for step, make in enumerate((trees.write_model, trees.write_dcp_slot, trees.write_lora, trees.write_era_a_slot)):
        store.save(step, make(home / f"source-{step}"), metrics={"loss": 1.0 / (step + 1)})
        shutil.rmtree(home / f"source-{step}")
    pins.add(f"{root}/.ckptstore", 1)
    mirrored.write(f"{root}/.ckptstore", mirrored.Record("s3://bucket/steps", {"step-1": "0" * 64}, 1, 1.7e9, ""))
    return root


def areal_verbs(run: Path, replica: Path) -> list[list[str]]:
    at = ["--run", str(run)]
    trainer = ["--areal-version", "1.0.2", "--world-size", "1"]  # looking for AReaL's package starts a process
    return [
        ["list", "--json", *at],
        ["list", *at],
        ["list", "--recover-info", *at],
        ["show", "93", *at],
        ["show", "--slot", "--json", *at],
        ["verify", "--all", "--json", *at],
        ["verify", "--all", "--level", "structure", *at],
        ["verify", "--slot", "--weights", *at],
        ["verify", "93", "187", "--weights", "--json", *at],
        ["setup", "--dry-run", "--json", "--force", *trainer, *at],
        ["setup", "--dry-run", "--as-is", "--force", "--before-step", "100", *trainer, *at],
        ["resume", "--plan", "--force", *trainer, *at],
        ["doctor", "--json", *trainer, *at],
        ["status", "--json", *at],
        ["status", *at],
        ["plot", *at],
        ["clean", "--dry-run", "--old-slots", *at],
        ["seal", "--all", "--dry-run", *at],
        ["repair", "93", "--dry-run", "--json", "--from", str(replica), *at],
    ]


def steps_verbs(root: Path, replica: Path) -> list[list[str]]:
    at = ["--run", str(root)]
    return [
        ["list", "--json", *at],
        ["list", *at],
        ["show", "1", "--json", *at],
        ["show", "0", *at],
        ["verify", "--all", "--json", *at],
        ["verify", "--all", "--level", "structure", *at],
        ["verify", "1", "3", "--weights", *at],
        ["status", "--json", *at],
        ["status", *at],
        ["clean", "--dry-run", "--json", *at],
        ["prune", "--dry-run", "--keep-last", "1", *at],
        ["repair", "1", "--dry-run", "--json", "--from", str(replica), *at],
    ]


class Store:
    """One kind of store: as it was made, a copy to be damaged, and the truth about each of its steps."""

    def __init__(self, home: Path, make: Callable[[Path], Path], verbs: Callable[[Path, Path], list[list[str]]]) -> None:
        self.home = home
        made = make(home / "made")
        self._inside = made.relative_to(home / "made")
        self.work = home / "fuzzed"
        self.run = self.work / self._inside
        self.verbs = verbs(self.run, made)
        self.steps = {step: trees_of(folder) for step, folder in _step_folders(made).items()}
        self.renew()
        self.good = self._verdicts()
        usable = {step for step, found in self.good.items() if found in (Status.COMMITTED, Status.COMPLETE)}
        assert len(usable) >= 3, "the store that is damaged must be good to begin with"

    def renew(self) -> None:
        """The work copy as it was made, times included."""
        unlock(self.work)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.home / "outside", ignore_errors=True)
        shutil.copytree(self.home / "made", self.work, symlinks=True)

    def files(self) -> list[str]:
        """All of them, relative to the work copy."""
        return sorted(str(path.relative_to(self.work)) for path in self.work.rglob("*") if path.is_file())

    def _verdicts(self) -> dict[int, str]:
        code, out, _ = invoke(next(words for words in self.verbs if words[:3] == ["verify", "--all", "--json"]))
        assert code in (0, 3)
        return {report["step"]: report["status"] for report in json.loads(out)["reports"] if report["kind"] == "export"}

    def check(self, touched: set[str], *, slow: bool = False, rng: random.Random | None = None) -> None:
        """Every verb on the damaged copy: AssertionError says what did not hold. `touched`: paths relative to the work copy.

        With `rng`, a third of the verbs, and always those that say what is whole.
        """
        before = snapshot(self.work)
        for words in self.verbs:
            always = words[:2] == ["list", "--json"] or words[:3] == ["verify", "--all", "--json"]
            if rng is not None and not always and rng.random() > 0.35:
                continue
            if slow and words[0] in ("verify", "repair") and "structure" not in words:
                continue
            code, out, err = invoke(words)
            assert code in DOCUMENTED, f"{words[:3]}: exit code {code}"
            assert not _CONTROL.search(out + err), f"{words[:3]} writes control characters: {_CONTROL.search(out + err)!r}"
            if "--json" in words:
                document = json.loads(out, parse_constant=_no_constant)
                if words[:2] == ["list", "--json"] and "error" not in document:
                    self._check_listed(document, touched)
                if words[:3] == ["verify", "--all", "--json"] and "error" not in document:
                    self._check_verified(document, touched)
        self._check_library(touched)
        after = snapshot(self.work)
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        ours = {name for name in changed if "/.ckptstore" in f"/{name}"}
        assert changed <= ours, f"looking has changed {sorted(changed - ours)[:5]}"
        lost = {name for name in ours if name in before and name not in after and name.rpartition("/")[2] != "damaged.json"}
        assert not lost, f"looking has removed {sorted(lost)[:5]}"

    def _touches(self, step: int, touched: set[str]) -> bool:
        name = next(iter(self.steps[step]))
        return any(path.startswith(f"{self._inside}/{name}/") or path == f"{self._inside}/{name}" for path in touched)

    def _check_listed(self, document: Any, touched: set[str]) -> None:
        listed = {found["step"]: found["status"] for found in document["checkpoints"] if found["kind"] == "export"}
        for step, status in self.good.items():
            if self._touches(step, touched):
                continue
            assert step in listed, f"step {step} is good, and is not listed"
            same = listed[step] == status or (status == "CORRUPT" and listed[step] == "COMMITTED")  # a forgotten note
            assert same, f"step {step} is {status}, and is listed as {listed[step]}"

    def _check_verified(self, document: Any, touched: set[str]) -> None:
        verified = {found["step"]: found for found in document["reports"] if found["kind"] == "export"}
        for step, status in self.good.items():
            if not self._touches(step, touched):
                assert step in verified, f"step {step} is good, and is not verified"
                assert verified[step]["status"] == status, f"step {step} is {status}, and verifies as {verified[step]}"
            elif step in verified and verified[step]["status"] == "COMMITTED":
                assert self._is_whole(step), f"step {step} is not what was saved, and verifies as COMMITTED"

    def _is_whole(self, step: int) -> bool:
        ((name, contents),) = self.steps[step].items()
        return _same(self.run / name, contents)

    def _check_library(self, touched: set[str]) -> None:
        """CheckpointStore refuses by its own errors, and gives back what was saved or nothing."""
        store = CheckpointStore(self.run)
        with bounded("CheckpointStore.list"), contextlib.suppress(CkptStoreError):
            listed = {checkpoint.step: checkpoint for checkpoint in store.list()}
            for step in self.good:
                if step not in listed or listed[step].status is not Status.COMMITTED:
                    continue
                target = self.home / "restored"
                with contextlib.suppress(CkptStoreError):
                    store.restore(step, target)
                    ((_, contents),) = self.steps[step].items()
                    folder = target if listed[step].epoch < 0 else target / "default"
                    assert _same(folder, contents), f"step {step} was restored as something else"
                shutil.rmtree(target, ignore_errors=True)
            with contextlib.suppress(CkptStoreError):
                store.resume_point()


def strict_json(document: object) -> str:
    """As JSON that every parser takes."""
    return json.dumps(document, allow_nan=False)


def _no_constant(name: str) -> Any:
    raise AssertionError(f"the output holds {name}, which is no JSON")


def _step_folders(run: Path) -> dict[int, Path]:
    found = {}
    for path in [*run.glob("default/epoch*globalstep*"), *run.glob("step-*")]:
        found[int(re.findall(r"\d+", path.name)[-1])] = path
    return found


def trees_of(folder: Path) -> dict[str, Bytes]:
    """Name of the folder in its run → file → bytes, our manifest not counted."""
    inside = "/".join(folder.parts[-2:]) if folder.parent.name == "default" else folder.name
    return {inside: {path.relative_to(folder).as_posix(): path.read_bytes() for path in _regular(folder)}}


def _regular(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if stat.S_ISREG(path.lstat().st_mode)]
    return [path for path in found if path.name != "ckptstore.manifest.json" and not path.name.startswith(".ckptstore.")]


def _same(folder: Path, contents: Bytes) -> bool:
    """Whether these files, and none else, lie there as regular files with these bytes."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    there = {path.relative_to(folder).as_posix(): path for path in _regular(folder)}
    other = [path for path in folder.rglob("*") if not path.is_dir() and not stat.S_ISREG(path.lstat().st_mode)]
    if other or there.keys() != contents.keys():
        return False
    return all(
        path.stat().st_size == len(contents[name]) and path.read_bytes() == contents[name] for name, path in there.items()
    )


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """What lies below a folder, without a read of what is huge or no file."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        seen = path.lstat()
        kind = stat.S_IFMT(seen.st_mode)
        data: object = os.readlink(path) if stat.S_ISLNK(seen.st_mode) else None
        if stat.S_ISREG(seen.st_mode) and seen.st_size < 1 << 24:
            data = path.read_bytes()
        mtime_ns = 0 if stat.S_ISDIR(seen.st_mode) else seen.st_mtime_ns
        found[str(path.relative_to(root))] = (kind, seen.st_size if data is not None else 0, mtime_ns, data)
    return found


def unlock(root: Path) -> None:
    for path in root.rglob("*"):
        if not path.is_symlink() and path.is_dir():
            path.chmod(0o755)


def invoke(words: list[str]) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr. Whatever comes out of it is a defect."""
    out, err = io.StringIO(), io.StringIO()
    with bounded(" ".join(words[:3])), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_cli(words)
    return code, out.getvalue(), err.getvalue()


def damage_store(store: Store, rng: random.Random) -> tuple[set[str], str, bool]:
    """One accident to the work copy: the paths that it touched, what it was, and whether to read it all takes long."""
    names = store.files()
    beside = [name for name in names if ".ckptstore/" in name or "recover_info" in name or "logs/" in name]
    few = [name for name in names if name.endswith(("manifest.json", ".metadata", "index.json", ".safetensors"))]
    name = rng.choice(rng.choice((names, beside or names, few)))
    path = store.work / name
    if rng.random() < 0.35:
        kind = rng.choice(list(mutations.ENTRIES))
        mutations.ENTRIES[kind](path)
        return {name}, f"{name} becomes: {kind}", kind in mutations.SLOW
    seen = path.stat()
    data = path.read_bytes()
    new = mutations.mutate(rng, data, "x.jsonl" if name.endswith(".jsonl") else name)
    path.write_bytes(new)
    if rng.random() < 0.8:  # as a disk does, or somebody who hides
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    return {name}, f"{name}: {len(data)} bytes become {new[:60]!r}… ({len(new)})", False
