"""Ctrl-C while a store gives no answer: every verb and every call ends within two seconds, and nothing goes on afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptstore.backends import interruptible, open_backend
from ckptstore.errors import AccessError
from ckptstore.model import CLAIM_NAME, Status
from ckptstore.store import CheckpointStore
from tests import commands, faults, servers, trees
from tests.test_push_pull import EXPORT, bring, keys, send
from tests.test_remote_looking import sealed_run, upload

LIMIT_S = 2.0
#: A file that is read in ranges, by threads.
RANGES = f"{EXPORT}/optim_world_size_1_rank_0.pt"


class Silent:
    """An S3 endpoint that takes requests and answers none."""

    def __init__(self) -> None:
        self.asked: list[str] = []  #: what each request begins with
        self.waiting = 0  #: connections that are open
        self._lock = threading.Lock()
        self._socket = faults.listen(self._serve)
        self.port = self._socket.getsockname()[1]

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self.waiting += 1
        with client, contextlib.suppress(OSError):
            self.asked.append(client.recv(1 << 16).decode())
            while client.recv(1 << 16):
                pass
        with self._lock:
            self.waiting -= 1

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def silent(monkeypatch) -> Iterator[Silent]:
    server = Silent()
    for name, value in servers.environment(server.port).items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture
def proxy(seaweed, s3) -> Iterator[faults.Proxy]:
    proxy = faults.Proxy(seaweed.port)
    yield proxy
    proxy.close()


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    commands.isolate(monkeypatch, tmp_path)
    run = sealed_run(tmp_path / "here", (46,))
    (run / RANGES).write_bytes(os.urandom(1 << 20))
    trees.set_age(run, 3600)
    (run / EXPORT / "ckptstore.manifest.json").unlink()
    CheckpointStore(run).seal(46)
    return run


def start(port: int, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*commands.COMMAND, *map(str, words)],
        env=commands.environment(**servers.environment(port)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], object], what: object = "") -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def stop(process: subprocess.Popen[str], *, times: int = 1, how: int = signal.SIGINT, code: int = 130) -> str:
    """Ctrl-C; what it says. It is in time, and shows nothing of its inside."""
    assert process.poll() is None, process.communicate()
    began = time.monotonic()
    for _ in range(times):
        process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    try:
        error = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert (process.returncode, time.monotonic() - began < LIMIT_S) == (code, True), (process.args, error)
    assert not {"Traceback", "Exception", "Error", "Task"} & set(error.replace(":", " ").split()), error
    return error


def test_every_verb(silent, run, tmp_path):
    """All are begun at once, each at a bucket of its own, and stopped one after the other."""
    running = [
        trees.make_run(tmp_path / name, steps=[46], slot="era_a", slot_step=150, recover_info=150, logs=False)
        for name in ("one", "another")
    ]
    words = {
        "list": ("list", "--run", "URL"),
        "show": ("show", "46", "--run", "URL"),
        "verify": ("verify", "46", "--run", "URL"),
        "push": ("push", "46", "--run", run, "--to", "URL"),
        "pull": ("pull", "46", "--from", "URL", "--to", tmp_path / "there"),
        "setup": ("setup", "--as-is", "--run", run, "--from", "URL"),
        "repair": ("repair", "46", "--run", run, "--from", "URL"),
        "repair-there": ("repair", "46", "--run", "URL", "--from", run),
        "clean": ("clean", "--run", "URL"),
        "watch": ("watch", "--run", running[0], "--to", "URL"),
        "watch-term": ("watch", "--run", running[1], "--to", "URL"),
        "twice": ("list", "--run", "URL"),
    }
    before = commands.snapshot(run)
    processes = {
        name: start(silent.port, *(f"s3://bucket-{name}/run" if word == "URL" else word for word in those))
        for name, those in words.items()
    }
    for name, process in processes.items():
        until(lambda name=name: any(f"/bucket-{name}?" in head or f"/bucket-{name}/" in head for head in silent.asked), name)
        if name.startswith("watch"):
            how = signal.SIGTERM if name == "watch-term" else signal.SIGINT
            assert f"not pushed to s3://bucket-{name}/run: stopped" in stop(process, how=how, code=0)
        else:
            assert stop(process, times=20 if name == "twice" else 1).endswith("interrupted\n")
    assert commands.snapshot(run) == before
    assert not (tmp_path / "there").exists()
    until(lambda: not silent.waiting)


AGAIN = """
from ckptstore import cli
report = cli._report
def pressed(*words, **options):
    report(*words, **options)
    raise KeyboardInterrupt
