"""What the environment and the profiles of ~/.aws say of S3: keys, region, endpoint, and whose certificates count."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ckptstore.errors import UsageError

CERTIFICATES = (
    "Name the file with your own CA's certificates: $AWS_CA_BUNDLE or ca_bundle in ~/.aws/config (s3://), or $SSL_CERT_FILE."
)


class Authorities(NamedTuple):
    """A file with certificates of those who vouch for an S3 store, beside those that this machine trusts; "" for none."""

    path: str
    said: str  #: where


def authorities() -> Authorities:
    """What the environment says of it, else the profile, as botocore takes it: whoever signs."""
    if path := os.environ.get("AWS_CA_BUNDLE", ""):
        return Authorities(path, "$AWS_CA_BUNDLE")
    return Authorities((_section() or {}).get("ca_bundle", ""), f"ca_bundle of the profile {_name()}")


def hint() -> str:
    """For an error before any request: whose certificates count was said here."""
    found = authorities()
    names = [f"${name}" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
    names += [found.said] if found.path else []
    return f" Are the certificates right ({', '.join(names)})?" if names else ""


def endpoint() -> str:
    """Where the environment says that S3 is; or ""."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def check_endpoint(text: str) -> None:
    """UsageError for what is no URL: the library would crash over it at the first request."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(text)
        port_is_fine = parts.port is None or parts.port > 0
        if parts.scheme in ("http", "https") and parts.hostname and port_is_fine and not re.search(r"[\s\x00-\x1f]", text):
            return
    shown = "" if "@" in text else f" ({text})"
    source = "$AWS_ENDPOINT_URL" if endpoint() else f"endpoint_url of the profile {_name()}"
    raise UsageError(f"the S3 endpoint{shown} is no URL", hint=f"Write http:// or https:// and the host in {source}.")


def whose() -> str:
    """For an error after a request: that nobody's keys were named here; or ""."""
    roles = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if static_keys().get("access_key_id") or any(map(os.environ.get, roles)):
        return ""
    return " No key is set ($AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY, or ~/.aws), so this machine's role was asked for."


def static_keys() -> dict[str, str]:
    """The keys that requests to S3 are signed with, by the library's names; none where a machine's role signs them."""
    names = ("access_key_id", "secret_access_key", "session_token")
    found = {name: os.environ.get(f"AWS_{name.upper()}", "") for name in names}
    return found if found["access_key_id"] else read()


def read() -> dict[str, Any]:
    """What ~/.aws says of $AWS_PROFILE, where the environment has no keys: the static ones, and what else it does not say."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    found = _section()
    if found is None and os.environ.get("AWS_PROFILE"):  # whoever the machine's role is, it is not who was asked for
        raise UsageError(f"there is no profile {_name()} ($AWS_PROFILE) in ~/.aws", hint="Is its name right?")
    found = found or {}
    keys = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key"}
    keys |= {"aws_session_token": "session_token"} | ({} if endpoint() else {"endpoint_url": "endpoint"})
    keys |= {"region": "region"} if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")) else {}
    return {ours: found[theirs] for theirs, ours in keys.items() if theirs in found}


def _name() -> str:
    return os.environ.get("AWS_PROFILE") or "default"


def _section() -> dict[str, str] | None:
    """All that the two files say of the profile; None where neither knows it."""
    name = _name()
    found: dict[str, str] | None = None
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.path.expanduser(os.environ.get(variable) or usual))
        except (configparser.Error, UnicodeDecodeError) as error:
            raise UsageError(f"${variable} ({usual}) cannot be read: {type(error).__name__}") from None
        if parser.has_section(section):
            found = (found or {}) | dict(parser.items(section))
    return found
