"""ObjectBackend: s3://, gs:// and az:// through obstore, and every endpoint that speaks S3.

Credentials and endpoints as each cloud's users expect: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_REGION, instance roles and so
on by obstore itself; the profiles of ~/.aws by us, since obstore reads none. A request is tried again here, by the one bound of
tries.py; who reads a range and finds it wrong asks again (fetching.py), and who sent a file that arrived damaged sends it again
(push.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from ckptstore.backends import interruptible, profile, proxies
from ckptstore.backends.base import Backend, Blob
from ckptstore.backends.tries import NONE, PASSING, Tries, of_the_library
from ckptstore.backends.wording import denied, said
from ckptstore.errors import (
    AccessError,
    AlreadyExistsError,
    NotFoundError,
    RefusedError,
    StorageError,
    TransitError,
    UnavailableError,
    UsageError,
)
from ckptstore.model import DRAFT_PREFIX

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

#: A request on which nothing comes for so long has stalled.
STALL = timedelta(seconds=10)
#: The longest that one request may take. Uploads have no other bound here: for them the library counts the time of sending as
#: waiting for an answer, and a part of 16 MiB among sixteen takes minutes on a slow line. The commands watch their
#: connections themselves (stalls.py).
REQUEST = timedelta(seconds=300)
#: What is sent at once on any line.
SMALL_BYTES = 64 << 10

_REFUSED_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
_NO_BUCKET = re.compile(r"<Code>NoSuchBucket<")
_BAD_DIGEST = re.compile(r"<Code>(BadDigest|InvalidDigest|XAmzContentChecksumMismatch|XAmzContentSHA256Mismatch)<")
_DAMAGED_AGAIN = 3  #: how often what arrived damaged is sent again: of bad memory it would be for ever
EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")  #: S3 answers them with 400
_DENIED = re.compile(rf"status code: 40[13] |<Code>({'|'.join(EXPIRED)})<")
#: The store knows the bucket, and not what is asked of it.
_UNKNOWN = re.compile(r"status code: (405|501) |<Code>(NotImplemented|InvalidArgument|InvalidRequest)<")
#: No other answer comes to the same request. A 400 may also be one that broke off; not that of a HEAD, which has no body.
_FINAL = re.compile(
    rf"status code: 4(?!00|08|09|29)\d\d |status code: 400 .*<Code>(?!{'|'.join(PASSING)})"
    r"|performing HEAD .*status code: 400 |Received (redirect|non-partial)|metadata from headers",
    re.DOTALL,
)


class ObjectBackend(Backend):
    """Keys of one bucket below one prefix. `url` is normal (backends.normal_url)."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.location = url
        self._prefix = parts.path.strip("/")
        self._honours_versions: bool | None = None
        self._obstore = _library()
        kinds = self._obstore.exceptions
        # obstore raises Python's own for what its classes are named after, here and there.
        self._missing = (kinds.NotFoundError, FileNotFoundError)
        self._failures = (kinds.BaseError, FileNotFoundError, NotImplementedError)
        try:
            self._store = _store(parts.scheme, parts.netloc, {"read_timeout": STALL}, NONE)
            self._sending = _store(parts.scheme, parts.netloc, {}, NONE)
            self._by_parts = _store(parts.scheme, parts.netloc, {}, of_the_library())
        except UsageError:
            raise
        except (*self._failures, ValueError) as error:
            raise UsageError(
                f"{url}: {said(error)}",
                hint="Credentials and endpoint come from the environment: docs/object-stores.md." + profile.hint(),
            ) from None

    def get(self, key: str, *, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Backend.get."""
        path = self.key_path(key)
        if length_bytes == 0:
            return b""
        wanted: Any = {"offset": offset_bytes} if length_bytes is None else (offset_bytes, offset_bytes + length_bytes)
        options = {} if not offset_bytes and length_bytes is None else {"range": wanted}

        def read() -> bytes:
            try:
                return self._read(path, options)[0]
            except self._failures as error:
                # A range that begins behind the end is refused by most stores, each in words of its own.
                refused = options and not isinstance(error, self._missing) and not self._passing(error)
                if refused and self._size(key) <= offset_bytes:
                    return b""
                raise

        data = self._tried("reading", key, read)
        self._pay(len(data))  # afterwards: it may be less than was asked for
        return data

    def view(self, key: str, offset_bytes: int, length_bytes: int) -> Buffer:
        """See Backend.view."""
        self._pay(length_bytes)
        path = self.key_path(key)

        def read() -> Any:
            return self._ask("get_range", self._store, path, start=offset_bytes, length=length_bytes)

        data = self._tried("reading", key, read)
        return self._exact(key, offset_bytes, length_bytes, memoryview(data))

    def list(self, prefix: str = "") -> Iterator[Blob]:
        """See Backend.list."""
        below = self.key_path(prefix) if prefix else self._prefix
        cut = len(self._prefix) + 1 if self._prefix else 0
        last: str | None = None
        tries = Tries(self.location)
        while True:
            try:
                for batch in self._pages(self._obstore.list(self._store, prefix=below or None, offset=last, chunk_size=1000)):
                    for meta in batch:
                        last = meta["path"]
                        if last == below:  # ends with a slash in the store: a console's, or a mount's, sign of a folder
                            continue
                        yield Blob(last[cut:], meta["size"], int(meta["last_modified"].timestamp() * 1e9))
                    tries = Tries(self.location)
                return
            except self._failures as error:
                self._again(error, tries, "listing", prefix)

    def _pages(self, listing: Any) -> Iterator[Any]:
        while (page := interruptible.result(lambda: next(listing, None), of=self.location)) is not None:
            yield page

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """See Backend.put."""
        path = self.key_path(key)
        self._pay(memoryview(data).nbytes)
        if if_absent:
            self._create(key, data)
            return

        def write() -> None:
            self._ask("put", self._uploading(data), path, memoryview(data), mode="overwrite", use_multipart=False)

        self._tried("writing", key, write)

    def _uploading(self, data: Buffer) -> Any:
        return self._store if memoryview(data).nbytes <= SMALL_BYTES else self._sending

    def _create(self, key: str, data: Buffer) -> None:
        """When the answer is lost, nobody knows whether it was done. It is repeated.

        A key that is there after a lost answer is read: where it holds `data`, a first try came through. One that is not there
        was not created by anybody: S3 refuses, too, while another request is under way.
        """
        kinds = self._obstore.exceptions
        path = self.key_path(key)
        tries = Tries(self.location)
        lost = False
        while True:
            try:
                self._ask("put", self._uploading(data), path, memoryview(data), mode="create", use_multipart=False)
                return
            except (kinds.AlreadyExistsError, kinds.PreconditionError) as error:
                if self._is_there(key):
                    if lost and self.get(key) == bytes(data):
                        return
                    raise AlreadyExistsError(f"{self.location}/{key} exists already") from None
                if not tries.again():
                    self._raise(error, "writing", key)
            except self._failures as error:
                self._again(error, tries, "writing", key)
                lost = True

    def _is_there(self, key: str) -> bool:
        try:
            return self._size(key) >= 0
        except NotFoundError:
            return False

    def _passing(self, error: Exception) -> bool:
        """Whether the same request may fare better the next time."""
        hopeless = any(what.search(str(error)) for what in (_NO_BUCKET, _DENIED, _REFUSED_CERTIFICATE, _UNKNOWN, _FINAL))
        kinds = self._obstore.exceptions
        return isinstance(error, (kinds.GenericError, kinds.AlreadyExistsError)) and not hopeless  # or a conflict: 409

    def _again(self, error: Exception, tries: Tries, doing: str, key: str) -> None:
        """Wait, where the request may fare better then; else what `error` is, is raised."""
        damaged = _BAD_DIGEST.search(str(error)) is not None and tries.made < _DAMAGED_AGAIN
        if not (damaged or self._passing(error)) or not tries.again():
            self._raise(error, doing, key, tries.made)

    def _tried(self, doing: str, key: str, request: Callable[[], T]) -> T:
        """What a request answers that may be repeated."""
        tries = Tries(self.location)
        while True:
            try:
                return request()
            except self._failures as error:
                self._again(error, tries, doing, key)

    def replace(self, key: str, data: Buffer, *, expected: bytes) -> None:
        """See Backend.replace."""
        if self._honours_versions is None:
            self._honours_versions = self._probe_versions()
        if not self._honours_versions:
            raise RefusedError(
                f"{self.location} does not overwrite under a condition (If-Match): two that replace could not be kept apart",
                hint="Push to another URL.",
            )
        if not self._swap(key, data, expected):
            raise AlreadyExistsError(f"{self.location}/{key} holds something else by now")

    def _swap(self, key: str, data: Buffer, expected: bytes, version: str = "") -> bool:
        """Overwrite if it is `expected`, of this `version`; a lost answer is asked for again, as in _create."""
        tries = Tries(self.location)
        while True:
            try:
                found, meta = self._read(self.key_path(key))
                if found != expected:
                    return bool(tries.made) and self.get(key) == bytes(data)
                mode: Any = {"e_tag": version or meta["e_tag"]}
                self._ask("put", self._sending, self.key_path(key), memoryview(data), mode=mode, use_multipart=False)
                return True
            except self._obstore.exceptions.PreconditionError:
                if self.get(key) == expected:
                    return False
                tries.made += 1
            except self._failures as error:
                self._again(error, tries, "replacing", key)

    def _probe_versions(self) -> bool:
        """Whether a wrong version is refused and the right one is not: some stores ignore the condition, some refuse any."""
        key = f"{DRAFT_PREFIX}probe-{secrets.token_hex(8)}"
        self.put(key, b"1")  # a store that does not answer is not asked to remove it, either
        try:
            with interruptible.tidied(lambda: self._try_to_delete(key)):
                return not self._swap(key, b"2", b"1", '"00000000000000000000000000000000"') and self._swap(key, b"3", b"1")
        except UnavailableError:
            return False

    def _try_to_delete(self, key: str) -> None:
        with contextlib.suppress(AccessError):  # who may remove nothing leaves a scratch key, and is told by conditions.py
            self.delete(key)

    def put_parts(self, key: str, parts: Iterable[Buffer], *, part_bytes: int, parallel: int = 1) -> None:
        """See Backend.put_parts."""
        failed: list[BaseException] = []  # which obstore turns into errors of its own
        try:
            self._obstore.put(
                self._by_parts,
                self.key_path(key),
                self._paid(parts, failed),
                use_multipart=True,
                chunk_size=part_bytes,
                max_concurrency=parallel,
            )
        except BaseException as error:
            if failed:
                raise failed[0] from None
            if isinstance(error, self._failures):
                self._raise(error, "writing", key)
            raise

    def delete(self, key: str) -> None:
        """See Backend.delete."""
        path = self.key_path(key)

        def remove() -> None:
            with contextlib.suppress(*self._missing):
                self._ask("delete", self._store, path)

        self._tried("removing", key, remove)

    def _size(self, key: str) -> int:
        path = self.key_path(key)
        return int(self._tried("reading", key, lambda: self._ask("head", self._store, path))["size"])

    def signed_url(self, key: str) -> str:
        """An address of `key` that works for a minute: whoever sees it can read, so it is never shown. See s3control.py."""
        try:
            url: str = self._ask("sign", self._store, "HEAD", self.key_path(key), expires_in=timedelta(seconds=60))
        except self._failures as error:
            self._raise(error, "signing a request for", key)
        return url

    def key_path(self, key: str) -> str:
        """`key` as the bucket counts keys. NotFoundError for one that would lead out of the prefix."""
        if any(component in ("", ".", "..") for component in key.split("/")):
            raise NotFoundError(f"{key!r} is no key below {self.location}")
        return f"{self._prefix}/{key}" if self._prefix else key

    def _ask(self, name: str, *arguments: Any, **options: Any) -> Any:
        """What a function of the library answers."""
        return interruptible.result(lambda: getattr(self._obstore, name)(*arguments, **options), of=self.location)

    def _read(self, path: str, options: Any = None) -> tuple[bytes, Any]:
        """A whole answer, and what the store says of the object."""

        def read() -> tuple[bytes, Any]:
            found = self._obstore.get(self._store, path, options=options)
            return bytes(found.bytes()), found.meta

        return interruptible.result(read, of=self.location)

    def _raise(self, error: Exception, doing: str, key: str, again: int = 0) -> NoReturn:
        kinds = self._obstore.exceptions
        what = f"{doing} {self.location}/{key}" if key else f"{doing} {self.location}"
        if _NO_BUCKET.search(str(error)):
            raise NotFoundError(
                f"{what}: there is no such bucket", hint="Make it, or look at the URL and the endpoint."
            ) from None
        if isinstance(error, self._missing):
            raise NotFoundError(f"{what}: there is no such key") from None
        if _BAD_DIGEST.search(str(error)):
            raise TransitError(
                f"{what}: what arrived there is not what was sent, and the store refused it",
                operation=doing,
                path=f"{self.location}/{key}",
                hint="The way there, or this machine's memory, damages data. Look for another one.",
            ) from None
        if refused := _REFUSED_CERTIFICATE.search(str(error)):
            raise StorageError(
                f"{what}: the server's certificate is refused: {refused[1]}",
                operation=doing,
                path=f"{self.location}/{key}",
                hint=profile.CERTIFICATES,
            ) from None
        # A LIST that is refused comes as a general error: only its text has the status.
        if isinstance(error, (kinds.PermissionDeniedError, kinds.UnauthenticatedError)) or _DENIED.search(str(error)):
            raise AccessError(
                f"{what}: {said(error)}",
                hint=denied(error) + self._whose(),
            ) from None
        if _UNKNOWN.search(str(error)):
            raise UnavailableError(
                f"{what}: the store does not do what was asked of it: {said(error)}",
                hint="What a store must be able to do: docs/object-stores.md.",
            ) from None
        raise StorageError(
            f"{what}: {said(error, again=again)}",
            operation=doing,
            path=f"{self.location}/{key}",
            hint="Is the store there, and its name right? The same command goes on." + self._whose() + proxies.hint(),
        ) from None

    def _whose(self) -> str:
        return profile.whose() if self.location.startswith("s3://") else ""


def _library() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise UsageError(
            f"object stores need the library obstore: {error}", hint='Say: pip install "ckptstore[object]"'
        ) from error
    return obstore


def _store(scheme: str, bucket: str, timeouts: dict[str, Any], retries: Any) -> Any:
    from obstore.store import AzureStore, GCSStore, S3Store

    options: Any = {"timeout": REQUEST, "connect_timeout": timedelta(seconds=5), **timeouts}
    if scheme == "gs":
        return GCSStore(bucket, client_options=options, retry_config=retries)
    if scheme == "az":
        return AzureStore(bucket, client_options=options, retry_config=retries)
    config: Any = profile.read() | {"disable_bulk_delete": True}  # we remove single keys, and not every store has the other
    endpoint = profile.endpoint() or config.get("endpoint", "")
    if endpoint:
        profile.check_endpoint(endpoint)
    if endpoint.lower().startswith("http://"):
        options["allow_http"] = True
    elif (trusted := profile.authorities()).path:
        try:
            options["root_certificate"] = Path(trusted.path).read_bytes()
        except OSError as error:
            raise UsageError(f"{trusted.said} ({trusted.path}) cannot be read: {error.strerror}") from None
    if not os.environ.get("AWS_CHECKSUM_ALGORITHM"):
        config["checksum_algorithm"] = "CRC64NVME"  # the server checks what arrives, and keeps it
    if not os.environ.get("AWS_UNSIGNED_PAYLOAD"):
        config["unsigned_payload"] = True  # SHA-256 of every byte costs more than all else here together
    return S3Store(bucket, config=config, client_options=options, retry_config=retries)
