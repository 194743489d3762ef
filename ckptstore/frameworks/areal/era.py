"""What the AReaL that will train expects in the slot, told by its source files; its code is never imported.

A    v0.3.x                  Hugging Face files and `optim_world_size_{W}_rank_{R}.pt`
B    v0.4.0 to v1.0.2        DCP with optimizer state; a missing key fails
C    v1.0.3 and later        DCP; `recover.no_load_optim=true` resumes from weights alone
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from ckptstore.frameworks.areal.launch import Installation

_RECOVER_SOURCES = ("areal/utils/recover.py",)


@dataclass(frozen=True, slots=True)
class Era:
    """What a slot must hold. `known` is False when it is an assumption."""

    name: str
    slot_format: str  #: hf+optim or dcp
    can_skip_optimizer: bool
    known: bool
    how: str


A = ("A", "hf+optim", False)
B = ("B", "dcp", False)
C = ("C", "dcp", True)


def of(installation: Installation, slot_format: str = "") -> Era:
    """The era of an installation; where none was found, what the present slot shows; else the newest, said to be assumed."""
    if installation.path and (found := _by_source(installation.path)):
        return Era(*found, known=True, how=f"{installation.how}: {installation.path}")
    if installation.version and (found := _by_version(installation.version)):
        return Era(*found, known=True, how=f"version {installation.version}")
    if slot_format == "hf+optim":
        return Era(*A, known=True, how="the present slot holds optimizer shards as AReaL up to v0.3 writes them")
    if slot_format == "dcp":
        # A zero optimizer loads in B and in C; weights alone only in C.
        return Era(*B, known=True, how="the present slot is DCP (v0.4.0 or later)")
    return Era(*B, known=False, how="no AReaL was found: DCP with optimizer state is assumed, which v0.4.0 and later load")


def _by_source(path: str) -> tuple[str, str, bool] | None:
    text = ""
    for name in _RECOVER_SOURCES:
        try:
            with open(os.path.join(path, name), encoding="utf-8", errors="replace") as file:
                text += file.read(1 << 20)
        except OSError:
            continue
    if not text:
        return None
    if "no_load_optim" in text:
        return C
    return B if re.search(r"""weight_format\s*=\s*["']dcp["']""", text) else A


def _by_version(version: str) -> tuple[str, str, bool] | None:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not numbers:
        return None
    if numbers < (0, 4):
        return A
    return B if numbers < (1, 0, 3) else C
