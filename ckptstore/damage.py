"""Damage that was found is remembered, so that the next look, which reads no weights, does not take the checkpoint for whole.

`damaged.json` in the run's side folder: the part's folder relative to the run → the manifest's commit id and what was found.
It counts as long as that manifest does: sealing anew, or a save of the trainer, makes it void. A full verification that finds
the digests right again (a repaired file) forgets it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import Mapping

from ckptstore import side as side_folders
from ckptstore.errors import CkptStoreError
from ckptstore.model import Finding, Part, Status, worst
from ckptstore.untrusted import open_regular

NAME = "damaged.json"
MAX_BYTES = 4 << 20
_EARLIER = " (found earlier)"


def known(side: str) -> dict[str, tuple[str, Finding]]:
    """What is remembered: part folder → commit id of its manifest, and the finding. A file that is not ours counts as none."""
    try:
        with open_regular(os.path.join(side, NAME)) as file:
            document = json.loads(file.read(MAX_BYTES))
        return {
            str(folder): (str(entry["commit"]), Finding(str(entry["path"]), str(entry["problem"]) + _EARLIER, Status.CORRUPT))
            for folder, entry in document["parts"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def forget_for_now(part: Part) -> Part:
    """`part` without what is remembered of it: for the verification that looks anew."""
    findings = tuple(finding for finding in part.findings if not finding.problem.endswith(_EARLIER))
    if len(findings) == len(part.findings):
        return part
    # Only what a manifest vouches for is remembered.
    status = worst([Status.COMPLETE if part.copy else Status.COMMITTED, *(finding.status for finding in findings)])
    return dataclasses.replace(part, findings=findings, status=status)


def remember(side: str, found: Mapping[str, tuple[str, Finding | None]]) -> None:
    """Add to what is remembered: part folder → commit id and finding; None forgets. Nothing happens where none may write.

    A note for later commands: that it cannot be kept must not fail the one that found the damage.
    """
    before = known(side)
    after = dict(before)
    for folder, (commit, finding) in found.items():
        if finding is None:
            after.pop(folder, None)
        else:
            after[folder] = (commit, finding)
    if after == before:
        return
    parts = {
        folder: {"commit": commit, "path": finding.path, "problem": finding.problem.removesuffix(_EARLIER)}
        for folder, (commit, finding) in after.items()
    }
    draft = os.path.join(side, f"{NAME}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError, CkptStoreError):
        side_folders.make_side(side)
        side_folders.write_durably(draft, json.dumps({"version": 1, "parts": parts}).encode())
        os.rename(draft, os.path.join(side, NAME))
