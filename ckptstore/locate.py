"""Find the run that is meant, from the little that somebody knows after a crash; and when it is not there, say what is."""

from __future__ import annotations

import difflib
import getpass
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ckptstore import probe
from ckptstore.config import RunConfig, load
from ckptstore.errors import NotFoundError, UsageError
from ckptstore.frameworks.areal.layout import RunRef, discover, parse_export_name, run_ref, sort_out
from ckptstore.native import scan_tree

FILEROOT_VARIABLE = "CKPTSTORE_FILEROOT"
USUAL_FILEROOTS = ("/workspace/outputs/grpo", "./outputs/grpo")

#: Asks a person to pick one of several; None where nobody can be asked.
Ask = Callable[[str, Sequence[str]], str]


@dataclass(frozen=True, slots=True)
class Where:
    """What the user said about where the run is. Everything is optional."""

    run: str = ""
    fileroot: str = ""
    user: str = ""
    experiment: str = ""
    trial: str = ""
    config: str = ""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Located:
    """The run, how it was found, and its configuration where one was read."""

    run: RunRef
    how: str
    config: RunConfig | None = None
    warnings: tuple[str, ...] = field(default=())


def current_user() -> str:
    """The name that AReaL would put in the path: getpass.getuser()."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's uid without a passwd entry
        return str(os.getuid())


def locate(where: Where, *, ask: Ask | None = None) -> Located:
    """The run that `where` means. NotFoundError tells what does exist; UsageError when several fit and nobody can be asked."""
    if where.overrides and not where.config:
        raise UsageError(f"{where.overrides[0]!r} overrides a configuration, and --config names none")
    config = load(where.config, where.overrides) if where.config else None
    if where.run:
        return _at_run(where.run, config)
    fileroot, source = _fileroot(where, config)
    experiment = where.experiment or (config.text("experiment_name") if config else "")
    trial = where.trial or (config.text("trial_name") if config else "")
    found = list(discover(fileroot))
    fits = [
        run
        for run in found
        if (not where.user or run.user == where.user)
        and (not experiment or run.experiment == experiment)
        and (not trial or run.trial == trial)
    ]
    fits = _prefer_user(fits)
    if not fits:
        raise _not_found(fileroot, source, where.user, experiment, trial, found)
    chosen = fits[0] if len(fits) == 1 else _pick(fits, ask)
    how = f"{chosen.path} (fileroot from {source})"
    return Located(chosen, how, config, tuple(_warnings(fileroot, chosen)))


def _at_run(path: str, config: RunConfig | None) -> Located:
    path = os.path.abspath(path)
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        near = difflib.get_close_matches(os.path.basename(path), _names(parent), n=1, cutoff=0.6)
        hint = f"Did you mean {os.path.join(parent, near[0])}?" if near else f"In {parent} there are: {_some(_names(parent))}."
        raise NotFoundError(f"--run {path}: there is no such folder", hint=hint)
    run = run_ref(path)
    tree = sort_out(scan_tree(path, max_depth=2))
    if not (tree.exports or tree.slots or tree.recover_info):
        if parse_export_name(os.path.basename(path)):
            raise UsageError(
                f"--run {path} is one checkpoint, not a run",
                hint=f"Say --run {os.path.dirname(os.path.dirname(path))}, or setup --checkpoint-path {path}.",
            )
        below = list(discover(path)) or [run_ref(os.path.join(path, name)) for name in _names(path)]
        if discover_has_runs(below):
            raise UsageError(
                f"--run {path} is not a run's own folder",
                hint=f"Runs below it: {_some([item.path for item in below])}.",
            )
    return Located(run, f"{path} (given by --run)", config, tuple(_warnings(run.fileroot or path, run)))


def discover_has_runs(runs: Sequence[RunRef]) -> bool:
    """Whether any of the folders looks like a run."""
    for run in runs[:50]:
        tree = sort_out(scan_tree(run.path, max_depth=2))
        if tree.exports or tree.slots:
            return True
    return False


def _fileroot(where: Where, config: RunConfig | None) -> tuple[str, str]:
    """The fileroot and where it was said. Only the usual places must exist to count."""
    said = [
        (where.fileroot, "--fileroot"),
        (os.environ.get(FILEROOT_VARIABLE, ""), f"${FILEROOT_VARIABLE}"),
        (
            config.text("cluster.fileroot") if config else "",
            f"cluster.fileroot of {config.path if config else ''}",
        ),
    ]
    for path, source in said:
        if path:
            if os.path.basename(path.rstrip("/")) == "checkpoints":
                return os.path.dirname(os.path.abspath(path)), f"{source}, without its /checkpoints"
            return os.path.abspath(path), source
    for path in USUAL_FILEROOTS:
        if os.path.isdir(os.path.join(path, "checkpoints")):
            return os.path.abspath(path), f"the usual place {path}"
    raise NotFoundError(
        "no fileroot was given, and none is at the usual places: "
        + ", ".join(os.path.join(path, "checkpoints") for path in USUAL_FILEROOTS),
        hint="Say --fileroot DIR (cluster.fileroot of the trainer's YAML), --config run.yaml, --run DIR, "
        f"or set ${FILEROOT_VARIABLE}.",
    )


def _prefer_user(fits: list[RunRef]) -> list[RunRef]:
    """Several users have such a run: the current one's come first, as AReaL would look for them."""
    mine = [run for run in fits if run.user == current_user()]
    return mine if mine and len({run.user for run in fits}) > 1 else fits