cli._report = pressed
cli.main()
"""


def test_once_more_while_it_is_being_said(silent):
    process = subprocess.Popen(
        [sys.executable, "-c", AGAIN, "list", "--run", "s3://bucket/run"],
        env=commands.environment(**servers.environment(silent.port)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: silent.asked)
    assert stop(process).endswith("interrupted\n")


def test_in_the_middle_of_the_data(proxy, s3, run, tmp_path):
    """Threads sit in requests for it. A second Ctrl-C changes nothing, and the same command goes on."""
    send(run, s3)
    there = f"{s3}-pushed"
    proxy.choose = lambda request: (
        "stall" if request.path.partition("?")[0].endswith(RANGES) and request.method in ("GET", "PUT") else ""
    )
    words = {
        "verify": ("verify", "46", "--run", s3),
        "pull": ("pull", "46", "--from", s3, "--to", tmp_path / "there"),
        "setup": ("setup", "--as-is", "--run", tmp_path / "checkpoints/alice/gsm8k-grpo/new", "--from", s3),
        "push": ("push", "46", "--run", run, "--to", there),
    }
    processes = {name: start(proxy.port, *those) for name, those in words.items()}
    until(lambda: len(proxy.hit) == len(words), proxy.hit)
    for number, (name, process) in enumerate(processes.items()):
        error = stop(process, times=1 + number % 2 * 20)
        assert error.endswith("interrupted\n"), name
    assert f"{EXPORT}/{CLAIM_NAME}" in keys(there)
    assert not any(checkpoint.status is Status.COMMITTED for checkpoint in CheckpointStore(there))
    assert not (tmp_path / "there" / EXPORT).exists()
    assert send(run, there)[0].committed_before is False
    bring(s3, tmp_path / "there")


def test_what_is_tidied_up_does_not_take_longer(proxy, s3, run):
    """The store took a scratch key, and answers nothing from then on: not its removal, either."""
    proxy.choose = lambda request: "stall" if request.method != "PUT" and "probe-" in request.path else ""
    process = start(proxy.port, "push", "46", "--run", run, "--to", s3)
    until(lambda: proxy.hit)
    stop(process)
    assert proxy.seen[-1].method == "DELETE"
    proxy.hit.clear()
    proxy.choose = lambda request: "stall" if "uploadId" in request.path else ""
    (run / RANGES).write_bytes(os.urandom((16 << 20) + 1))
    (run / EXPORT / "ckptstore.manifest.json").unlink()
    trees.set_age(run, 3600)
    process = start(proxy.port, "push", "46", "--run", run, "--to", s3)
    until(lambda: proxy.hit)
    stop(process)


@contextlib.contextmanager
def interrupted(when: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C of this process as soon as that is so: KeyboardInterrupt comes out in time."""
    came: list[float] = []

    def press() -> None:
        until(when)
        time.sleep(0.1)
        came.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    assert time.monotonic() - came[0] < LIMIT_S
    thread.join()


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda url, run: open_backend(url).put("key", b"1"), id="put"),
        pytest.param(lambda url, run: open_backend(url).get("key"), id="get"),
        pytest.param(lambda url, run: CheckpointStore(url).list(), id="list"),
        pytest.param(lambda url, run: CheckpointStore(url).save(1, run / EXPORT), id="save"),
    ],
)
def test_from_python(silent, run, call):
    with interrupted(lambda: silent.asked):
        call("s3://bucket/run", run)


def test_a_save_from_python_that_cannot_be_taken_back(proxy, s3, run, monkeypatch):
    """Its data hangs, and so does what would remove it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    store = CheckpointStore(s3)
    store.save(1, run / EXPORT)
    proxy.choose = lambda request: "stall" if "step-2" in request.path else ""
    with interrupted(lambda: proxy.hit):
        store.save(2, run / EXPORT)
    proxy.choose = lambda request: ""
    assert [checkpoint.step for checkpoint in store.list() if checkpoint.status.usable] == [1]


def test_who_saves_after_ctrl_c_has_all_the_time(proxy, s3, run, monkeypatch):
    """The end of many a training loop. The store is slow, and nothing was interrupted of this save."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    store = CheckpointStore(s3)
    proxy.choose = lambda request: "" if proxy.seen else time.sleep(interruptible.TIDY_S + 0.5) or ""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        store.save(1, run / EXPORT)
        damaged = faults.response(b"403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>")
        proxy.instead = lambda request: damaged
        slow = iter([interruptible.TIDY_S + 0.5])
        proxy.choose = lambda request: (
            "instead" if request.method == "PUT" else time.sleep(next(slow, 0) if proxy.hit else 0) or ""
        )
        with pytest.raises(AccessError):
            store.save(2, run / EXPORT)
    assert [checkpoint.step for checkpoint in store.list()] == [1]


def test_a_mirror_is_left_by_ctrl_c(silent, run):
    """Its thread sits in a request that is not answered."""
    with interrupted(lambda: silent.asked), CheckpointStore(run).mirror("s3://bucket/run"):
        time.sleep(30)


LEFT_BEHIND = """
import sys, threading
from ckptstore.transfer.pull import pull
from ckptstore.store import CheckpointStore
store = CheckpointStore(sys.argv[1])
try:
    pull(store.backend, store.get(46), sys.argv[2])
except KeyboardInterrupt:
    assert any(thread.name.startswith("ckptstore-") for thread in threading.enumerate())
"""


def test_the_interpreter_ends_with_threads_left_behind(proxy, s3, run, tmp_path):
    """Who catches it and leaves waits for nothing, either."""
    upload(run, open_backend(s3))
    proxy.choose = lambda request: "stall" if request.path.endswith(RANGES) and request.method == "GET" else ""
    process = subprocess.Popen(
        [sys.executable, "-c", LEFT_BEHIND, s3, tmp_path / "there"],
        env=commands.environment(**servers.environment(proxy.port), PYTHONPATH=os.pathsep.join(sys.path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: proxy.hit)
    assert stop(process, code=0) == ""


@pytest.mark.soak
def test_a_process_that_ends_after_a_request_is_not_aborted(seaweed, s3):
    """Nothing of the library's comes back to Python once a request has ended: it would find the interpreter gone."""
    code = f"from ckptstore.backends import open_backend; there = open_backend({s3!r}); there.put('k', b'1'); there.get('k')"
    ending = lambda _: subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode  # noqa: E731
    with ThreadPoolExecutor(4) as crew:
        assert set(crew.map(ending, range(150))) == {0}
