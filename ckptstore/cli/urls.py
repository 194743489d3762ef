"""The run's URL, where it was not typed; and what to do where a URL will not do."""

from __future__ import annotations

import os

from ckptstore.locate import URL_KEY, Where, url_of

URL_VARIABLE = "CKPTSTORE_URL"


def said_url(where: Where, url: str = "") -> tuple[str, str]:
    """The URL of the run, and where it was said: `url`, else $CKPTSTORE_URL, else the YAML's; empty where nowhere."""
    if url:
        return url, "as given"
    if found := os.environ.get(URL_VARIABLE, ""):
        return found, f"${URL_VARIABLE}"
    return url_of(where), f"{URL_KEY} of {where.config}"


#: What to do instead, where a verb works on a run of this machine and was given a URL.
HERE = {
    "setup": "Say where checkpoints come from by --from URL; --run and --fileroot say where the trainer will look.",
    "resume": "Say where checkpoints come from by --from URL; --run and --fileroot say where the trainer will look.",
    "push": "A push goes from a folder to a URL: `ckptstore pull --from URL --to DIR` first, then push from DIR.",
    "seal": "`ckptstore pull` it, seal it here, and push it to another URL.",
    "adopt": "The slot is on the machine that trains; from there `ckptstore watch --to URL` keeps its saves in the store.",
    "watch": "The slot is on the machine that trains; from there `ckptstore watch --to URL` keeps its saves in the store.",
    "status": "Metrics, pins and trips are kept beside the trainer; `ckptstore list --run URL` shows the checkpoints.",
    "plot": "Metrics are kept beside the trainer; `ckptstore list --run URL` shows the checkpoints.",
    "doctor": "It examines the machine that trains; `ckptstore verify --run URL` examines checkpoints there.",
}
