"""Proxies and certificates: the library's requests and our own go one way and trust the same, whatever the environment says."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import subprocess
import time
from datetime import timedelta

import pytest

from ckptstore import native
from ckptstore.backends import open_backend, tries
from ckptstore.backends.s3control import control
from ckptstore.errors import NotFoundError, StorageError, UnavailableError, UsageError
from ckptstore.store import CheckpointStore
from ckptstore.transfer import conditions
from tests import servers, trees
from tests.forward import ForwardProxy
from tests.test_push_pull import add_big_file, bring, same, send
from tests.test_remote_looking import sealed_run

NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
CERTIFICATES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
USER, PASSWORD = "someone", "pass@word"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """Whatever this machine says of proxies and certificates."""
    for name in (*NAMES, *(name.lower() for name in NAMES), *CERTIFICATES, "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=1))


@pytest.fixture
def forward():
    proxy = ForwardProxy()
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    """A server that speaks TLS too, with a certificate of a CA that nobody knows: (the port, the CA's file)."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    folder = tmp_path_factory.mktemp("secure")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")  # without it Python refuses a CA from 3.13 on
    openssl("req", "-x509", *new, *usage, "-days", "2", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=a CA of our own")
    openssl("req", *new, "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=127.0.0.1")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n")
    openssl(
        "x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
        "-extfile", "extensions", "-out", "cert.pem",
    )  # fmt: skip
    (folder / "server").mkdir()
    server = servers.start_seaweed(folder / "server", certificate=folder / "cert.pem", key=folder / "key.pem")
    yield server, folder / "ca.pem"
    server.stop()


@pytest.fixture
def s3s(secure, monkeypatch):
    """A URL on it, by TLS."""
    server, authority = secure
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.secure_port}")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    return server.place()


def ways(url: str, forward: ForwardProxy) -> tuple[bool, bool]:
    """Whether the library's requests, and ours, go through the proxy."""
    found = []
    for ask in (lambda backend: backend.put("key", b"1"), lambda backend: control(backend).head("key")):
        forward.seen.clear()
        with contextlib.suppress(StorageError) if ".invalid" in os.environ["AWS_ENDPOINT_URL"] else contextlib.nullcontext():
            ask(open_backend(url))
        found.append(bool(forward.seen))
    return found[0], found[1]


#: What is set, `{}` for the proxy's address, and whether it is used.
SETTINGS = [
    ({}, False),
    ({"HTTP_PROXY": "http://{}"}, True),
    ({"http_proxy": "http://{}"}, True),
    ({"http_proxy": "{}"}, True),
    ({"HTTPS_PROXY": "http://{}"}, False),
    ({"ALL_PROXY": "http://{}"}, True),
    ({"all_proxy": "http://{}/"}, True),
    ({"HTTP_PROXY": "", "ALL_PROXY": "http://{}"}, True),
    ({"HTTP_PROXY": "http://{}", "http_proxy": "http://127.0.0.1:1"}, True),
    ({"HTTP_PROXY": "", "http_proxy": "http://{}"}, False),
    ({"HTTP_PROXY": "ftp://{}"}, False),
    ({"HTTP_PROXY": "ftp://{}", "ALL_PROXY": "http://{}"}, True),
    ({"HTTP_PROXY": "http://{}", "REQUEST_METHOD": "GET"}, False),
    ({"HTTP_PROXY": "http://{}", "no_proxy": "127.0.0.1"}, False),
    ({"HTTP_PROXY": "http://{}", "no_proxy": "127.0.0.1", "NO_PROXY": ""}, True),
]
EXCEPTIONS = [
    ("127.0.0.1", "127.0.0.1", True),
    ("127.0.0.1", "127.0.0.0/8", True),
    ("127.0.0.1", "127.0.0.9/8", True),
    ("127.0.0.1", "10.0.0.0/8, 127.0.0.1 ,example.org", True),
    ("127.0.0.1", "127.0.0.1:{port}", False),
    ("127.0.0.1", "128.0.0.0/8", False),
    ("127.0.0.1", ".0.0.1", False),
    ("127.0.0.1", "*", False),
    ("127.0.0.1", "", False),
    ("localhost", "localhost", True),
    ("localhost", ".localhost", True),
    ("localhost", "LocalHost", True),
    ("localhost", "*", True),
    ("localhost", "host", False),
    ("localhost", "alhost", False),
    ("localhost", "localhost:{port}", False),
    ("localhost", "127.0.0.1", False),
    ("a.store.invalid", "store.invalid", True),
    ("a.store.invalid", ".store.invalid", True),
    ("a.store.invalid", ".invalid", True),
    ("a.store.invalid", "tore.invalid", False),
    ("a.store.invalid", "*.store.invalid", False),
    ("a.store.invalid", "a.store.invalid.", False),
]


@pytest.mark.parametrize(("settings", "used"), SETTINGS, ids=lambda value: ",".join(value) if isinstance(value, dict) else "")
def test_all_requests_go_one_way(s3, forward, monkeypatch, settings, used):
    for name, value in settings.items():
        monkeypatch.setenv(name, value.replace("{}", f"127.0.0.1:{forward.port}"))
    assert ways(s3, forward) == (used, used)


@pytest.mark.parametrize(("host", "exception", "direct"), EXCEPTIONS)
def test_what_needs_no_proxy(seaweed, s3, forward, monkeypatch, host, exception, direct):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{forward.port}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{seaweed.port}")
    monkeypatch.setenv("NO_PROXY", exception.replace("{port}", str(seaweed.port)))
    assert ways(s3, forward) == (not direct, not direct)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "ALL_PROXY"])
