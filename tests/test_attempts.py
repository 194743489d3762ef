"""Several writers of one step in an object store: attempts, replacements, and what dead ones leave."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from ckptstore import listing
from ckptstore.backends import Blob, open_backend
from ckptstore.backends.object import ObjectBackend
from ckptstore.cli import clean as clean_cli
from ckptstore.errors import AlreadyExistsError, BusyError, CkptStoreError, ManifestError, RefusedError, StorageError
from ckptstore.frameworks.areal import layout
from ckptstore.manifest import parse
from ckptstore.model import ATTEMPT_PREFIX, CLAIM_NAME, MANIFEST_NAME, Level, Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer import claims, leftovers
from ckptstore.transfer import push as pushing
from ckptstore.verify import verify
from tests import commands, trees
from tests.test_push_pull import EXPORT, bring, crash, keys, other_content, same, send
from tests.test_remote_looking import sealed_run

HOUR_NS = 3600 * 10**9


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else f"memory://attempts-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
def run(tmp_path):
    return sealed_run(tmp_path, (46,))


def state(url: str) -> dict[str, Blob]:
    return {blob.key: blob for blob in open_backend(url).list()}


def cut_short(run: Path, url: str, monkeypatch) -> None:
    """A push that dies when all its files are there."""
    with monkeypatch.context() as planted:
        planted.setattr(pushing._Push, "_look_again", lambda self: crash())
        with pytest.raises(KeyboardInterrupt):
            send(run, url)


def holds(url: str, run: Path, folder: Path) -> None:
    """What readers see at the URL is the checkpoint of `run`: by list, verify and pull."""
    backend = open_backend(url)
    (checkpoint,) = listing.scan(backend).checkpoints
    assert checkpoint.status is Status.COMMITTED, checkpoint.findings
    report = verify(backend, checkpoint, Level.FULL)
    assert report.checkpoint.status is Status.COMMITTED, report.findings
    assert report.bytes_read == CheckpointStore(run).get(46).size_bytes
    bring(url, folder)
    sealed = (run / EXPORT / MANIFEST_NAME).exists()
    if not sealed:
        (folder / EXPORT / MANIFEST_NAME).unlink()
    assert same(run / EXPORT, folder / EXPORT)
    assert not sealed or report.manifest_sha256 == verify(open_backend(run), CheckpointStore(run).get(46)).manifest_sha256


# --- an attempt, and its readers -----------------------------------------------------------------------------------


def test_a_second_writer_writes_beside_the_first(url, run, tmp_path, monkeypatch, capfd):
    """Everything that reads follows the manifest; the SHA-256 that people pin is the same there, here and on the way."""
    commands.isolate(monkeypatch, tmp_path)
    other = other_content(run, tmp_path)
    CheckpointStore(other).seal(46)
    cut_short(run, url, monkeypatch)
    before = state(url)
    (sent,) = send(other, url)
    assert sent.url.rpartition("/")[2].startswith(ATTEMPT_PREFIX)
    assert {key: blob for key, blob in state(url).items() if key in before} == before
    holds(url, other, tmp_path / "there")
    shown = commands.invoke(capfd, "show", "46", "--run", url, "--json").json
    assert shown["parts"][0]["files_path"] == sent.url
    assert {file["path"] for file in shown["parts"][0]["files"]} == {p.name for p in (other / EXPORT).iterdir()} - {
        MANIFEST_NAME
    }
    assert f"below {sent.url}/" in " ".join(commands.invoke(capfd, "list", "--run", url).out.split())
    done = commands.invoke(capfd, "verify", "46", "--run", url, "--json", "--expect-digest", sent.manifest_sha256)
    assert (done.code, done.json["pinned"]) == (0, True)
    again = send(other, url)[0]
    assert (again.sent_bytes, again.committed_before, again.url) == (0, True, sent.url)
    assert f"{sent.url}/" in commands.invoke(capfd, "push", "46", "--run", other, "--to", url).out


def test_the_stores_own_word_follows_it_too(s3, run, tmp_path, monkeypatch):
    """By HEADs of the keys that count, not of what another push left beside the manifest."""
    other = other_content(run, tmp_path)
    CheckpointStore(other).seal(46)
    cut_short(run, s3, monkeypatch)
    (sent,) = send(other, s3)
    assert ATTEMPT_PREFIX in sent.url
    backend = open_backend(s3)
    report = verify(backend, listing.scan(backend).at_step(46)[0], Level.SERVER)
    assert report.ok, report.findings


def test_a_load_follows_it_too(url, tmp_path):
    """A store of steps that was mirrored while somebody else had claimed its place."""
    torch = pytest.importorskip("torch")
    from ckptstore.torch import load, save
    from ckptstore.transfer.mirror import mirror

    store = CheckpointStore(tmp_path / "store")
    save(store, 1, {"weight": torch.arange(5000)})
    claims.make(open_backend(url), "step-1", claims.Claim("another", ()))
    (sent,) = mirror(store.backend, url)
    assert ATTEMPT_PREFIX in sent.url
    assert torch.equal(load(CheckpointStore(url), 1)["weight"], torch.arange(5000))


def test_setup_follows_it_too(s3, run, tmp_path, monkeypatch, capfd):
    commands.isolate(monkeypatch, tmp_path)
    other = other_content(run, tmp_path)
    cut_short(run, s3, monkeypatch)
    send(other, s3)
    here = tmp_path / "checkpoints/alice/exp/here"
    done = commands.invoke(capfd, "setup", "--from", s3, "--run", here, "--as-is", "--json")
    assert done.code == 0, (done.out, done.err)
    slot = here / "default/recover_checkpoint"
    assert (slot / "merges.txt").read_bytes() == (other / EXPORT / "merges.txt").read_bytes()
    assert {path.name for path in slot.iterdir()} == {path.name for path in (other / EXPORT).iterdir()} | {MANIFEST_NAME}


def test_an_attempt_goes_on(url, run, tmp_path, monkeypatch):
    """The same push finds the attempt that it was cut short in."""
    other = other_content(run, tmp_path)
    cut_short(run, url, monkeypatch)
    cut_short(other, url, monkeypatch)
    before = keys(url)
    assert len({key.split("/")[2] for key in before if ATTEMPT_PREFIX in key}) == 1
    assert send(other, url, dry_run=True)[0].sent_bytes == 0
    assert keys(url) == before
    (sent,) = send(other, url)
    assert (sent.sent_bytes, sent.committed_before) == (0, False)
    holds(url, other, tmp_path / "there")


def test_the_loser_is_told(url, run, tmp_path, monkeypatch):
    """Two that are at work at once: the second commits first. The other learns it at its end, and has touched nothing."""
    other = other_content(run, tmp_path)
    won: list[dict[str, Blob]] = []
    real = claims.Place.publish

    def late(self):
        if not won:
            won.append({})
            send(other, url)
            won.append(state(url))
        return real(self)

    monkeypatch.setattr(claims.Place, "publish", late)
    with pytest.raises(AlreadyExistsError, match="came first"):
        send(run, url)
    after = state(url)
    assert {key: after[key] for key in won[1] if CLAIM_NAME not in key} == {
        key: blob for key, blob in won[1].items() if CLAIM_NAME not in key
    }
    holds(url, other, tmp_path / "there")


def test_one_that_commits_while_we_look(url, run, tmp_path, monkeypatch):
    """The whole other push between our look and our claim: its keys are not written to."""
    other = other_content(run, tmp_path)
    real = claims.make
    won: list[dict[str, Blob]] = []

    def late(target, folder, content):
        if not won:
            won.append({})
            send(other, url)
            won.append(state(url))
        return real(target, folder, content)

    monkeypatch.setattr(claims, "make", late)
    with pytest.raises(AlreadyExistsError, match="other bytes"):
        send(run, url)
    assert state(url).items() >= won[1].items()
    holds(url, other, tmp_path / "there")


def test_recover_info_makes_no_attempt(url, run):
    """AReaL's states are read where AReaL reads them."""
    backend = open_backend(url)
    claims.make(backend, layout.RECOVER_INFO, claims.Claim("another", ()))
    manifest = parse((run / EXPORT / MANIFEST_NAME).read_bytes())
    with pytest.raises(BusyError, match="another push"):
        claims.Place(backend, layout.RECOVER_INFO, manifest, fixed=True).find(dry_run=False)


