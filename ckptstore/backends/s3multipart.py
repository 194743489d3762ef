"""Multipart uploads to S3 whose parts can be told and added to later: what an upload through the library does not allow.

Where the store is known to keep and check CRC-64/NVME (`digests`), each part travels with its own, and the end with that of the
whole object: the store refuses what is not that. Else a part is known by its ETag, which with most stores is its MD5.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple
from xml.sax.saxutils import escape

from ckptstore.backends.connections import Body, whole
from ckptstore.backends.s3control import CRC, DAMAGED, Reply, S3Control, Upload, crc64_of, text_of, xml_of
from ckptstore.errors import CkptStoreError, NotFoundError, StorageError, UnavailableError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from ckptstore.parallel import Stop

PAGE = 1000  #: parts that one answer lists, the most that S3 allows
_GONE, _FAILED = "NoSuchUpload", "InternalError"
#: Refusals of Complete that another Complete, of other parts, may not meet.
_OTHER_PARTS = (*DAMAGED, "InvalidPart", "EntityTooSmall")
#: What the library sends along when these are set, and we do not: an encryption, above all.
_UNKNOWN = (
    "AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_KMS_KEY_ID", "AWS_SSE_BUCKET_KEY_ENABLED", "AWS_SSE_CUSTOMER_KEY_BASE64",
    "AWS_REQUEST_PAYER", "AWS_S3_EXPRESS",
)  # fmt: skip
_NO = ("", "0", "false", "no", "off")


class Part(NamedTuple):
    """A part as the store has it. `crc64` is None where it tells none."""

    number: int  #: from 1
    size_bytes: int
    etag: str  #: without quotes
    crc64: int | None


class GoneError(NotFoundError):
    """There is no such upload: completed, or aborted."""


class S3Multipart:
    """Multipart uploads to keys of one backend. Thread-safe. Errors as S3Control's; GoneError for an upload that has ended."""

    def __init__(self, control: S3Control, *, digests: bool) -> None:
        self.digests = digests
        self._control = control

    def try_out(self, above: str) -> None:
        """Begin an upload to a scratch key that begins with `above`, see it listed, end it. UnavailableError where it fails."""
        key = f"{above}{secrets.token_hex(8)}"
        upload = self.begin(key)
        try:
            listed = upload.upload_id in [found.upload_id for found in self.unfinished(key)] and not self.parts(upload)
        except CkptStoreError:
            self.abort(upload)
            raise
        self.abort(upload)  # after Ctrl-C it stays: perhaps nothing is answered. It has no parts, and `clean` knows it
        if not listed:
            raise UnavailableError(f"{self._control.backend.location}: the store does not list unfinished uploads")

    def begin(self, key: str) -> Upload:
        """A new upload."""
        doing = "beginning an upload of"
        headers = {"x-amz-checksum-algorithm": "CRC64NVME", "x-amz-checksum-type": "FULL_OBJECT"} if self.digests else {}
        answer = self._control.ask(doing, "POST", key, query={"uploads": ""}, headers=headers)
        upload_id = xml_of(answer.body, f"{doing} {self._control.where(key)}").findtext("{*}UploadId", "")
        if not upload_id:
            raise StorageError(f"{doing} {self._control.where(key)}: the answer names no upload")
        return Upload(key, upload_id, 0)

    def unfinished(self, key: str) -> list[Upload]:
        """The uploads of this very key that have not ended, the newest first, whoever began them."""
        found = [upload for upload in self._control.uploads(key) if upload.key == key]
        return sorted(found, key=lambda upload: -upload.begun_ns)

    def parts(self, upload: Upload) -> list[Part]:
        """What has arrived of it, page by page."""
        doing = "listing the parts of"
        query = {"uploadId": upload.upload_id, "max-parts": str(PAGE)}
        found: list[Part] = []
        while True:
            answer = self._control.ask(doing, "GET", upload.key, query=query, codes=(_GONE,))
            self._see(upload, answer)
            root = xml_of(answer.body, f"{doing} {self._control.where(upload.key)}")
            try:
                found += map(_part, root.findall("{*}Part"))
            except ValueError:
                raise UnavailableError(f"{doing} {self._control.where(upload.key)}: the answer is no list of parts") from None
            marker = root.findtext("{*}NextPartNumberMarker", "")
            if root.findtext("{*}IsTruncated", "") != "true" or marker in ("", query.get("part-number-marker")):
                return found
            query["part-number-marker"] = marker

    def put(self, upload: Upload, number: int, body: Body, *, crc64: int, stop: Stop) -> Part:
        """Send part `number`, of this digest. Waits for the backend's bandwidth; sent again as any request."""
        if (bandwidth := self._control.backend.bandwidth) is not None:
            bandwidth.take(body.size_bytes)
        headers = {CRC: text_of(crc64), "x-amz-sdk-checksum-algorithm": "CRC64NVME"} if self.digests else {}
        query = {"partNumber": str(number), "uploadId": upload.upload_id}
        answer = self._control.ask(
            "writing", "PUT", upload.key, query=query, headers=headers, body=body, long=True, codes=(_GONE,), stop=stop
        )
        self._see(upload, answer)
        return Part(number, body.size_bytes, answer.headers.get("etag", "").strip('"'), crc64)

    def complete(self, upload: Upload, parts: Mapping[int, Part], *, crc64: int, stop: Stop) -> str:
        """Make an object of these parts: "" when it is there, else the code with which the store refuses them.

        GoneError where there is no such upload (any more: it may have come through at an earlier try).
        """
        entries = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(_quoted(parts[number].etag))}</ETag>"
            + (
                f"<ChecksumCRC64NVME>{text_of(crc)}</ChecksumCRC64NVME>"
                if self.digests and (crc := parts[number].crc64) is not None
                else ""
            )
            + "</Part>"
            for number in sorted(parts)
        )
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        body = whole(f'<CompleteMultipartUpload xmlns="{space}">{entries}</CompleteMultipartUpload>'.encode())
        headers = {CRC: text_of(crc64), "x-amz-checksum-type": "FULL_OBJECT"} if self.digests else {}
        for failures in ((_FAILED,), ()):
            answer = self._control.ask(
                "completing the upload of",
                "POST",
                upload.key,
                query={"uploadId": upload.upload_id},
                headers=headers,
                body=body,
                long=True,
                codes=(_GONE, *_OTHER_PARTS, *failures),
                stop=stop,
            )
            self._see(upload, answer)
            if answer.code != _FAILED:
                break
            self.parts(upload)  # Ceph says so, for good, of one that has ended
        return answer.code or ("" if b"CompleteMultipartUploadResult" in answer.body else "an answer without a result")

    def abort(self, upload: Upload) -> None:
        """See S3Control.abort."""
        self._control.abort(upload)

    def holds(self, key: str, size_bytes: int, parts: Mapping[int, Part], *, crc64: int) -> bool:
        """Whether this object lies under `key`, by the digest that the store tells; where it tells none, by all its parts'."""
        try:
            if self.digests:
                return self._control.head(key) == (size_bytes, crc64)
            headers = self._control.ask("looking at", "HEAD", key).headers
            digests = b"".join(bytes.fromhex(parts[number].etag) for number in sorted(parts))
        except (NotFoundError, ValueError):
            return False
        whole = hashlib.md5(digests, usedforsecurity=False).hexdigest()
        return headers.get("etag", "").strip('"') == f"{whole}-{len(parts)}"

    def _see(self, upload: Upload, reply: Reply) -> None:
        if reply.code == _GONE:
            raise GoneError(f"{self._control.where(upload.key)}: the upload has ended meanwhile")


def multipart(control: S3Control, *, digests: bool) -> S3Multipart:
    """Uploads by these control calls. UnavailableError where the environment wants what only the library does."""
    wanted = [name for name in _UNKNOWN if os.environ.get(name, "").lower() not in _NO]
    if os.environ.get("AWS_UNSIGNED_PAYLOAD", "true").lower() in _NO:
        wanted.append("AWS_UNSIGNED_PAYLOAD")
    if wanted:
        raise UnavailableError(f"{control.backend.location}: ${wanted[0]} asks for what only whole uploads can do")
    return S3Multipart(control, digests=digests)


def _part(entry: Element) -> Part:
    return Part(
        int(entry.findtext("{*}PartNumber", "")),
        int(entry.findtext("{*}Size", "")),
        entry.findtext("{*}ETag", "").strip('"'),
        crc64_of(entry.findtext("{*}ChecksumCRC64NVME", "")),
    )


def _quoted(etag: str) -> str:
    return f'"{etag}"'
