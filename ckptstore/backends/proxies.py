"""Which proxy a request goes through: by the rules of the library, so that its requests and ours go one way.

`$HTTPS_PROXY` or `$HTTP_PROXY` by the scheme, else `$ALL_PROXY`; `$NO_PROXY` lists hosts, domains and networks that need none.
Upper case counts before lower case, and nothing where a web server started us: there `$HTTP_PROXY` is what a stranger sends.
"""

from __future__ import annotations

import base64
import ipaddress
import os
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from ckptstore.errors import UnavailableError


class Proxy(NamedTuple):
    """Where it is, and what it wants to be told."""

    host: str
    port: int
    headers: dict[str, str]


def choose(scheme: str, host: str) -> Proxy | None:
    """The proxy on the way to `host`, with or without its port; None where there is none.

    UnavailableError for one that our own requests cannot go through: to go around it would be worse.
    """
    name = urlsplit(f"//{host}").hostname or ""
    if "REQUEST_METHOD" in os.environ or _needs_none(name):
        return None
    return _read(f"{scheme.upper()}_PROXY") or _read("ALL_PROXY")


def hint() -> str:
    """For an error of a request that did not come through: that there may be a proxy on its way."""
    names = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
    found = [f"${name}" for name in (*names, *map(str.lower, names)) if os.environ.get(name)]
    return f" Is the proxy right ({', '.join(found)})?" if found else ""


def _value(name: str) -> str:
    return os.environ.get(name, os.environ.get(name.lower(), ""))


def _read(name: str) -> Proxy | None:
    text = _value(name)
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host:
        return None
    if parts.scheme.startswith("socks") or parts.scheme == "https":
        raise UnavailableError(f"${name} names a proxy of kind {parts.scheme}://, through which only whole uploads can go")
    if parts.scheme != "http":
        return None
    headers = {}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    return Proxy(host, port or 80, headers)


def _needs_none(name: str) -> bool:
    entries = [entry for part in _value("NO_PROXY").split(",") if (entry := part.strip().lower())]
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return any(entry in ("*", name) or f".{name}".endswith(f".{entry.removeprefix('.')}") for entry in entries)
    return any(address in network for entry in entries if (network := _network(entry)) is not None)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