@pytest.mark.parametrize("base", ["..", "../x", "/etc", ".ckptstore.attempt-", ".ckptstore.attempt-0123456789abcdef/..", 7])
def test_a_base_leads_nowhere_else(run, base):
    document = json.loads((run / EXPORT / MANIFEST_NAME).read_bytes())
    with pytest.raises(ManifestError, match="base"):
        parse(json.dumps(document | {"base": base}).encode())


def test_a_copied_attempt_does_not_count_here(url, run, tmp_path, monkeypatch):
    """`aws s3 cp --recursive` of all below a step brings the manifest of an attempt: beside it lie other files."""
    other = other_content(run, tmp_path)
    cut_short(run, url, monkeypatch)
    send(other, url)
    there = tmp_path / "there"
    for blob in open_backend(url).list():
        path = there / blob.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(open_backend(url).get(blob.key))
    (found,) = CheckpointStore(there).list()
    assert found.status is Status.COMPLETE
    assert "object store" in str(found.parts[0].notes)
    assert verify(open_backend(there), found, Level.FULL).checkpoint.status is Status.COMPLETE


def test_an_attempt_whose_files_are_gone(url, run, tmp_path, monkeypatch):
    """A manifest that names files which somebody removed: verify does not take the first writer's files for them."""
    other = other_content(run, tmp_path)
    cut_short(run, url, monkeypatch)
    send(other, url)
    for key in keys(url):
        if ATTEMPT_PREFIX in key:
            open_backend(url).delete(key)
    backend = open_backend(url)
    report = verify(backend, listing.scan(backend).checkpoints[0], Level.QUICK)
    assert report.checkpoint.status is Status.PARTIAL
    with pytest.raises(CkptStoreError):
        bring(url, tmp_path / "there")


