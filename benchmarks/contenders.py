"""Who takes part: ckptstore's ways to copy, and what people use today."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import DataSet, Usage, measure_child, measure_command, measure_fio


@dataclass(frozen=True)
class Contender:
    """`run` copies a data set to a folder that is not there yet. Durable: on the disk at the end. Digested: checked."""

    name: str
    durable: bool
    digested: bool
    run: Callable[[DataSet, Path], Usage]
    needs: tuple[str, ...] = ()
    ours: bool = False

    def missing(self) -> list[str]:
        return [tool for tool in self.needs if shutil.which(tool) is None]


def _engine(name, **options):
    def run(data, destination):
        return measure_child(do="copy", source=data.root, destination=destination, files=data.files, options=options)

    return Contender(name, options.get("durable", True), True, run, ours=True)


def _tool(name, command, *, durable, digested=False, needs=()):
    def run(data, destination):
        return measure_command(command, SRC=data.root, DST=destination, N=os.cpu_count())

    return Contender(name, durable, digested, run, tuple(needs))


def _copytree(name, durable):
    def run(data, destination):
        return measure_child(do="copytree", source=data.root, destination=destination, sync=durable)

    return Contender(name, durable, False, run)


def _limit(name, mode):
    def run(data, destination):
        largest = max(data.specs, key=lambda spec: spec.size_bytes)
        if mode == "both":  # fio opens what it reads by this name
            os.link(data.root / largest.name, f"{destination}.read")
        # As many bytes as are copied, in one file; of several shards it reads the largest again and again.
        usage = measure_fio(destination, data.size_bytes, largest.size_bytes, mode)
        Path(f"{destination}.read").unlink(missing_ok=True)
        return usage

    return Contender(name, True, False, run, ("fio",))


LIMITS = [_limit("fio write", "write"), _limit("fio read and write at once", "both")]

SUMS = "(cd $SRC && find . -type f -print0 | xargs -0 {sum}) >$DST.sums; (cd $DST && {sum} --quiet -c $DST.sums); rm $DST.sums"
DD = (
    "cd $SRC; find . -type d -exec mkdir -p $DST/{} ';'; find . -type f -exec"
    " dd if={} of=$DST/{} bs=8M iflag=fullblock oflag=direct conv=fsync status=none ';'"
)

COPIERS = [
    _engine("ckptstore"),
    _engine("ckptstore, not durable", durable=False),
    _engine("ckptstore, read back", verify_after_write=True),
    _engine("ckptstore direct", strategy="direct"),
    _engine("ckptstore warm", strategy="warm"),
    _engine("ckptstore buffered", strategy="buffered"),
    _tool("cp -r", "cp -r $SRC $DST", durable=False),
    _tool("cp -r, sync", "cp -r $SRC $DST; sync -f $DST", durable=True),
    _tool(
        "cp -r, sync, sha256sum of both",
        "cp -r $SRC $DST; sync -f $DST; " + SUMS.format(sum="sha256sum"),
        durable=True,
        digested=True,
    ),
    _tool(
        "cp -r, sync, b3sum of both",
        "cp -r $SRC $DST; sync -f $DST; " + SUMS.format(sum="b3sum"),
        durable=True,
        digested=True,
        needs=["b3sum"],
    ),
    _tool("rsync -a, sync", "rsync -a $SRC/ $DST; sync -f $DST", durable=True, needs=["rsync"]),
    _tool("rclone copy, sync", "rclone copy -q $SRC $DST; sync -f $DST", durable=True, needs=["rclone"]),
    _tool("dd oflag=direct conv=fsync", DD, durable=True),
    _copytree("shutil.copytree", durable=False),
    _copytree("shutil.copytree, sync", durable=True),
    _tool("fpsync -n N, sync", "mkdir $DST; fpsync -n $N $SRC/ $DST/; sync -f $DST", durable=True, needs=["fpsync"]),
]
