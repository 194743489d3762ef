"""What S3 can tell and obstore does not ask: stored checksums, and multipart uploads that were never finished.

Signed by awscrt (extra `[s3]`) with the credentials that the backend's own requests are signed with. Where a request goes,
the region and the identity are read off a URL that obstore signs: no second reading of endpoints, profiles and styles.
Large files go through the same door, part by part (s3multipart.py).
"""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qs, quote, unquote_plus, urlencode, urlsplit
from xml.etree import ElementTree

from ckptstore.backends import connections, profile, proxies, wording
from ckptstore.backends import object as objects
from ckptstore.backends.base import Backend
from ckptstore.backends.connections import NOTHING, Body, Request, whole
from ckptstore.backends.object import ObjectBackend
from ckptstore.backends.tries import PASSING, Tries
from ckptstore.errors import AccessError, CkptStoreError, NotFoundError, StorageError, TransitError, UnavailableError
from ckptstore.parallel import Stop

PAGE = 1000  #: uploads that one answer lists, the most that S3 allows
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,60})</Code>")
#: S3 begins to answer a request that takes long with 200, and may say afterwards that it failed.
_ERROR = re.compile(rb"\s*(<\?xml[^>]*>)?\s*<Error[\s>]")
DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch")  #: by a digest that came along
CRC = "x-amz-checksum-crc64nvme"
_SCRATCH = "x"  #: a key that is only named, to see where the bucket is
_SIGNING_S = 30
_LISTING = "listing unfinished uploads of"
_NEVER = Stop()


class Stored(NamedTuple):
    """What a HEAD says of one object. `crc64`: the store's own CRC-64/NVME of all of it, None where it keeps none."""

    size_bytes: int
    crc64: int | None


class Reply(NamedTuple):
    """What the store answers. `code`: the refusal, where it is one that the caller wanted to see; else ""."""

    headers: Mapping[str, str]
    body: bytes
    code: str = ""


class Upload(NamedTuple):
    """A multipart upload that was begun and neither completed nor aborted. `key` as the backend counts keys."""

    key: str
    upload_id: str
    begun_ns: int