def test_a_push_by_tls_through_a_proxy(s3s, forward, tmp_path, monkeypatch, name):
    """Large parts too: not a byte goes around it, and what it wants to know is told it alone."""
    run = sealed_run(tmp_path, (46,))
    trees.set_age(add_big_file(run, 40).parent, 3600)
    CheckpointStore(run).seal(46)
    forward.user = BASIC
    monkeypatch.setenv(name, f"http://{USER}:{PASSWORD.replace('@', '%40')}@127.0.0.1:{forward.port}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"].replace("127.0.0.1", "unknown.invalid"))
    with pytest.raises(StorageError):  # nobody else could find it, and the proxy does not either
        send(run, s3s)
    assert forward.seen
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"].replace("unknown.invalid", "127.0.0.1"))
    forward.seen.clear()
    (sent,) = send(run, s3s)
    assert sent.server_checked_bytes == sent.sent_bytes == CheckpointStore(run).get(46).size_bytes
    assert sent.notes == ()
    assert set(forward.seen) == {f"CONNECT {os.environ['AWS_ENDPOINT_URL'].removeprefix('https://')}"}
    assert len(forward.seen) > 4  # the library's, and ours
    bring(s3s, tmp_path / "there")
    assert same(run / "default", tmp_path / "there/default")


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "https"])
def test_a_proxy_that_only_the_library_speaks_to(s3, seaweed, forward, monkeypatch, scheme):
    """Ours does not go around it: it is not made at all, and that is said."""
    backend = open_backend(s3)
    backend.put("key", b"1")
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://{USER}:{PASSWORD}@127.0.0.1:{forward.port}")
    with pytest.raises(UnavailableError, match=rf"ALL_PROXY.*{scheme}") as caught:
        control(backend).head("key")
    assert PASSWORD not in f"{caught.value!r} {caught.value.hint}"
    uploads, why = conditions.look_for_uploads(backend)
    assert (uploads, "ALL_PROXY" in why) == (None, True)
    looked = conditions.look(backend)
    assert (looked.control, "ALL_PROXY" in looked.check) == (None, True)
    assert forward.seen == []


def test_a_proxy_that_wants_a_password(s3s, forward, monkeypatch):
    """What it answers is said, and where it came from."""
    forward.user = BASIC
    monkeypatch.setenv("HTTPS_PROXY", f"http://{USER}:other@127.0.0.1:{forward.port}")
    for ask in (lambda backend: control(backend).head("key"), lambda backend: backend.put("key", b"1")):
        with pytest.raises(StorageError) as caught:
            ask(open_backend(s3s))
        assert "$HTTPS_PROXY" in caught.value.hint
        assert "other" not in f"{caught.value!r} {caught.value.hint}"
    with pytest.raises(StorageError, match="407"):
        control(open_backend(s3s)).head("key")


