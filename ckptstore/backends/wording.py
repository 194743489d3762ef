"""What the object stores' library says of a failure, in words for people: one line, short, without what could be a secret."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"<\?xml.*?<Code>([^<]*)</Code>.*?<Message>([^<]*)</Message>.*")  #: S3's own words in its XML
_PASSWORD = re.compile(r"(?<=://)[^/\s@]*@")  #: of an endpoint
_SECRETS = re.compile(r"(?i)((?:signature|credential|token|sig|secret|key)[\w-]*=)[^&\s\"']+")


def said(error: BaseException) -> str:
    """The text of an error of the library's."""
    text = " ".join(str(error).split())
    if answer := _ANSWER.search(text):
        text = f"{text[: answer.start()]}{answer[1]}: {answer[2]}"
    text = _PASSWORD.sub("", _SECRETS.sub(r"\1…", text.partition("Debug source:")[0]))
    return text[:400].strip()