def _pick(fits: list[RunRef], ask: Ask | None) -> RunRef:
    labels = [_label(run, fits) for run in fits]
    if ask is not None:
        return fits[labels.index(ask("Which run?", labels))]
    raise UsageError(
        f"{len(fits)} runs fit: {_some(labels)}",
        hint="Say which with --experiment-name and --trial-name (and --user).",
    )


def _label(run: RunRef, among: list[RunRef]) -> str:
    names = (run.user, run.experiment, run.trial)
    return "/".join(names if len({item.user for item in among}) > 1 else names[1:])


def _not_found(fileroot: str, source: str, user: str, experiment: str, trial: str, found: list[RunRef]) -> NotFoundError:
    wanted = " ".join(
        f"{name} {value!r}" for name, value in (("user", user), ("experiment", experiment), ("trial", trial)) if value
    )
    place = os.path.join(fileroot, "checkpoints")
    message = f"no run {f'of {wanted} ' if wanted else ''}in {place} (fileroot from {source})"
    hints = []
    if not os.path.isdir(fileroot):
        hints.append(f"{fileroot} does not exist")
    elif not os.path.isdir(place):
        hints.append(f"{fileroot} has no checkpoints/ folder; it holds {_some(_names(fileroot))}")
    elif not found:
        hints.append("it holds no run")
    if found:
        hints.append("there are " + "; ".join(_overview(found)))
        for value, names in (
            (user, {r.user for r in found}),
            (experiment, {r.experiment for r in found}),
            (trial, {r.trial for r in found}),
        ):
            near = difflib.get_close_matches(value, sorted(names), n=1, cutoff=0.6) if value and value not in names else []
            if near:
                hints.append(f"did you mean {near[0]!r} for {value!r}?")
    hints.extend(_warnings(fileroot, None))
    return NotFoundError(message, hint=". ".join(text[0].upper() + text[1:] for text in hints) + ".")


def _overview(found: list[RunRef]) -> list[str]:
    lines = []
    for user in sorted({run.user for run in found}):
        runs = [f"{run.experiment}/{run.trial}" for run in found if run.user == user]
        lines.append(f"user {user}: {_some(runs)}")
    return lines[:8]


def _warnings(fileroot: str, run: RunRef | None) -> list[str]:
    warnings = []
    existing = fileroot
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing) or "/"
    if probe.file_system(existing) in ("overlay", "aufs"):
        warnings.append(f"{fileroot} is on the container's own disk (overlay): it is gone with the container")
    elif probe.file_system(existing) in ("tmpfs", "ramfs"):
        warnings.append(f"{fileroot} is in memory ({probe.file_system(existing)}): it is gone with the machine")
    if run is not None and run.user and run.user != current_user():
        warnings.append(f"the run is user {run.user}'s, and you are {current_user()}: AReaL would look elsewhere")
    return warnings


def relative_fileroot(config: RunConfig | None) -> str:
    """The configuration's fileroot if it is relative: then the run is found only from the folder it was started in."""
    fileroot = config.text("cluster.fileroot") if config else ""
    return fileroot if fileroot and not os.path.isabs(fileroot) else ""


def _names(path: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError:
        return []


def _some(names: Sequence[str], limit: int = 8) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
