"""Copying a checkpoint: each of ckptstore's strategies beside what people use today, and fio for what the disk can do."""

import os
import shutil
import time

import pytest
from conftest import record
from contenders import COPIERS, LIMITS

SHAPES = ["one file", "16 shards", "small files"]
# One request or one file at a time: hopeless for small files, and the disk's limit is another one there.
NOT_FOR_SMALL = {"dd oflag=direct conv=fsync", "ckptstore direct", "ckptstore warm", *(limit.name for limit in LIMITS)}


def settle():
    os.sync()
    time.sleep(0.3)


@pytest.mark.parametrize("contender", [*LIMITS, *COPIERS], ids=lambda contender: contender.name)
@pytest.mark.parametrize("heat", ["warm", "cold"])
@pytest.mark.parametrize("shape", SHAPES)
def test_copy(benchmark, place, data_sets, shape, heat, contender, turn):
    if contender.missing():
        pytest.skip(f"not installed: {contender.missing()}")
    if shape == "small files" and contender.name in NOT_FOR_SMALL:
        pytest.skip("not made for small files")
    data = data_sets(shape)
    # A new name each time, and nothing deleted before: ext4 shuns inodes that were deleted a moment ago.
    destination = place / f"copy-{time.monotonic_ns()}"

    def prepare():
        settle()
        if heat == "warm":
            data.warm()
        else:
            data.cool()

    record(
        benchmark,
        lambda: contender.run(data, destination),
        prepare=prepare,
        moved_bytes=data.size_bytes,
        group=f"copy, {shape}, {heat}",
        contender=contender.name,
        ours=contender.ours,
        durable=contender.durable,
        digested=contender.digested,
        turn=turn,
    )
    if contender in LIMITS:
        return
    data.check(destination)
    shutil.rmtree(destination)
