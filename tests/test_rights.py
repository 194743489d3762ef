"""Which rights each command needs in S3, read off its requests: docs/object-stores.md says the same. And who lacks one."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from ckptstore.backends import open_backend
from ckptstore.model import CLAIM_NAME, REMOVING_PREFIX
from ckptstore.retention import Keep
from ckptstore.store import CheckpointStore
from ckptstore.transfer import conditions, sending
from ckptstore.transfer.mirror import mirror
from tests import commands, faults, servers, trees
from tests.test_leftovers import die
from tests.test_push_pull import EXPORT, add_big_file, keys
from tests.test_remote_looking import sealed_run

PAGE = (Path(__file__).parent.parent / "docs/object-stores.md").read_text().partition("### Rights")[2].partition("\n## ")[0]
POLICIES = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]


def promised(command: str) -> tuple[set[str], set[str]]:
    """What the page says that it needs, and may have."""
    (found,) = [cells for cells in ROWS if f"`{command}`" in cells[0]]
    needs, more = (set(re.findall(r"`(\w+)`", cell)) for cell in found[1:])
    return needs, more


def allowed(policy: dict) -> set[str]:
    actions = [one["Action"] for one in policy["Statement"]]
    return {name.removeprefix("s3:") for some in actions for name in ([some] if isinstance(some, str) else some)}


def right(request: faults.Request) -> str:
    """The right that S3 wants for a request."""
    address = urlsplit(request.path)
    query = parse_qs(address.query, keep_blank_values=True)
    if "/" not in address.path.strip("/"):
        return {"list-type": "ListBucket", "uploads": "ListBucketMultipartUploads"}[min({"list-type", "uploads"} & {*query})]
    if request.method == "DELETE":
        return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
    if request.method in ("GET", "HEAD"):
        return "ListMultipartUploadParts" if "uploadId" in query else "GetObject"
    return "PutObject"


class Policy:
    """A proxy that refuses what is not among `rights` (None: nothing), and knows what was asked for."""

    def __init__(self, server_port: int) -> None:
        self.rights: set[str] | None = None
        self.proxy = faults.Proxy(server_port, self._choose, self._refuse)

    def _choose(self, request: faults.Request) -> str:
        return "" if self.rights is None or right(request) in self.rights else "instead"

    def _refuse(self, request: faults.Request) -> bytes:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"
        return faults.response(b"403 Forbidden", b"" if request.method == "HEAD" else body)

    def asked(self) -> set[str]:
        found = {right(request) for request in self.proxy.seen}
        self.proxy.seen.clear()
        conditions.find_out.cache_clear()
        conditions.find_uploads.cache_clear()
        return found


@pytest.fixture
def policy(seaweed, s3, monkeypatch):
    policy = Policy(seaweed.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{policy.proxy.port}")
    yield policy
    policy.proxy.close()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """One step has a file of several parts."""
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(sending, "PART_BYTES", 8 << 20)
    run = sealed_run(tmp_path)
    trees.set_age(add_big_file(run, 9).parent, 3600)
    CheckpointStore(run).seal(46)
    return run


Cli = Callable[..., commands.Result]


@pytest.fixture
def cli(capfd) -> Cli:
    def invoke(*words: object, code: int = 0) -> commands.Result:
        done = commands.invoke(capfd, *words)
        assert done.code == code, done.err
        return done

    return invoke


def test_the_page_and_the_requests(policy, s3, run, cli, tmp_path, monkeypatch):
    """What is asked for, of each command, is what the page says: no more, and no less."""
    there = tmp_path / "there/trial0"

    def agrees(command: str, *words: object, all_of_it: bool = True) -> None:
        policy.asked()
        cli(*words)
        asked = policy.asked()
        needs, more = promised(command)
        assert needs <= asked <= needs | more, (command, asked)
        assert asked == needs | more or not all_of_it, (command, asked)

    agrees("push --dry-run", "push", "46", "--dry-run", "--run", run, "--to", s3, all_of_it=False)
    agrees("push", "push", "46", "--run", run, "--to", s3)
    agrees("list", "list", "--run", s3, all_of_it=False)
    agrees("show", "show", "46", "--run", s3)
    agrees("verify", "verify", "46", "--run", s3)
    agrees("verify", "verify", "46", "--level", "server", "--run", s3)
    agrees("pull", "pull", "46", "--from", s3, "--to", there)
    box = tmp_path / "box/checkpoints/alice/gsm8k-grpo/trial0"
    agrees("setup --from", "setup", "--as-is", "--from", s3, "--run", box)
    trees.bitflip(there / EXPORT / "model.safetensors")
    agrees("repair --from", "repair", "46", "--from", s3, "--run", there)
    open_backend(s3).delete(f"{EXPORT}/vocab.json")
    agrees("repair --run", "repair", "46", "--run", s3, "--from", run, all_of_it=False)
    die(run, s3, monkeypatch, 93)
    monkeypatch.setattr("ckptstore.cli.clean._seconds", lambda text: -2.0)
    agrees("clean --dry-run", "clean", "--dry-run", "--run", s3)
    agrees("clean", "clean", "--run", s3, all_of_it=False)
    steps = f"{s3}-steps"
    writes = promised("push")
    for write in (
        lambda: mirror(open_backend(run), f"{s3}-mirror"),
        lambda: CheckpointStore(steps).save(1, run / EXPORT),
        lambda: CheckpointStore(steps).save(2, run / EXPORT, keep=Keep(1)),
        lambda: CheckpointStore(steps).save(3, run / EXPORT),
    ):
        policy.asked()
        write()
        asked = policy.asked()
        assert writes[0] <= asked <= writes[0] | writes[1], asked
    agrees("prune", "prune", "--run", steps, "--keep-last", "1")


def test_the_policies(policy, s3, run, cli, tmp_path):
    """With the trainer's alone all goes there, and on with the parts of a large file; with the reader's it comes back."""
    trainer, reader = map(allowed, POLICIES)
    policy.rights = trainer
    done = cli("push", "--all", "--run", run, "--to", s3)
    assert "scratch keys and claims stay there" in done.err
    assert "starts over" not in done.err
    assert sum(key.endswith(CLAIM_NAME) for key in keys(s3)) == 2
    policy.rights = reader
    statuses = [checkpoint["status"] for checkpoint in cli("list", "--run", s3, "--json").json["checkpoints"]]
    assert statuses == ["COMMITTED", "COMMITTED"]
    cli("pull", "--all", "--from", s3, "--to", tmp_path / "there/trial0")
    policy.rights = trainer
    cli("push", "--all", "--run", run, "--to", s3)
    policy.rights = None
    assert "COMMITTED" in cli("verify", "--run", s3).out


def test_a_save_without_the_right_to_remove(policy, s3, run):
    policy.rights = allowed(POLICIES[0])
    store = CheckpointStore(s3)
    for _ in range(2):
        store.save(1, run / EXPORT)
    assert store.verify(1).ok


def test_who_may_not_remove_does_not_begin_to_clean(policy, s3, run, cli, monkeypatch):
    """A mark that nobody can take away would keep pushes out of the step's folder for good."""
    die(run, s3, monkeypatch)
    monkeypatch.setattr("ckptstore.cli.clean._seconds", lambda text: -2.0)
    policy.rights = promised("clean")[0] - {"DeleteObject"} | promised("clean")[1]
    done = cli("clean", "--run", s3, code=1)
    assert "removing" in done.err
    assert "docs/object-stores.md" in commands.flat(done.err)
    assert not [key for key in keys(s3) if REMOVING_PREFIX in key]
    policy.rights = None
    cli("push", "46", "--run", run, "--to", s3)
    assert keys(s3) == sorted(f"{EXPORT}/{path.name}" for path in (run / EXPORT).iterdir())