# --- a replacement -------------------------------------------------------------------------------------------------


def test_replaced_in_one_act(url, run, tmp_path):
    """Whoever had begun to read the old one can end it; readers see the old one or the new one; and back again."""
    other = other_content(run, tmp_path)
    send(run, url)
    before = state(url)
    assert send(other, url, replace=True, dry_run=True)[0].sent_bytes == CheckpointStore(other).get(46).size_bytes
    assert state(url) == before
    send(other, url, replace=True)
    after = state(url)
    manifest = f"{EXPORT}/{MANIFEST_NAME}"
    assert {key: after[key] for key in before if key != manifest} == {k: b for k, b in before.items() if k != manifest}
    holds(url, other, tmp_path / "there")
    with pytest.raises(AlreadyExistsError, match="other bytes"):
        send(run, url)
    send(run, url, replace=True)
    holds(url, run, tmp_path / "again")


def test_cut_short_the_old_one_stays(url, run, tmp_path, monkeypatch):
    other = other_content(run, tmp_path)
    send(run, url)
    for owner, name in ((pushing._Push, "_look_again"), (claims.Place, "publish")):
        with monkeypatch.context() as planted:
            planted.setattr(owner, name, lambda self: crash())
            with pytest.raises(KeyboardInterrupt):
                send(other, url, replace=True)
        holds(url, run, tmp_path / name)


def test_two_replacements_at_once(s3, run, tmp_path):
    """One is told; what is there is the other one, whole."""
    send(run, s3)
    others = [other_content(run, tmp_path / name) for name in ("a", "b")]
    (others[1] / EXPORT / "merges.txt").write_text("#version: 0.3\n")
    trees.set_age(others[1] / "default", 3600)
    gate = threading.Barrier(2)
    real = claims.Place.publish
    told: list[CkptStoreError] = []

    def together(self):
        gate.wait(30)
        return real(self)

    def write(source: Path) -> None:
        try:
            send(source, s3, replace=True)
        except CkptStoreError as error:
            told.append(error)

    with pytest.MonkeyPatch.context() as planted:
        planted.setattr(claims.Place, "publish", together)
        crew = [threading.Thread(target=write, args=(source,)) for source in others]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
    assert [type(error) for error in told] == [AlreadyExistsError]
    bring(s3, tmp_path / "there")
    merges = (tmp_path / "there" / EXPORT / "merges.txt").read_bytes()
    assert merges in [(source / EXPORT / "merges.txt").read_bytes() for source in others]


def test_several_parts_are_not_replaced(url, tmp_path):
    run = trees.make_run(tmp_path, steps=(46,), parts=("critic", "default"))
    send(run, url)
    with pytest.raises(RefusedError, match="2 parts"):
        send(run, url, replace=True)


