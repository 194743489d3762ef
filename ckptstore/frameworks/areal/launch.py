"""The command that resumes a run, for the AReaL that will run it: found by its files, never imported.

Up to v0.5 the launchers are in areal/launcher/, from v1.0 in areal/infra/launcher/; single-controller runs (a `scheduler.type`
in the YAML, from v1.0) are started without one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ckptstore.config import RunConfig, load
from ckptstore.errors import CkptStoreError
from ckptstore.frameworks.areal.layout import RunRef

_LAUNCHERS = {
    "areal.infra.launcher": "areal/infra/launcher/local.py",
    "areal.launcher": "areal/launcher/local.py",
}
_VERSION = re.compile(r"""^(?:__version__|version)\s*=\s*["']([0-9][^"']{0,40})["']""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Installation:
    """An AReaL on this machine. `launcher` is the package of its launchers; empty values are unknown."""

    path: str
    version: str
    launcher: str
    how: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command line. What cannot be known stands in it as a placeholder `<…>`, listed with where to get it."""

    words: tuple[str, ...]
    placeholders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_installation(areal_dir: str = "", version: str = "") -> Installation:
    """The AReaL that will train: `areal_dir`, else a checkout in the current folder, else the package of python on PATH."""
    places = [(areal_dir, "--areal-dir")] if areal_dir else [(os.getcwd(), "the current folder")]
    for path, how in places:
        if found := _inspect(path, how):
            return found
    if not areal_dir and not version:
        package = _package_of_python_on_path()
        if package and (found := _inspect(os.path.dirname(package), "the package of python on PATH")):
            return found
    if version:
        launcher = "areal.launcher" if version.lstrip("v").startswith("0.") else "areal.infra.launcher"
        return Installation("", version, launcher, "--areal-version")
    return Installation("", "", "areal.infra.launcher", "not found: the layout of v1.0 and later is assumed")


def _inspect(path: str, how: str) -> Installation | None:
    launcher = next((name for name, file in _LAUNCHERS.items() if os.path.isfile(os.path.join(path, file))), "")
    if not launcher and not os.path.isfile(os.path.join(path, "areal/utils/recover.py")):
        return None
    return Installation(path, _version(path), launcher, how)


def _version(path: str) -> str:
    for name in ("areal/version.py", "pyproject.toml"):
        try:
            with open(os.path.join(path, name), encoding="utf-8", errors="replace") as file:
                match = _VERSION.search(file.read(1 << 16))
        except OSError:
            continue
        if match:
            return match[1]
    try:
        metadata = next((name for name in os.listdir(path) if re.fullmatch(r"areal-[0-9][^-]*\.dist-info", name)), "")
    except OSError:
        return ""
    return metadata.removeprefix("areal-").removesuffix(".dist-info")


def _package_of_python_on_path() -> str:
    """The folder of package `areal` for the trainer's python, found without importing it; empty when there is none."""
    code = (
        "import importlib.util as u; s = u.find_spec('areal'); "
        "print((list(s.submodule_search_locations or []) + [''])[0] if s else '')"
    )
    python = shutil.which("python") or shutil.which("python3") or sys.executable
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=20, check=False, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines and os.path.isdir(lines[-1]) else ""


def resume_command(
    run: RunRef,
    installation: Installation,
    *,
    config: RunConfig | None,
    script: str = "",
    command: Sequence[str] = (),
) -> Command:
    """The exact command that resumes `run`; `command` is the user's own, which only gets what makes it resume."""
    names = [f"experiment_name={run.experiment}", f"trial_name={run.trial}", "recover.mode=auto"]
    placeholders: list[str] = []
    notes: list[str] = []
    if command:
        given = {word.split("=", 1)[0].lstrip("+") for word in command if "=" in word}
        return Command((*command, *(name for name in names if name.split("=", 1)[0] not in given)))
    if not script:
        script = "<SCRIPT>"
        placeholders.append("<SCRIPT>: the training script that started the run (--script FILE, or -- CMD…)")
    path = config.path if config else ""
    if not path:
        path = "<CONFIG>"
        placeholders.append("<CONFIG>: the YAML that started the run (--config FILE)")
    overrides = [word for word in (config.overrides if config else ()) if word.split("=", 1)[0].lstrip("+") not in
                 ("experiment_name", "trial_name", "recover.mode")]  # fmt: skip
    tail = [script, "--config", path, *names, *overrides]
    if config is not None and config.text("scheduler.type"):
        return Command(("python", *tail), tuple(placeholders), tuple(notes))
    nodes = config.get("cluster.n_nodes", 1) if config else 1
    kind = "local"
    if isinstance(nodes, int) and nodes > 1:
        kind = "<ray|slurm>"
        placeholders.append(f"<ray|slurm>: the run has {nodes} nodes; name the launcher that started it")
    launcher = installation.launcher or "areal.infra.launcher"
    if not installation.launcher or (not installation.path and not installation.version):
        notes.append(f"no AReaL was found here: {launcher} is where v1.0 and later have it (--areal-dir, --areal-version)")
    return Command(("python", "-m", f"{launcher}.{kind}", *tail), tuple(placeholders), tuple(notes))


def logged_config(run: RunRef) -> RunConfig | None:
    """The configuration that AReaL kept with the run's logs; None when there is none that can be read."""
    path = os.path.join(run.logs, "config.yaml") if run.logs else ""
    try:
        return load(path) if path else None
    except CkptStoreError:
        return None