class S3Control:
    """Control calls on the keys of one backend. Thread-safe. Made by control().

    Errors as Backend's, after a bounded number of tries; UnavailableError for what the store does not know.
    """

    def __init__(self, backend: ObjectBackend, auth: Any) -> None:
        self.backend = backend
        self._auth = auth
        self._authorities = profile.authorities().path
        keys = profile.static_keys()
        self._identity = keys.get("access_key_id", "")
        if self._identity:
            self._provider = auth.AwsCredentialsProvider.new_static(
                self._identity, keys.get("secret_access_key", ""), keys.get("session_token")
            )
        else:  # a machine's role
            self._provider = auth.AwsCredentialsProvider.new_default_chain()

    def head(self, key: str) -> Stored:
        """Size and stored checksum of `key`. NotFoundError where it is not."""
        headers = self.ask("looking at", "HEAD", key, headers={"x-amz-checksum-mode": "ENABLED"}).headers
        try:
            size_bytes = int(headers.get("content-length", ""))
        except ValueError:
            raise StorageError(f"looking at {self.where(key)}: the store does not say how large it is") from None
        # Of parts' checksums a composite is made, which says nothing of the whole.
        whole = headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT"
        return Stored(size_bytes, crc64_of(headers.get(CRC, "")) if whole else None)

    def refuses_damage(self, key: str) -> bool:
        """Put a byte under the scratch key `key` with the CRC of another one; whether the store noticed."""
        headers = {CRC: text_of(0), "x-amz-sdk-checksum-algorithm": "CRC64NVME"}
        try:
            self.ask("probing", "PUT", key, headers=headers, body=whole(b"1"))
        except TransitError:
            return True
        return False

    def now_ns(self) -> int:
        """The store's clock, to the second. UnavailableError where it does not tell."""
        query = {"uploads": "", "prefix": self.backend.key_path(_SCRATCH), "max-uploads": "1"}
        headers = self.ask(_LISTING, "GET", None, query=query).headers
        try:
            return int(parsedate_to_datetime(headers.get("date", "")).timestamp() * 1e9)
        except (ValueError, OverflowError):
            raise UnavailableError(f"{self.backend.location}: the store does not tell the time") from None

    def uploads(self, key: str = "") -> Iterator[Upload]:
        """All unfinished multipart uploads below the backend's prefix, page by page; or those to keys that begin with `key`."""
        above = self.backend.key_path(_SCRATCH).removesuffix(_SCRATCH)
        query = {"uploads": "", "prefix": above + key, "max-uploads": str(PAGE)}
        while True:
            root = xml_of(self.ask(_LISTING, "GET", None, query=query).body, f"{_LISTING} {self.backend.location}")
            encoded = root.findtext("{*}EncodingType", "") == "url"
            for entry in root.findall("{*}Upload"):
                path = entry.findtext("{*}Key", "")
                path = unquote_plus(path) if encoded else path
                if not path.startswith(query["prefix"]):
                    continue  # a store that knows no prefix here must not have others' uploads aborted
                upload = Upload(path.removeprefix(above), entry.findtext("{*}UploadId", ""), self._time_ns(entry))
                if not upload.upload_id:  # to abort it could be to remove the object
                    raise UnavailableError(f"{_LISTING} {self.backend.location}: the store does not say which they are")
                if self._can_be_ours(upload.key):
                    yield upload
            key_marker = root.findtext("{*}NextKeyMarker", "")
            marker = {
                "key-marker": unquote_plus(key_marker) if encoded else key_marker,
                "upload-id-marker": root.findtext("{*}NextUploadIdMarker", ""),
            }
            marker = {name: value for name, value in marker.items() if value}  # SeaweedFS goes by upload ids alone
            if root.findtext("{*}IsTruncated", "") != "true" or not marker or query == query | marker:
                return
            query |= marker

    def _can_be_ours(self, key: str) -> bool:
        """No push has a key like `a//b`, and nothing can be asked about it."""
        try:
            return bool(self.backend.key_path(key))
        except NotFoundError:
            return False

    def _time_ns(self, entry: ElementTree.Element) -> int:
        try:
            begun = datetime.fromisoformat(entry.findtext("{*}Initiated", ""))
        except ValueError:
            raise UnavailableError(f"{_LISTING} {self.backend.location}: the store does not say when one was begun") from None
        return int((begun if begun.tzinfo else begun.replace(tzinfo=UTC)).timestamp() * 1e9)

    def remove(self, key: str) -> bool:
        """Remove `key`, there or not; False where the bucket keeps old versions, so that this has only marked it as removed."""
        try:
            headers = self.ask("removing", "DELETE", key).headers
        except NotFoundError:
            return True
        marked = headers.get("x-amz-delete-marker", "").lower() == "true"
        return not marked or headers.get("x-amz-version-id", "null") == "null"  # so named where versions are kept no more

    def abort(self, upload: Upload) -> None:
        """End an unfinished upload and free its parts; one that is gone is no error."""
        try:
            self.ask("aborting an upload of", "DELETE", upload.key, query={"uploadId": upload.upload_id})
        except NotFoundError:
            return

    def ask(
        self,
        doing: str,
        method: str,
        key: str | None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Body = NOTHING,
        long: bool = False,
        codes: tuple[str, ...] = (),
        stop: Stop = _NEVER,
    ) -> Reply:
        """The answer to one request on a key (None: on the bucket), which is tried several times, until told to `stop`.

        `codes`: refusals that are no errors. `long`: it may take a while, as sending a large `body`
        does, which is sent again where it is damaged on its way.
        """
        tries = Tries(self.backend.location)
        while True:
            request = self._signed(method, key, query=query or {}, headers=headers or {}, body=body)
            limit = objects.REQUEST if long else objects.STALL
            try:
                shared = connections.shared(self._authorities)
                answer = shared.ask(request, timeout_s=limit.total_seconds(), stop=stop, tried=tries.made)
            except ssl.SSLCertVerificationError as error:
                raise StorageError(
                    f"{doing} {self.where(key)}: the server's certificate is refused: {error.verify_message}",
                    operation=doing,
                    path=self.where(key),
                    hint=profile.CERTIFICATES,
                ) from None
            except CkptStoreError:  # of the body's: some of them are OSErrors too
                raise
            except (OSError, http.client.HTTPException) as error:
                if not tries.again(stop.wait):
                    self._fail(doing, key, _said(error))
                continue
            status = 500 if answer.status == 200 and _ERROR.match(answer.body) else answer.status
            if 200 <= status < 300:
                return Reply(answer.headers, answer.body)
            found = _CODE.search(answer.body)
            code = found[1].decode() if found else ""
            if code in codes:
                return Reply(answer.headers, answer.body, code)
            passing = status >= 500 or status == 429 or code in PASSING or (long and code in DAMAGED)
            if not passing or status == 501 or not tries.again(stop.wait):
                self._raise(doing, key, status, code)

    def _signed(
        self, method: str, key: str | None, *, query: Mapping[str, str], headers: Mapping[str, str], body: Body
    ) -> Request:
        from awscrt.exceptions import AwsCrtError
        from awscrt.http import HttpHeaders, HttpRequest

        aim = urlsplit(self.backend.signed_url(_SCRATCH if key is None else key))
        asked = parse_qs(aim.query)
        identity, _, region, *_ = asked.get("X-Amz-Credential", ["///"])[0].split("/")
        if self._identity and identity != self._identity:
            raise UnavailableError(f"{self.backend.location}: the store's requests are signed by another identity than ours")
        path = aim.path
        if key is None:
            path = path.removesuffix(f"/{quote(self.backend.key_path(_SCRATCH), safe='/-_.~')}") or "/"
        if query:
            path += "?" + urlencode(query, quote_via=quote, safe="-_.~")
        auth = self._auth
        sending = {"Host": aim.netloc, **headers}
        if body.size_bytes or method == "POST":
            sending |= {"Content-Length": str(body.size_bytes), "Content-Type": "application/octet-stream"}
        request = HttpRequest(method, path, HttpHeaders(list(sending.items())))
        config = auth.AwsSigningConfig(
            credentials_provider=self._provider,
            region=region,
            service="s3",
            use_double_uri_encode=False,
            should_normalize_uri_path=False,
            signed_body_value="UNSIGNED-PAYLOAD" if body.size_bytes else auth.AwsSignedBodyValue.EMPTY_SHA256,
            signed_body_header_type=auth.AwsSignedBodyHeaderType.X_AMZ_CONTENT_SHA_256,
        )
        try:
            auth.aws_sign_request(request, config).result(timeout=_SIGNING_S)
        except (AwsCrtError, TimeoutError) as error:
            name = getattr(error, "name", "") or type(error).__name__
            raise UnavailableError(f"{self.backend.location}: a request cannot be signed: {name}") from None
        return Request(aim.scheme, aim.netloc, method, path, dict(request.headers), body)

    def where(self, key: str | None) -> str:
        """What to call `key`, in an error."""
        return f"{self.backend.location}/{key}" if key else self.backend.location

    def _raise(self, doing: str, key: str | None, status: int, code: str) -> NoReturn:
        what = f"{doing} {self.where(key)}"
        said = f"the store answers {status}{f' {code}' if code else ''}"
        if code in DAMAGED:
            raise TransitError(f"{what}: {said}", operation=doing, path=self.where(key))
        if status == 404:
            raise NotFoundError(f"{what}: {said}")
        if status in (401, 403) or code in objects.EXPIRED:
            raise AccessError(f"{what}: {said}", hint=wording.denied(code))
        if status in (400, 405, 501):
            raise UnavailableError(f"{what}: {said}: it does not know this request")
        self._fail(doing, key, said)

    def _fail(self, doing: str, key: str | None, said: str) -> NoReturn:
        raise StorageError(
            f"{doing} {self.where(key)}: {said}",
            operation=doing,
            path=self.where(key),
            hint=f"It was tried several times. Is the store there, and its name right?{proxies.hint()}",
        )


