"""Find the run that is meant, from the little that somebody knows after a crash; and when it is not there, say what is."""

from __future__ import annotations

import difflib
import getpass
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ckptstore import probe
from ckptstore.backends import is_url, normal_url, open_backend
from ckptstore.config import RunConfig, load
from ckptstore.errors import AccessError, NotFoundError, UsageError
from ckptstore.frameworks import steps
from ckptstore.frameworks.areal.layout import SIDE, RunRef, discover, parse_export_name, run_ref, sort_out
from ckptstore.native import scan_tree
from ckptstore.surroundings import closed_above, closed_folders, links_in, names_in, near_name, overview, some_of

FILEROOT_VARIABLE = "CKPTSTORE_FILEROOT"
URL_KEY = "ckptstore.url"
USUAL_FILEROOTS = ("/workspace/outputs/grpo", "./outputs/grpo")

#: Asks a person to pick one of several; None where nobody can be asked.
Ask = Callable[[str, Sequence[str]], str]


class NoRunError(NotFoundError):
    """No run where it was looked for. `facts` say what is there instead, one a line."""

    def __init__(self, message: str, *, facts: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.facts = tuple(facts)


class WhichRunError(UsageError):
    """Several runs fit, and nobody could be asked. `facts` are the runs, one a line, the newest first."""

    def __init__(self, message: str, *, facts: Sequence[str], hint: str) -> None:
        super().__init__(message, hint=hint)
        self.facts = tuple(facts)


class RemoteError(UsageError):
    """A URL where only a folder of this machine will do."""


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

    def typed(self) -> str:
        """The same as words of a command line, with a space before; empty where nothing was said."""
        said = (
            ("--run", self.run), ("--config", self.config), ("--fileroot", self.fileroot), ("--user", self.user),
            ("-e", self.experiment), ("-t", self.trial),
        )  # fmt: skip
        words = [word for option, value in said if value for word in (option, value)]
        return "".join(f" {shlex.quote(word)}" for word in (*words, *self.overrides))


@dataclass(frozen=True, slots=True)
class Located:
    """The run, how it was found, and its configuration where one was read."""

    run: RunRef
    how: str  #: "given by --run", or where the fileroot comes from
    config: RunConfig | None = None
    warnings: tuple[str, ...] = field(default=())


def current_user() -> str:
    """The name that AReaL would put in the path: getpass.getuser()."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's uid without a passwd entry
        return str(os.getuid())


def locate(where: Where, *, ask: Ask | None = None, remote: bool = False) -> Located:
    """The run that `where` means; with `remote` it may be a URL, which is not looked at.

    NoRunError tells what does exist; WhichRunError when several fit and nobody can be asked.
    """
    if where.overrides and not where.config:
        raise UsageError(
            f"{where.overrides[0]!r} overrides a configuration, and --config names none",
            hint="Say --config run.yaml as well, the file that the run was started with.",
        )
    config = load(where.config, where.overrides) if where.config else None
    if where.run:
        if remote and is_url(where.run):
            return Located(run_ref(normal_url(where.run)), "given by --run", config)
        return _at_run(_local(where.run, "--run"), config)
    fileroot, source = _fileroot(where, config, remote=remote)
    experiment = where.experiment or (config.text("experiment_name") if config else "")
    trial = where.trial or (config.text("trial_name") if config else "")
    if is_url(fileroot):
        return _at_url(fileroot, source, RunRef("", fileroot, where.user, experiment, trial), config)
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
        raise _not_found(fileroot, source, {"user": where.user, "experiment": experiment, "trial": trial}, found)
    chosen = fits[0] if len(fits) == 1 else _pick(fits, fileroot, ask)
    return Located(chosen, f"fileroot from {source}", config, tuple(_warnings(fileroot, source, config, chosen)))


def _at_url(fileroot: str, source: str, named: RunRef, config: RunConfig | None) -> Located:
    """The run below a fileroot in an object store. Nothing is asked for where all its names are known."""
    names = (named.user, named.experiment, named.trial)
    how = f"fileroot from {source}"
    if all(names):
        return Located(run_ref("/".join((fileroot, "checkpoints", *names))), how, config)
    found = sorted(
        {tuple(blob.key.split("/")[1:4]) for blob in open_backend(fileroot).list("checkpoints") if blob.key.count("/") > 3}
    )
    fits = [ref for ref in found if all(not said or said == have for said, have in zip(names, ref, strict=True))]
    mine = [ref for ref in fits if ref[0] == current_user()]
    fits = mine if mine and len({ref[0] for ref in fits}) > 1 else fits
    if len(fits) == 1:
        return Located(run_ref("/".join((fileroot, "checkpoints", *fits[0]))), how, config)
    place = f"{fileroot}/checkpoints"
    if not fits:
        raise NoRunError(
            f"no such run in {place} ({how})",
            facts=[f"there is {'/'.join(ref)}" for ref in found[:20]] or [f"{place} holds no USER/EXPERIMENT/TRIAL"],
            hint="Say -e EXPERIMENT and -t TRIAL of one that is there, or --run URL.",
        )
    raise WhichRunError(
        f"{len(fits)} runs fit in {place}",
        facts=["/".join(ref) for ref in fits[:20]],
        hint="Say which: --user, --experiment-name (-e) and --trial-name (-t).",
    )


def url_of(where: Where) -> str:
    """The run's URL that its YAML names (ckptstore.url); empty where there is none."""
    return load(where.config, where.overrides).text(URL_KEY) if where.config else ""


def _local(location: str, option: str) -> str:
    """The absolute path that an option names. UsageError for a URL."""
    if location.startswith("file://"):
        return os.path.abspath(location.removeprefix("file://"))
    if "://" in location:
        raise RemoteError(
            f"{option} is a URL ({location.partition('://')[0]}://…), and this works on a run of this machine",
            hint="`ckptstore pull --from URL --to DIR` brings checkpoints to a local disk.",
        )
    return os.path.abspath(os.path.expanduser(location) if location.startswith("~/") else location)


def _at_run(path: str, config: RunConfig | None) -> Located:
    if not os.path.isdir(path):
        if os.path.lexists(path):
            what = "a link that leads nowhere" if os.path.islink(path) and not os.path.exists(path) else "no folder"
            raise NoRunError(f"--run {path} is {what}", hint="Say the run's own folder.")
        if denied := closed_above(path):
            raise AccessError(
                f"--run {path}: {current_user()} may not look into {denied}",
                hint="Run as the user that trains, or fix the permissions.",
            )
        parent = os.path.dirname(path)
        near = difflib.get_close_matches(os.path.basename(path), names_in(parent), n=1, cutoff=0.6)
        hint = f"Did you mean {os.path.join(parent, near[0])}?" if near else ""
        facts = [] if near else [f"{parent} holds {some_of(names_in(parent))}" if os.path.isdir(parent) else f"nor is {parent}"]
        raise NoRunError(f"--run {path}: there is no such folder", facts=facts, hint=hint)
    run = run_ref(path)
    tree = sort_out(scan_tree(path, max_depth=1))
    if not (tree.exports or tree.slots or tree.recover_info):
        _refuse_other_folder(path)
    return Located(run, "given by --run", config, tuple(_warnings(run.fileroot or path, "", config, run)))


def _refuse_other_folder(path: str) -> None:
    """Names the run that was probably meant when `path` is a part, a checkpoint, or a folder of runs."""
    above = os.path.dirname(path)
    if parse_export_name(os.path.basename(path)):
        raise UsageError(
            f"--run {path} is one checkpoint, not a run",
            hint=f"Say --run {os.path.dirname(above)}, or `ckptstore setup --checkpoint-path {path}`.",
        )
    if any(parse_export_name(name) for name in names_in(path)):
        raise UsageError(f"--run {path} is one part of a run", hint=f"Say --run {above}.")
    if any(map(steps.is_step, names_in(path))):
        return  # a store of steps
    if steps.is_step(os.path.basename(path)) and not os.path.isdir(os.path.join(path, SIDE)):
        raise UsageError(f"--run {path} is one step of a store", hint=f"Say --run {above}.")
    below = list(discover(path)) or [run_ref(os.path.join(path, name)) for name in names_in(path)]
    runs = [run for run in below[:200] if _is_run(run.path)]
    if runs:
        raise WhichRunError(
            f"--run {path} is not a run's own folder",
            facts=[f"a run below it: {run.path}" for run in runs[:8]],
            hint=f"Say --run {runs[0].path}" + (", or another of them." if len(runs) > 1 else "."),
        )


def _is_run(path: str) -> bool:
    try:
        tree = sort_out(scan_tree(path, max_depth=1))
    except OSError:
        return False
    return bool(tree.exports or tree.slots) or any(map(steps.is_step, names_in(path)))


def named_run(where: Where) -> RunRef:
    """The run that `where` names, whether it is there or not; what was not said is empty, the user is the current one."""
    config = load(where.config, where.overrides) if where.config else None
    if where.run:
        return run_ref(where.run)
    fileroot = where.fileroot or os.environ.get(FILEROOT_VARIABLE, "") or (config.text("cluster.fileroot") if config else "")
    fileroot = os.path.abspath(fileroot) if fileroot else ""
    user = where.user or current_user()
    experiment = where.experiment or (config.text("experiment_name") if config else "")
    trial = where.trial or (config.text("trial_name") if config else "")
    return RunRef(os.path.join(fileroot, "checkpoints", user, experiment, trial), fileroot, user, experiment, trial)


def _fileroot(where: Where, config: RunConfig | None, *, remote: bool) -> tuple[str, str]:
    """The fileroot and where it was said; with `remote` it may be a URL. Only the usual places must exist to count."""
    said = [
        (where.fileroot, "--fileroot"),
        (os.environ.get(FILEROOT_VARIABLE, ""), f"${FILEROOT_VARIABLE}"),
        (config.text("cluster.fileroot") if config else "", f"cluster.fileroot of {config.path if config else ''}"),
    ]
    for path, source in said:
        if path:
            fileroot = normal_url(path) if remote and is_url(path) else _local(path, source)
            if os.path.basename(fileroot) == "checkpoints":
                return os.path.dirname(fileroot), f"{source}, without its /checkpoints"
            return fileroot, source
    for path in USUAL_FILEROOTS:
        if os.path.isdir(os.path.join(path, "checkpoints")):
            return os.path.abspath(path), f"the usual place {path}"
    raise NoRunError(
        "nobody said where the runs are, and there are none at the usual places",
        facts=[
            *([f"{config.path} has no cluster.fileroot that could be read"] if config else []),
            *([f"what its defaults: name is not read ({config.unread})"] if config and config.unread else []),
            *(f"there is no {os.path.abspath(os.path.join(path, 'checkpoints'))}" for path in USUAL_FILEROOTS),
        ],
        hint="Say --fileroot DIR (cluster.fileroot of the trainer's YAML), --config run.yaml or --run DIR, "
        f"or set ${FILEROOT_VARIABLE}.",
    )


def _prefer_user(fits: list[RunRef]) -> list[RunRef]:
    """Several users have such a run: the current one's come first, as AReaL would look for them."""
    mine = [run for run in fits if run.user == current_user()]
    return mine if mine and len({run.user for run in fits}) > 1 else fits


def _pick(fits: list[RunRef], fileroot: str, ask: Ask | None) -> RunRef:
    """One of several: asked for, the newest first; else WhichRunError."""
    dated = sorted(((_newest_save(run), run) for run in fits), key=lambda pair: (-pair[0][0], pair[1].path))
    several_users = len({run.user for run in fits}) > 1
    labels = []
    for (saved_at_s, step), run in dated:
        names = (run.user, run.experiment, run.trial) if several_users else (run.experiment, run.trial)
        newest = f"newest step {step}, {(time.time() - saved_at_s) / 3600:.1f} h ago" if step >= 0 else "nothing saved"
        labels.append(f"{'/'.join(names)}  ({newest})")
    if ask is not None:
        return dated[labels.index(ask("Which run?", labels))][1]
    more = [f"and {len(labels) - 20} more"] if len(labels) > 20 else []
    raise WhichRunError(
        f"{len(fits)} runs fit in {os.path.join(fileroot, 'checkpoints')}",
        facts=[*labels[:20], *more],
        hint=f"Say which: {'--user, ' if several_users else ''}--experiment-name (-e) and --trial-name (-t).",
    )


def _newest_save(run: RunRef) -> tuple[float, int]:
    """When the newest export of a run was written, and its step; (0, -1) without one."""
    newest: tuple[float, int] = (0.0, -1)
    for part in names_in(run.path):
        for name in names_in(os.path.join(run.path, part)):
            export = parse_export_name(name)
            if export is not None and export.step > newest[1]:
                try:
                    newest = (os.stat(os.path.join(run.path, part, name)).st_mtime, export.step)
                except OSError:
                    continue
    return newest


def _not_found(fileroot: str, source: str, wanted: dict[str, str], found: list[RunRef]) -> NoRunError:
    named = " ".join(f"{name} {value!r}" for name, value in wanted.items() if value)
    place = os.path.join(fileroot, "checkpoints")
    facts = []
    if closed_above(place):
        pass  # what is there is not known; closed_folders() says where it ends
    elif not os.path.isdir(fileroot):
        facts.append(f"{fileroot} does not exist")
    elif not os.path.isdir(place):
        facts.append(f"{fileroot} has no folder checkpoints/; it holds {some_of(names_in(fileroot))}")
    elif not found:
        facts.append(f"{place} holds no USER/EXPERIMENT/TRIAL; it holds {some_of(names_in(place))}")
    facts += [f"there are: {line}" for line in overview(found)]
    facts += [f"{path} cannot be read by {current_user()}" for path in closed_folders(place)]
    facts += [f"{path} is a link, and links are not followed to find runs: say --run {path}/…" for path in links_in(place)]
    facts += [f"{text}" for text in _warnings(fileroot, source, None, None)]
    near = [f"{match!r} for {wanted[name]!r}" for name in wanted if (match := near_name(wanted[name], found, name))]
    hint = f"Did you mean {', and '.join(near)}?" if near else ""
    if not hint and "checkpoints" in fileroot.split("/"):
        hint = f"A fileroot is the folder above checkpoints/: --fileroot {fileroot.partition('/checkpoints')[0] or '/'}."
    elif not hint and found:
        hint = "Say -e EXPERIMENT and -t TRIAL as above, or another --fileroot."
    return NoRunError(
        f"no run{f' of {named}' if named else ''} in {place} (fileroot from {source})",
        facts=facts,
        hint=hint or "Say --fileroot DIR as in the trainer's YAML (cluster.fileroot), or --run DIR.",
    )


def _warnings(fileroot: str, source: str, config: RunConfig | None, run: RunRef | None) -> list[str]:
    warnings = []
    existing = fileroot
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing) or "/"
    kind = probe.file_system(existing)
    if kind in ("overlay", "aufs"):
        warnings.append(f"{fileroot} is on the container's own disk ({kind}): what is saved there is gone with the container")
    elif kind in ("tmpfs", "ramfs"):
        warnings.append(f"{fileroot} is in memory ({kind}): what is saved there is gone with the machine")
    relative = relative_fileroot(config) or (source.rpartition(" ")[2] if source.startswith("the usual place .") else "")
    if relative:
        warnings.append(
            f"the fileroot {relative} is relative: AReaL finds the run only when it is started from {os.getcwd()}, "
            "and on another folder it starts fresh"
        )
    if run is not None and run.user and run.user != current_user():
        warnings.append(f"the run is user {run.user}'s, and you are {current_user()}: AReaL would look elsewhere")
    return warnings


def relative_fileroot(config: RunConfig | None) -> str:
    """The configuration's fileroot if it is relative: then the run is found only from the folder it was started in."""
    fileroot = config.text("cluster.fileroot") if config else ""
    return fileroot if fileroot and not os.path.isabs(fileroot) else ""