def test_a_tls_connection_is_kept(s3s, forward, monkeypatch):
    """What TLS 1.3 sends by itself is not taken for the other side's end."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{forward.port}")
    store = control(open_backend(s3s))
    for _ in range(3):
        with pytest.raises(NotFoundError):
            store.head("key")
    assert len(forward.seen) == 1


# --- certificates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CERTIFICATES)
def test_a_ca_of_ones_own(s3s, secure, tmp_path, monkeypatch, name):
    """In each of the ways that people have: both kinds of requests trust it."""
    monkeypatch.delenv("SSL_CERT_FILE")
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(f"# Főtanúsítvány\n{secure[1].read_text()}")
    if name == "SSL_CERT_DIR":
        subprocess.run(["openssl", "rehash", tmp_path], check=True, capture_output=True)
    monkeypatch.setenv(name, str(tmp_path if name == "SSL_CERT_DIR" else bundle))
    backend = open_backend(s3s)
    backend.put("key", b"1")
    assert control(backend).head("key") == (1, native.crc64(b"1"))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A profile's file that says where certificates are."""

    def write(path: object) -> None:
        (tmp_path / "config").write_text(f"[default]\nregion = us-east-1\n[profile lab]\nca_bundle = {path}\n")

    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    return write


@pytest.mark.parametrize("keys", ["environment", "profile"])
def test_a_ca_in_a_profile(s3s, secure, config, tmp_path, monkeypatch, keys):
    """Of both kinds of requests, as boto3 takes it: wherever the keys are."""
    config(secure[1])
    monkeypatch.delenv("SSL_CERT_FILE")
    if keys == "profile":
        lines = [f"aws_{name} = {os.environ.pop(f'AWS_{name.upper()}')}" for name in ("access_key_id", "secret_access_key")]
        (tmp_path / "credentials").write_text("\n".join(["[lab]", *lines]))
    backend = open_backend(s3s)
    backend.put("key", b"1")
    assert control(backend).head("key") == (1, native.crc64(b"1"))
    monkeypatch.setenv("AWS_PROFILE", "default")  # it says nothing of a CA
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET)
    with pytest.raises(StorageError, match="certificate"):
        open_backend(s3s).get("key")


def test_the_environment_comes_before_the_profile(s3s, secure, config, monkeypatch):
    config("/nowhere")
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(UsageError, match=r"ca_bundle of the profile lab \(/nowhere\) cannot be read"):
        open_backend(s3s)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(secure[1]))
    backend = open_backend(s3s)
    backend.put("key", b"1")
    assert control(backend).head("key") == (1, native.crc64(b"1"))


@pytest.mark.parametrize("bundle", ["", "other"])
def test_a_certificate_that_nobody_vouches_for(s3s, tmp_path, monkeypatch, bundle):
    """Said as what it is, and asked once: it will not change. No variable turns the check off."""
    monkeypatch.setenv("AWS_ALLOW_INVALID_CERTIFICATES", "true")
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=60))
    if bundle:
        words = [
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-keyout",
            "key",
            "-out",
            "other",
            "-subj",
            "/CN=other",
        ]
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=tmp_path)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "other"))
    began = time.monotonic()
    with pytest.raises(StorageError, match="certificate") as caught:
        control(open_backend(s3s)).head("key")
    assert time.monotonic() - began < 2
    assert "$AWS_CA_BUNDLE" in caught.value.hint
    with pytest.raises(StorageError, match="certificate") as caught:
        open_backend(s3s).put("key", b"1")
    assert "$AWS_CA_BUNDLE" in caught.value.hint


@pytest.mark.parametrize("what", ["missing", "a folder", "no certificates", "a bad one"])
@pytest.mark.parametrize("name", ["$AWS_CA_BUNDLE", "$SSL_CERT_FILE", "ca_bundle of the profile lab"])
def test_certificates_that_cannot_be_read(s3s, config, tmp_path, monkeypatch, what, name):
    """Named, with who said it."""
    path = tmp_path / "bundle"
    if what == "a folder":
        path.mkdir()
    elif what != "missing":
        path.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" if what == "a bad one" else "none")
    if name.startswith("$"):
        monkeypatch.setenv(name[1:], str(path))
    else:
        config(path)
    with pytest.raises((UsageError, StorageError)) as caught:
        control(open_backend(s3s)).head("key")
    assert name in f"{caught.value} {caught.value.hint}"


def test_a_bundle_is_no_matter_without_tls(s3, monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere")
    open_backend(s3).put("key", b"1")
