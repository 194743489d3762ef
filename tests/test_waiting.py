"""A store that does not answer, or refuses: what is said, when, and after how long it ends."""

from __future__ import annotations

import contextlib
import http.server
import random
import socket
import threading
import time
from datetime import timedelta

import pytest

from ckptstore.backends import object as object_backend
from ckptstore.backends import open_backend, tries, waiting
from ckptstore.errors import AccessError, StorageError
from tests import servers

PLACE = "s3://ckpts/nobody/there"


@pytest.fixture
def endpoint(monkeypatch):
    """Sets what the environment says, and how long one waits."""
    monkeypatch.setattr(waiting, "_next_s", 0.0)
    monkeypatch.setattr(waiting, "NOTICE_S", 0.5)
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=3))
    monkeypatch.setattr(object_backend, "STALL", timedelta(seconds=1))

    def point(port: int) -> None:
        for name, value in servers.environment(port).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:hush@127.0.0.1:{port}")

    return point


@contextlib.contextmanager
def silent():
    """A port at which everybody is let in, and nobody is answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


def test_a_store_that_gives_no_answer(endpoint, caplog):
    """It is named while it is still asked, once; and the time that is documented is not spent twice."""
    with silent() as port:
        endpoint(port)
        began = time.monotonic()
        with pytest.raises(StorageError, match="no answer in time") as raised:
            list(open_backend(PLACE).list())
        assert time.monotonic() - began < 5.5
    (said,) = [record.getMessage() for record in caplog.records if "no answer from" in record.getMessage()]
    assert f"{PLACE} (http://127.0.0.1:{port})" in said
    assert "hush" not in said + str(raised.value)


def test_in_a_thread_too(endpoint, caplog, monkeypatch):
    """Of a trainer's mirror, say: there the pauses between the tries are where it is said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    endpoint(port)
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=1))
    monkeypatch.setattr(waiting, "NOTICE_S", 0.1)  # the pauses are drawn: the third try comes after that, and before the end
    backend = open_backend(PLACE)

    def ask() -> None:
        with contextlib.suppress(StorageError):
            list(backend.list())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(30)
    assert f"no answer from {PLACE}" in caplog.text


def test_why_there_is_no_answer(endpoint, monkeypatch):
    """In the words of the system, not of a library: nobody listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    endpoint(port)
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=0.3))
    drawn = random.getstate()
    with pytest.raises(StorageError, match=rf"Connection refused \(GET to http://127.0.0.1:{port}, \d tries\)\n"):
        list(open_backend(PLACE).list())
    assert random.getstate() == drawn, "an outage changes what the trainer draws from its seed"


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("AccessDenied", "may not do this"),
        ("SignatureDoesNotMatch", "right, and not expired"),
        ("RequestTimeTooSkewed", "clock is wrong"),
        ("InvalidObjectState", "an archive"),
    ],
)
def test_who_is_refused_is_told_why(endpoint, code, hint):
    """Right credentials without the right, wrong ones and a wrong clock are three mistakes."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint(server.server_port)
        with pytest.raises(AccessError, match=rf"the store answers 403 Forbidden: {code}: No \(GET to ") as raised:
            list(open_backend(PLACE).list())
        server.shutdown()
    assert hint in raised.value.hint
    assert "list-type" not in str(raised.value)