def test_a_store_that_ignores_versions_is_named(s3, run, tmp_path, monkeypatch):
    """If-Match without effect: two that replace could not be kept apart."""
    send(run, s3)
    before = state(s3)
    real = ObjectBackend._swap
    monkeypatch.setattr(ObjectBackend, "_swap", lambda self, key, data, expected, version="": real(self, key, data, expected))
    with pytest.raises(RefusedError, match="If-Match"):
        send(other_content(run, tmp_path), s3, replace=True)
    assert {key: blob for key, blob in state(s3).items() if key in before} == before


@pytest.mark.soak
def test_many_replace_at_once(s3):
    """Of many that have seen the same, one is told that it did; the content is its own."""
    backend = open_backend(s3)
    for number in range(5):
        backend.put("key", b"old")
        winners: list[int] = []

        def change(me: int, winners: list[int] = winners) -> None:
            try:
                backend.replace("key", b"%d" % me, expected=b"old")
            except AlreadyExistsError:
                return
            winners.append(me)

        crew = [threading.Thread(target=change, args=(me,)) for me in range(8)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        assert len(winners) == 1, number
        assert backend.get("key") == b"%d" % winners[0]


# --- what dead ones leave ------------------------------------------------------------------------------------------


def listed(*names: str, age_ns: int = 2 * HOUR_NS, now_ns: int = 10 * HOUR_NS) -> list[Blob]:
    return [Blob(name, 1, now_ns - age_ns) for name in names]


CLAIM = f"d/e1/{CLAIM_NAME}"
NAMED = {"d/e1": frozenset({"x", "sub/y"}), "d/e1/in": frozenset({"y"})}
A, B = f"{ATTEMPT_PREFIX}{'a' * 16}", f"{ATTEMPT_PREFIX}{'b' * 16}"


@pytest.mark.parametrize(
    ("names", "bases", "doomed"),
    [
        ((CLAIM, "d/e1/x", "d/e1/sub/y"), {}, {CLAIM, "d/e1/x", "d/e1/sub/y"}),
        (("d/e1/x", "d/e1/sub/y"), {}, set()),  # another tool's
        ((CLAIM, "d/e1/x", "d/e1/stranger"), {}, {CLAIM, "d/e1/x"}),
        ((CLAIM, "d/e1/x", "d/e1/stranger", f"d/e1/{MANIFEST_NAME}", f"d/e1/{A}/x"), {"d/e1": A}, {CLAIM, "d/e1/x"}),
        (("d/e1/x", f"d/e1/{MANIFEST_NAME}"), {}, set()),
        ((CLAIM, "d/e1/x", f"d/e1/{MANIFEST_NAME}"), {"d/e1": ""}, {CLAIM}),
        (("d/e1/x", f"d/e1/{MANIFEST_NAME}", f"d/e1/{A}/x"), {"d/e1": ""}, {f"d/e1/{A}/x"}),
        (("d/e1/x", f"d/e1/{MANIFEST_NAME}", f"d/e1/{A}/x", f"d/e1/{B}/x"), {"d/e1": A}, {f"d/e1/{B}/x"}),
        ((CLAIM, "d/e1/x", f"d/e1/{MANIFEST_NAME}", f"d/e1/{A}/x"), {"d/e1": A}, {CLAIM, "d/e1/x"}),
        ((CLAIM, "d/e1/x", f"d/e1/{MANIFEST_NAME}", f"d/e1/{A}/x"), {}, set()),  # its manifest is not known
        ((CLAIM, "d/e1/x", "d/e2/y", "d/z"), {}, {CLAIM, "d/e1/x"}),
        ((CLAIM, f"d/e1/in/{CLAIM_NAME}", "d/e1/in/y"), {}, {CLAIM, f"d/e1/in/{CLAIM_NAME}", "d/e1/in/y"}),
        ((CLAIM, "d/e1/in/y", f"d/e1/in/{MANIFEST_NAME}"), {}, {CLAIM}),
        ((f"d/e1/{A}/x", f"d/e1/{A}/{CLAIM_NAME}"), {}, {f"d/e1/{A}/x", f"d/e1/{A}/{CLAIM_NAME}"}),
    ],
)  # fmt: skip
def test_what_is_left_over(names, bases, doomed):
    found = leftovers.find(listed(*names), bases, NAMED, older_than_ns=9 * HOUR_NS)
    assert {key for one in found for key in one.keys} == doomed
    assert sum(one.size_bytes for one in found) == len(doomed)
    for one in found:  # the claim goes last: a cleaning that was cut short is found again
        assert not any(CLAIM_NAME in key for key in one.keys[:-1])
    assert leftovers.find(listed(*names), bases, NAMED, older_than_ns=7 * HOUR_NS) == []


@pytest.mark.parametrize("young", [CLAIM, "d/e1/x", f"d/e1/{MANIFEST_NAME}"])
def test_what_is_alive_stays(young):
    """A claim that was renewed, a file that has just come, a manifest that has just replaced another."""
    old = listed(CLAIM, "d/e1/x", f"d/e1/{MANIFEST_NAME}", f"d/e1/{A}/x")
    blobs = [*(blob for blob in old if blob.key != young), *listed(young, age_ns=0)]
    assert leftovers.find(blobs, {"d/e1": A}, NAMED, older_than_ns=9 * HOUR_NS) == []


def test_clean(url, run, tmp_path, monkeypatch, capfd):
    """A loser, a replaced one and a push that died go; what readers see stays; then a push begins anew."""
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(clean_cli, "SHORTEST_S", 0)
    other = other_content(run, tmp_path)
    cut_short(run, url, monkeypatch)
    send(other, url)
    assert commands.invoke(capfd, "clean", "--run", url, "--json").json["removed"] == []
    before = state(url)
    would = commands.invoke(capfd, "clean", "--run", url, "--older-than", "0m", "--dry-run", "--json").json
    assert [(one["name"], one["why"]) for one in would["removed"]] == [(f"{EXPORT}/", "replaced, or lost")]
    assert state(url) == before
    assert "removed 1" in commands.invoke(capfd, "clean", "--run", url, "--older-than", "0m").out
    assert all(ATTEMPT_PREFIX in key or MANIFEST_NAME in key for key in keys(url))
    holds(url, other, tmp_path / "there")
    send(run, url, replace=True)
    time.sleep(0.01)
    done = commands.invoke(capfd, "clean", "--run", url, "--older-than", "0m", "--json").json
    assert len(done["removed"]) == 1
    holds(url, run, tmp_path / "again")


@pytest.mark.parametrize("words", [("--older-than", "soon"), ("--older-than", "-1d"), ("--old-slots",)])
def test_clean_usage(words, capfd, tmp_path, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    assert commands.invoke(capfd, "clean", "--run", "memory://clean/usage", *words).code == 2


def test_clean_keeps_out_of_the_way_of_the_living(url, run, tmp_path, monkeypatch):
    """A push that comes back after the look keeps its files; one that is at work when they go is told."""
    cut_short(run, url, monkeypatch)
    backend = open_backend(url)
    ((found,), _) = leftovers.look(backend, older_than_s=0)
    time.sleep(1.1 if "s3" in url else 0.01)  # this server's times are whole seconds
    claims.share(backend, EXPORT, claims.of(parse((run / EXPORT / MANIFEST_NAME).read_bytes())))
    assert not leftovers.remove(backend, found)
    send(run, url)
    holds(url, run, tmp_path / "there")


def test_a_push_that_was_cleaned_away_is_told(url, run, monkeypatch):
    real = pushing._Push.send

    def cleaned(self, *arguments, **options):
        ((found,), _) = leftovers.look(self.target, older_than_s=-3600)
        assert leftovers.remove(self.target, found)
        return real(self, *arguments, **options)

    monkeypatch.setattr(pushing._Push, "send", cleaned)
    with pytest.raises(StorageError, match="cleaned"):
        send(run, url)
    assert not any(key.endswith(MANIFEST_NAME) for key in keys(url))


def test_a_cleaning_that_was_cut_short(url, run, tmp_path, monkeypatch):
    """Its claim keeps a push out of the half that is left, and the next cleaning finds it."""
    cut_short(run, url, monkeypatch)
    backend = open_backend(url)
    ((found,), _) = leftovers.look(backend, older_than_s=-3600)
    with monkeypatch.context() as planted:
        planted.setattr(leftovers.parallel, "each", lambda *a, **k: crash())
        with pytest.raises(KeyboardInterrupt):
            leftovers.remove(backend, found)
    (sent,) = send(run, url)
    assert ATTEMPT_PREFIX in sent.url
    ((found,), _) = leftovers.look(backend, older_than_s=-3600)
    assert leftovers.remove(backend, found)
    holds(url, run, tmp_path / "there")
    shutil.rmtree(tmp_path / "there")
