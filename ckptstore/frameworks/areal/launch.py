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
from ckptstore.errors import CkptStoreError, UsageError
from ckptstore.frameworks.areal.layout import RunRef

OLD_LAUNCHER = "areal.launcher"  #: up to v0.5
NEW_LAUNCHER = "areal.infra.launcher"  #: from v1.0
_LAUNCHERS = {NEW_LAUNCHER: "areal/infra/launcher/local.py", OLD_LAUNCHER: "areal/launcher/local.py"}
_VERSION = re.compile(r"""^(?:__version__|version)\s*=\s*["']([0-9][^"']{0,40})["']""", re.MULTILINE)
_NO_RESUMING = ("disabled", "off", "false")


@dataclass(frozen=True, slots=True)
class Installation:
    """An AReaL on this machine. `launcher` is the package of its launchers; empty values are unknown."""

    path: str
    version: str
    launcher: str
    how: str

    def __str__(self) -> str:
        if not self.launcher:
            return "AReaL: not found here"
        return " ".join(filter(None, ("AReaL", self.version, f"in {self.path}" if self.path else "", f"({self.how})")))


@dataclass(frozen=True, slots=True)
class Command:
    """A command line. What cannot be known stands in it as a placeholder `<…>`, listed with where to get it."""

    words: tuple[str, ...]
    placeholders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_installation(areal_dir: str = "", version: str = "") -> Installation:
    """The AReaL that will train: `areal_dir`, else a checkout in the current folder, else the package of python on PATH.

    `version` decides for one that is not on this machine. UsageError for an `areal_dir` that holds none.
    """
    if areal_dir:
        path = os.path.abspath(areal_dir)
        checkout = os.path.dirname(path) if os.path.basename(path) == "areal" else path  # else it is the package's folder
        found = _inspect(path, "--areal-dir") or _inspect(checkout, "--areal-dir")
        if found is None:
            raise UsageError(
                f"--areal-dir {path}: there is no AReaL",
                hint=f"It is the checkout, or the folder of the package: {' or '.join(sorted(_LAUNCHERS.values()))} lie in it.",
            )
        return found
    if version:
        if not re.match(r"v?[0-9]", version):  # what it reads would be guessed, and said to be known
            raise UsageError(
                f"--areal-version {version} is no version", hint="Say 0.4.1, or v1.0.3; of a checkout --areal-dir."
            )
        old = version.lstrip("v").startswith("0.")
        return Installation("", version.lstrip("v"), OLD_LAUNCHER if old else NEW_LAUNCHER, "--areal-version")
    if found := _inspect(os.getcwd(), "the current folder"):
        return found
    package = _package_of_python_on_path()
    if package and (found := _inspect(os.path.dirname(package), "the package of python on PATH")):
        return found
    return Installation("", "", "", "not found")


def _inspect(path: str, how: str) -> Installation | None:
    launcher = next((name for name, file in _LAUNCHERS.items() if os.path.isfile(os.path.join(path, file))), "")
    return Installation(path, _version(path), launcher, how) if launcher else None


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
    overrides: Sequence[str] = (),
) -> Command:
    """The exact command that resumes `run`; `command` is the user's own, which only gets what makes it resume.

    `overrides` are further KEY=VALUE words that the checkpoint in the slot demands.

    UsageError when the user's own command names another run, or turns resuming off.
    """
    if command:
        return _completed(run, installation, tuple(command), _resuming(run, overrides))
    names = _resuming(run, overrides)
    placeholders: list[str] = []
    notes: list[str] = []
    if not script:
        script = "<SCRIPT>"
        placeholders.append("<SCRIPT>: the training script that started the run (--script FILE, or -- CMD…)")
    path = config.path if config else ""
    if not path:
        path = "<CONFIG>"
        placeholders.append("<CONFIG>: the YAML that started the run (--config FILE)")
    ours = {_key(word) for word in names}
    tail = (
        script,
        "--config",
        path,
        *names,
        *(word for word in (config.overrides if config else ()) if _key(word) not in ours),
    )
    if config is not None and config.text("scheduler.type"):
        notes.append(
            f"the YAML has scheduler.type={config.text('scheduler.type')}: a single-controller run, started without a launcher"
        )
        return Command(("python", *tail), tuple(placeholders), tuple(notes))
    nodes = config.get("cluster.n_nodes", 1) if config else 1
    kind = "local"
    if isinstance(nodes, int) and nodes > 1:
        kind = "<LAUNCHER>"
        placeholders.append(f"<LAUNCHER>: ray or slurm; the run has {nodes} nodes, take the one that started it")
    if not installation.launcher:
        notes.append(
            f"no AReaL was found here (--areal-dir, --areal-version): {NEW_LAUNCHER} is for v1.0 and later, "
            f"{OLD_LAUNCHER} for v0.3 to v0.5"
        )
    return Command(
        ("python", "-m", f"{installation.launcher or NEW_LAUNCHER}.{kind}", *tail), tuple(placeholders), tuple(notes)
    )


def _resuming(run: RunRef, overrides: Sequence[str]) -> tuple[str, ...]:
    """The words that make a command resume `run`. `++`: Hydra refuses a bare KEY=VALUE where the YAML has no such key."""
    return (f"experiment_name={run.experiment}", f"trial_name={run.trial}", "++recover.mode=auto", *overrides)


def _completed(run: RunRef, installation: Installation, command: tuple[str, ...], names: tuple[str, ...]) -> Command:
    """The user's own command with what makes it resume this run."""
    given = {_key(word): word.partition("=")[2].strip("\"'") for word in command if "=" in word}
    for key, wanted in (("experiment_name", run.experiment), ("trial_name", run.trial)):
        if given.get(key, wanted) != wanted:
            raise UsageError(
                f"your command says {key}={given[key]}, and this run's is {wanted}: AReaL would start another run",
                hint=f"Leave {key} out of it, or name the other run: -e EXPERIMENT -t TRIAL.",
            )
    if given.get("recover.mode", "auto").lower() in _NO_RESUMING:
        raise UsageError(
            f"your command says recover.mode={given['recover.mode']}: AReaL would start fresh",
            hint="Leave it out: recover.mode=auto is added.",
        )
    notes = []
    launched = any(f"{package}." in word for word in command for package in _LAUNCHERS)
    if not launched and installation.launcher != NEW_LAUNCHER:
        notes.append("without AReaL's launcher, AReaL up to v0.5 resumes only with AREAL_RECOVER_RUN=1 in its environment")
    return Command((*command, *(word for word in names if _key(word) not in given)), (), tuple(notes))


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def logged_config(run: RunRef) -> RunConfig | None:
    """The configuration that AReaL kept with the run's logs; None when there is none that can be read."""
    path = os.path.join(run.logs, "config.yaml") if run.logs else ""
    try:
        return load(path) if os.path.isfile(path) else None
    except CkptStoreError:
        return None