def keep_versions(bucket: str, state: str) -> None:
    body = f'<VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Status>{state}</Status>'
    address = f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}?versioning="
    subprocess.run([*servers._curl("PUT", address), "-d", f"{body}</VersioningConfiguration>"], check=True)


@pytest.mark.parametrize("state", ["", "Enabled", "Suspended"])
def test_what_is_freed_where_versions_are_kept(seaweed, s3, run, cli, monkeypatch, state):
    """As the answers say: no right to look at the bucket's own settings is needed."""
    bucket = f"versions-{state.lower() or 'never'}-{os.getpid()}"
    subprocess.run(servers._curl("PUT", f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}"), check=True)
    if state:
        keep_versions(bucket, state)
    monkeypatch.setattr("ckptstore.cli.clean._seconds", lambda text: -2.0)
    for as_json in (True, False):
        die(run, f"s3://{bucket}/run", monkeypatch, 93)
        done = cli("clean", "--run", f"s3://{bucket}/run", *(["--json"] if as_json else []))
        if as_json:
            assert done.json["freed"] is (state != "Enabled")
            assert done.json["removed"][0]["bytes"] > 0
        else:
            assert (" freed" in done.out) == (state != "Enabled")
            assert ("nothing is freed: this bucket keeps old versions" in commands.flat(done.err)) == (state == "Enabled")


def test_where_nobody_tells_what_is_freed(run, cli, monkeypatch, tmp_path):
    url = f"memory://told-{tmp_path.name}"
    die(run, url, monkeypatch, 93)
    monkeypatch.setattr("ckptstore.cli.clean._seconds", lambda text: -2.0)
    done = cli("clean", "--run", url)
    assert "removed 1: " in done.out
    assert " freed" not in done.out + done.err