def _said(error: Exception) -> str:
    """What happened to a request, without anything that the other side has sent but a proxy's refusal."""
    text = "".join(letter for letter in str(error) if letter.isprintable()) if isinstance(error, OSError) else ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def control(backend: Backend) -> S3Control:
    """The control calls of a backend. UnavailableError, with the reason, where there are none. Nothing is asked yet."""
    if not isinstance(backend, ObjectBackend) or not backend.location.startswith("s3://"):
        raise UnavailableError(
            f"{backend.location}: only S3 stores tell their stored checksums and unfinished uploads",
            hint="`ckptstore verify --level full` reads every byte instead.",
        )
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("true", "1"):
        raise UnavailableError(f"{backend.location}: requests are not signed ($AWS_SKIP_SIGNATURE)")
    try:
        import awscrt.auth
        import awscrt.http
    except ImportError as error:
        raise UnavailableError(
            f"{backend.location}: stored checksums and unfinished uploads need the library awscrt: {error}",
            hint='Say: pip install "ckptstore[s3]"',
        ) from None
    return S3Control(backend, awscrt.auth)


def text_of(crc64: int) -> str:
    """As S3 writes a CRC-64/NVME: base64, big-endian."""
    return base64.b64encode(crc64.to_bytes(8, "big")).decode()


def crc64_of(text: str) -> int | None:
    """The value of what text_of() writes; None for anything else: a composite of parts has `-N` at its end."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return int.from_bytes(data, "big") if len(data) == 8 else None


def xml_of(body: bytes, doing: str) -> ElementTree.Element:
    """An answer's document. StorageError, naming what was being done, for what is none."""
    try:
        if b"<!DOCTYPE" in body or b"<!ENTITY" in body or b"\0" in body:  # in UTF-16 they would not be seen
            raise ElementTree.ParseError("it defines entities")
        return ElementTree.fromstring(body)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # an encoding that Python does not know, or not so
        raise StorageError(f"{doing}: the answer is no XML: {error}") from None
