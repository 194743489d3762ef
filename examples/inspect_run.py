"""What of a run is whole, and what was wrong with the rest: the same as `ckptstore list` and `verify`, from Python.

python examples/inspect_run.py …/checkpoints/USER/EXPERIMENT/TRIAL [--level quick|structure|full]
"""

from __future__ import annotations

import argparse

from ckptstore import CheckpointStore, CkptStoreError, Level


def main() -> int:
    parser = argparse.ArgumentParser(description="What of a run is whole?")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--level", choices=list(Level), default=Level.FULL)
    given = parser.parse_args()
    store = CheckpointStore(given.run)
    damaged = 0
    for checkpoint in store:
        report = store.verify(checkpoint.step, given.level)
        size_mb = checkpoint.size_bytes / 1e6
        print(f"step {checkpoint.step:>5}  {report.checkpoint.status:<9}  {size_mb:8.1f} MB  {checkpoint.format}")
        for finding in report.findings:  # damage is reported, never raised
            print(f"            {finding}")
        damaged += not report.ok
    listing = store.scan()
    if listing.slot is not None:
        step = listing.slot.step if listing.slot.step >= 0 else "unknown"
        print(f"the slot holds step {step} ({', '.join(listing.slot.holds)})")
    if listing.recover_info is not None:
        print(f"training would go on at global step {listing.recover_info.resumes_at}")
    newest = store.latest()
    print(f"newest whole: {newest.step if newest else 'none'}")
    return 3 if damaged else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except CkptStoreError as error:  # one tree: whatever goes wrong on purpose is one of these
        raise SystemExit(f"{error}\n{error.hint}") from error
