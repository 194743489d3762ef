"""Go back to before a step, from Python: look at the plan, then do it, with progress.

python examples/setup_from_python.py …/checkpoints/USER/EXPERIMENT/TRIAL --before-step 187 [--config run.yaml] [--yes]
"""

from __future__ import annotations

import argparse

from ckptstore import CheckpointStore, NothingToResumeError, Options, RefusedError, Selection
from ckptstore.config import load
from ckptstore.frameworks.areal.launch import find_installation
from ckptstore.plan import plan


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the newest good checkpoint before a step the one to resume from.")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--before-step", type=int, required=True)
    parser.add_argument("--config", help="the trainer's YAML: how often it saves, how many ranks it has")
    parser.add_argument("--areal-version", default="", help="of the AReaL that will train")
    parser.add_argument("--yes", action="store_true", help="do it; without, only the plan is shown")
    given = parser.parse_args()

    store = CheckpointStore(given.run)
    selection = Selection(before_step=given.before_step)
    options = Options(
        config=load(given.config) if given.config else None, installation=find_installation("", given.areal_version)
    )
    try:
        planned = plan(store.backend, selection, options)
    except NothingToResumeError as error:
        print(f"{error}\n{error.hint}")
        return 4

    chosen = planned.point.checkpoint
    print(f"step {chosen.step}: {planned.point.why}")
    for skipped in planned.point.skipped:
        print(f"  not step {skipped.checkpoint.step}: {skipped.reasons[0]}")
    for text in planned.restoration.lost:
        print(f"  lost: {text}")
    for text in planned.restoration.restored:
        print(f"  restored: {text}")
    if not given.yes:
        return 0

    def notify(doing: str, done_bytes: int, total_bytes: int) -> None:
        print(f"\r{doing}: {done_bytes / max(total_bytes, 1):.0%}", end="", flush=True)

    try:
        outcome = store.setup(selection, options, notify=notify)
    except RefusedError as error:  # it would lose something, or not resume; the message names the option that allows it
        print(error)
        return 1
    # What was planned may have been found damaged while it was copied: then it is the next one.
    print(f"\nthe slot holds step {outcome.plan.point.checkpoint.step}, old slot in {outcome.old_slot or 'nothing'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
