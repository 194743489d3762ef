"""What S3 can tell and obstore does not ask: stored checksums, and multipart uploads that were never finished.

Signed by awscrt (extra `[s3]`) with the credentials that the backend's own requests are signed with. Where a request goes,
the region and the identity are read off a URL that obstore signs: no second reading of endpoints, profiles and styles.
Answers are small, so Python's own HTTP client asks; it follows no redirect, which could carry a signature elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qs, quote, unquote_plus, urlencode, urlsplit
from xml.etree import ElementTree

from ckptstore.backends import object as objects
from ckptstore.backends.base import Backend
from ckptstore.backends.object import ObjectBackend
from ckptstore.errors import AccessError, NotFoundError, StorageError, TransitError, UnavailableError

PAGE = 1000  #: uploads that one answer lists, the most that S3 allows
MAX_ANSWER_BYTES = 16 << 20  #: a page has about one
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,60})</Code>")
_CRC = "x-amz-checksum-crc64nvme"
_SCRATCH = "x"  #: a key that is only named, to see where the bucket is
_SIGNING_S = 30


class Stored(NamedTuple):
    """What a HEAD says of one object. `crc64`: the store's own CRC-64/NVME of all of it, None where it keeps none."""

    size_bytes: int
    crc64: int | None


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
        self._backend = backend
        self._auth = auth
        keys = objects.static_keys()
        self._identity = keys.get("access_key_id", "")
        if self._identity:
            self._provider = auth.AwsCredentialsProvider.new_static(
                self._identity, keys.get("secret_access_key", ""), keys.get("session_token")
            )
        else:  # a machine's role
            self._provider = auth.AwsCredentialsProvider.new_default_chain()

    def head(self, key: str) -> Stored:
        """Size and stored checksum of `key`. NotFoundError where it is not."""
        headers, _ = self._ask("HEAD", key, {}, {"x-amz-checksum-mode": "ENABLED"})
        try:
            size_bytes = int(headers.get("Content-Length", ""))
        except ValueError:
            raise StorageError(f"looking at {self._where(key)}: the store does not say how large it is") from None
        # Of parts' checksums a composite is made, which says nothing of the whole.
        whole = headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT"
        return Stored(size_bytes, _crc64(headers.get(_CRC, "")) if whole else None)

    def refuses_damage(self, key: str) -> bool:
        """Put a byte under the scratch key `key` with the CRC of another one; whether the store noticed."""
        wrong = base64.b64encode(b"\0" * 8).decode()
        try:
            self._ask("PUT", key, {}, {_CRC: wrong, "x-amz-sdk-checksum-algorithm": "CRC64NVME"}, body=b"1")
        except TransitError:
            return True
        return False

    def now_ns(self) -> int:
        """The store's clock, to the second. UnavailableError where it does not tell."""
        query = {"uploads": "", "prefix": self._backend.key_path(_SCRATCH), "max-uploads": "1"}
        headers, _ = self._ask("GET", None, query, {})
        try:
            return int(parsedate_to_datetime(headers.get("Date", "")).timestamp() * 1e9)
        except ValueError:
            raise UnavailableError(f"{self._backend.location}: the store does not tell the time") from None

    def uploads(self) -> Iterator[Upload]:
        """All unfinished multipart uploads below the backend's prefix, page by page."""
        query = {"uploads": "", "prefix": self._backend.key_path(_SCRATCH).removesuffix(_SCRATCH), "max-uploads": str(PAGE)}
        while True:
            _, body = self._ask("GET", None, query, {})
            root = _xml(body, self._backend.location)
            encoded = root.findtext("{*}EncodingType", "") == "url"
            for entry in root.findall("{*}Upload"):
                path = entry.findtext("{*}Key", "")
                path = unquote_plus(path) if encoded else path
                if not path.startswith(query["prefix"]):
                    continue  # a store that knows no prefix here must not have others' uploads aborted
                begun = datetime.fromisoformat(entry.findtext("{*}Initiated", "").replace("Z", "+00:00"))
                key = path.removeprefix(query["prefix"])
                yield Upload(key, entry.findtext("{*}UploadId", ""), int(begun.timestamp() * 1e9))
            key_marker = root.findtext("{*}NextKeyMarker", "")
            marker = {
                "key-marker": unquote_plus(key_marker) if encoded else key_marker,
                "upload-id-marker": root.findtext("{*}NextUploadIdMarker", ""),
            }
            marker = {name: value for name, value in marker.items() if value}  # SeaweedFS goes by upload ids alone
            if root.findtext("{*}IsTruncated", "") != "true" or not marker or query == query | marker:
                return
            query |= marker

    def abort(self, upload: Upload) -> None:
        """End an unfinished upload and free its parts; one that is gone is no error."""
        try:
            self._ask("DELETE", upload.key, {"uploadId": upload.upload_id}, {})
        except NotFoundError:
            return

    def _ask(
        self, method: str, key: str | None, query: dict[str, str], headers: dict[str, str], *, body: bytes = b""
    ) -> tuple[Any, bytes]:
        """Headers and body of the answer. `key` None: the bucket."""
        tries = objects.Tries()
        while True:
            request = self._signed(method, key, query, headers, body)
            try:
                with _OPENER.open(request, timeout=objects.STALL.total_seconds()) as answer:
                    return answer.headers, answer.read(MAX_ANSWER_BYTES)
            except urllib.error.HTTPError as error:
                with error:
                    found = _CODE.search(error.read(1 << 16))
                code = found[1].decode() if found else ""
                if (error.code < 500 and error.code != 429) or error.code == 501 or not tries.again():
                    self._raise(method, key, error.code, code)
            except (OSError, http.client.HTTPException) as error:
                if not tries.again():
                    self._fail(method, key, f"{type(error).__name__}")

    def _signed(self, method: str, key: str | None, query: dict[str, str], headers: dict[str, str], body: bytes) -> Any:
        from awscrt.exceptions import AwsCrtError
        from awscrt.http import HttpHeaders, HttpRequest

        aim = urlsplit(self._backend.signed_url(_SCRATCH if key is None else key))
        asked = parse_qs(aim.query)
        identity, _, region, *_ = asked.get("X-Amz-Credential", ["///"])[0].split("/")
        if self._identity and identity != self._identity:
            raise UnavailableError(f"{self._backend.location}: the store's requests are signed by another identity than ours")
        path = aim.path
        if key is None:
            path = path.removesuffix(f"/{quote(self._backend.key_path(_SCRATCH), safe='/-_.~')}") or "/"
        if query:
            path += "?" + urlencode(query, quote_via=quote, safe="-_.~")
        auth = self._auth
        sending = {"Host": aim.netloc, **headers}
        if body:
            sending |= {"Content-Length": str(len(body)), "Content-Type": "application/octet-stream"}
        request = HttpRequest(method, path, HttpHeaders(list(sending.items())))
        config = auth.AwsSigningConfig(
            credentials_provider=self._provider,
            region=region,
            service="s3",
            use_double_uri_encode=False,
            should_normalize_uri_path=False,
            signed_body_value="UNSIGNED-PAYLOAD" if body else auth.AwsSignedBodyValue.EMPTY_SHA256,
            signed_body_header_type=auth.AwsSignedBodyHeaderType.X_AMZ_CONTENT_SHA_256,
        )
        try:
            auth.aws_sign_request(request, config).result(timeout=_SIGNING_S)
        except (AwsCrtError, TimeoutError) as error:
            name = getattr(error, "name", "") or type(error).__name__
            raise UnavailableError(f"{self._backend.location}: a request cannot be signed: {name}") from None
        signed = {name: value for name, value in request.headers if name.lower() != "content-length"}
        url = f"{aim.scheme}://{aim.netloc}{path}"
        return urllib.request.Request(url, data=body or None, headers=signed, method=method)

    def _where(self, key: str | None) -> str:
        return f"{self._backend.location}/{key}" if key else self._backend.location

    def _raise(self, method: str, key: str | None, status: int, code: str) -> NoReturn:
        what = f"{_DOING[method]} {self._where(key)}"
        said = f"the store answers {status}{f' {code}' if code else ''}"
        if code in ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"):
            raise TransitError(f"{what}: {said}", operation=_DOING[method], path=self._where(key))
        if status == 404:
            raise NotFoundError(f"{what}: {said}")
        if status in (401, 403):
            raise AccessError(f"{what}: {said}", hint="Are the credentials in the environment right, and not expired?")
        if status in (400, 405, 501):
            raise UnavailableError(f"{what}: {said}: it does not know this request")
        self._fail(method, key, said)

    def _fail(self, method: str, key: str | None, said: str) -> NoReturn:
        raise StorageError(
            f"{_DOING[method]} {self._where(key)}: {said}",
            operation=_DOING[method],
            path=self._where(key),
            hint="It was tried several times. Is the store there, and its name right?",
        )


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


_DOING = {"HEAD": "looking at", "PUT": "probing", "GET": "listing unfinished uploads of", "DELETE": "aborting an upload of"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: the answer is an error then."""
        return


_OPENER = urllib.request.build_opener(_NoRedirect)


def _crc64(text: str) -> int | None:
    """The value in base64, big-endian; None for anything else: a composite of parts has `-N` at its end."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return int.from_bytes(data, "big") if len(data) == 8 else None


def _xml(body: bytes, where: str) -> ElementTree.Element:
    try:
        if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
            raise ElementTree.ParseError("it defines entities")
        return ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise StorageError(f"listing unfinished uploads of {where}: the answer is no XML: {error}") from None
