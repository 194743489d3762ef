"""What the object stores' library says of a failure, in words for people: one line, short, without what could be a secret."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"<\?xml.*?<Code>([^<]*)</Code>.*?<Message>([^<]*)</Message>.*")  #: S3's own words in its XML
_PASSWORD = re.compile(r"(?<=://)[^/\s@]*@")  #: of an endpoint
_SECRETS = re.compile(r"(?i)((?:signature|credential|token|sig|secret|key)[\w-]*=)[^&\s\"']+")


#: What the library says around it, of each request alike.
_REQUEST = re.compile(
    r".*?Error performing (?P<method>[A-Z]+) (?P<url>\S+) in \S+?(?:, after (?P<again>\d+) retries, [^-]*)?\s+- (?P<what>.*)"
)
_STATUS = re.compile(r"Server returned \S+ status code: ")
_CAUSE = re.compile(r'(?:message|error): "([^"]{1,200})"')  #: in the library's notes for its developers
_TIMEOUT = re.compile(r"kind: Timeout|source: TimedOut")


def said(error: BaseException, *, again: int = 0) -> str:
    """The text of an error of the library's; how often it was tried `again` by us, else by the library, in it."""
    text, _, notes = str(error).partition("Debug source:")
    text = " ".join(text.split())
    if answer := _ANSWER.search(text):
        text = f"{text[: answer.start()]}{answer[1]}: {answer[2]}"
    if request := _REQUEST.fullmatch(text):
        again = again or int(request["again"] or 0)
        tries = f", {again + 1} tries" if again else ""
        text = f"{_what(request['what'], notes)} ({request['method']} to {_server(request['url'])}{tries})"
    return shown(text)[:400].strip()


def shown(text: str) -> str:
    """`text` without passwords of URLs and other secrets."""
    return _PASSWORD.sub("", _SECRETS.sub(r"\1…", text))


def denied(error: object) -> str:
    """What to try where a store refuses to answer: it knows whose the request is, or it does not."""
    if "RequestTimeTooSkewed" in str(error):
        return "This machine's clock is wrong, or the store's: requests are signed with the time (`date -u` shows it)."
    if "InvalidObjectState" in str(error):
        return "It lies in an archive (Glacier, by a lifecycle rule as a rule): have the store restore it first."
    if "AccessDenied" in str(error):
        return (
            "The credentials are known there, but may not do this; or the bucket is somebody else's. Which rights each command "
            "needs: docs/object-stores.md."
        )
    return "Are the credentials in the environment right, and not expired?"


def _what(text: str, notes: str) -> str:
    """What happened, of a request without an answer by its cause."""
    if text.startswith("HTTP error") and (cause := _CAUSE.search(notes)):
        return cause[1]
    if text.startswith("HTTP error") and _TIMEOUT.search(notes):
        return "no answer in time"
    return _STATUS.sub("the store answers ", text).rstrip(": .")


def _server(url: str) -> str:
    return "/".join(url.split("/")[:3])
