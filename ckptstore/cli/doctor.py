"""`ckptstore doctor`: what would go wrong with this run, before it trains or recovers."""

from __future__ import annotations

import os
from typing import Any

import click

from ckptstore import doctor
from ckptstore.checks import Diagnosis, Severity
from ckptstore.cli.common import JSON, OVERRIDES, TrainerOption, Verb, location_options
from ckptstore.cli.opening import find_run
from ckptstore.cli.render import done, echo, field, item, print_json, run_json
from ckptstore.config import load
from ckptstore.frameworks.areal.launch import find_installation
from ckptstore.frameworks.areal.layout import run_ref
from ckptstore.locate import FILEROOT_VARIABLE, Located, NoRunError, Where, current_user

_MARKS = {Severity.OK: ("✓", "green"), Severity.WARN: ("!", "yellow"), Severity.BAD: ("✗", "red")}


@click.command("doctor", cls=Verb, short_help="What would go wrong, before training or recovery.")
@click.option(
    "--saves", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Room for N more must be there."
)
@click.option("--quiet", "-q", is_flag=True, help="Only what is not fine.")
@click.option(
    "--areal-dir", cls=TrainerOption, default="", metavar="DIR", help="The AReaL that will train: its checkout or package."
)
@click.option(
    "--areal-version", cls=TrainerOption, default="", metavar="V", help="Its version, where it is not on this machine."
)
@click.option(
    "--world-size", cls=TrainerOption, type=click.IntRange(1), default=None, metavar="N", help="Its trainer processes."
)
@JSON
@location_options
@OVERRIDES
def command(
    where: Where, saves: int, quiet: bool, areal_dir: str, areal_version: str, world_size: int | None, as_json: bool
) -> int:
    """Look at disk, permissions, space, slot, recover_info, settings and logs, and say what to do about each finding.

    Nothing is changed, nothing is finished. With --config it looks at a run that has not started yet as well.
    Exit codes: 0 fine or warnings only, 1 something is bad, 3 something is damaged.
    """
    located = _locate(where)
    diagnoses = doctor.examine(
        located.run,
        config=located.config,
        installation=find_installation(areal_dir, areal_version),
        saves=saves,
        world_size=world_size or 0,
    )
    code = doctor.exit_code(diagnoses)
    if as_json:
        findings = [_json(diagnosis) for diagnosis in diagnoses]
        print_json({"run": run_json(located), "worst": str(doctor.worst(diagnoses)), "findings": findings, "exit_code": code})
        return code
    field("run", f"{located.run.path}  ({located.how})")
    echo()
    for diagnosis in diagnoses:
        if not (quiet and diagnosis.severity is Severity.OK):
            _print(diagnosis)
    counts = {severity: sum(d.severity is severity for d in diagnoses) for severity in Severity}
    echo()
    if code or counts[Severity.WARN]:
        echo(f"{counts[Severity.BAD]} bad, {counts[Severity.WARN]} to think about, {counts[Severity.OK]} fine")
    else:
        done(f"all of {counts[Severity.OK]} checks are fine")
    return code


def _locate(where: Where) -> Located:
    """The run that is meant, one that does not exist yet included, where its names and its fileroot are said."""
    try:
        return find_run(where)
    except NoRunError:
        config = load(where.config, where.overrides) if where.config else None
        fileroot = (
            where.fileroot or os.environ.get(FILEROOT_VARIABLE, "") or (config.text("cluster.fileroot") if config else "")
        )
        experiment = where.experiment or (config.text("experiment_name") if config else "")
        trial = where.trial or (config.text("trial_name") if config else "")
        if where.run or not (fileroot and experiment and trial):
            raise
        path = os.path.join(os.path.abspath(fileroot), "checkpoints", where.user or current_user(), experiment, trial)
        return Located(run_ref(path), "not there yet: before its first start", config)


def _print(diagnosis: Diagnosis) -> None:
    mark, colour = _MARKS[diagnosis.severity]
    item(mark, diagnosis.found, label=f"{diagnosis.check:<12} ", fg=colour)
    if diagnosis.remedy:
        item(" ", diagnosis.remedy, label=f"{'':<12} → ")


def _json(diagnosis: Diagnosis) -> dict[str, Any]:
    return {
        "check": diagnosis.check,
        "severity": str(diagnosis.severity),
        "found": diagnosis.found,
        "remedy": diagnosis.remedy,
        "damage": diagnosis.damage,
    }
