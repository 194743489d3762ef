"""What the environment and the profiles of ~/.aws say of S3: keys, region, endpoint, and whose certificates count."""

from __future__ import annotations

import configparser
import os
from typing import Any

from ckptstore.errors import UsageError

CERTIFICATES = "Name the file with the certificates of your own CA: $AWS_CA_BUNDLE (s3://) or $SSL_CERT_FILE."


def authorities() -> str:
    """The file with certificates of those who vouch for an S3 store, beside those that this machine trusts; or ""."""
    return os.environ.get("AWS_CA_BUNDLE", "")


def endpoint() -> str:
    """Where the environment says that S3 is; or ""."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def static_keys() -> dict[str, str]:
    """The keys that requests to S3 are signed with, by the library's names; none where a machine's role signs them."""
    names = ("access_key_id", "secret_access_key", "session_token")
    found = {name: os.environ.get(f"AWS_{name.upper()}", "") for name in names}
    return found if found["access_key_id"] else read()


def read() -> dict[str, Any]:
    """What ~/.aws says of $AWS_PROFILE, where the environment has no keys: the static ones, and what else it does not say."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    name = os.environ.get("AWS_PROFILE", "default")
    found: dict[str, Any] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.path.expanduser(os.environ.get(variable) or usual))
        except configparser.Error as error:
            raise UsageError(f"${variable} ({usual}) cannot be read: {type(error).__name__}") from None
        if parser.has_section(section):
            found |= dict(parser.items(section))
    keys = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key"}
    keys |= {"aws_session_token": "session_token"} | ({} if endpoint() else {"endpoint_url": "endpoint"})
    keys |= {"region": "region"} if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")) else {}
    return {ours: found[theirs] for theirs, ours in keys.items() if theirs in found}
