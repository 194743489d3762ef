"""Look for the best threads and block size on a disk: benchmarks/sweep.py [--dir DIR] [--size 8GiB] [--strategy direct].

Copies the same files again and again, durably, and prints GB/s (median) for each pair. The pairs take turns.
"""

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

from ckptstore import native


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=".", type=Path)
    parser.add_argument("--size", default=8, type=lambda text: int(text.removesuffix("GiB")), help="in GiB")
    parser.add_argument("--files", default=8, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--strategy", default="direct", choices=["direct", "warm", "buffered", "auto"])
    parser.add_argument("--threads", default="2,4,8,16,32,64")
    parser.add_argument("--blocks-mib", default="1,2,4,8")
    options = parser.parse_args()
    place = options.dir / f".ckptstore-sweep-{os.getpid()}"
    source = place / "source"
    source.mkdir(parents=True)
    try:
        sweep(options, place, source)
    finally:
        shutil.rmtree(place)


def sweep(options, place, source):
    size = (options.size << 30) // options.files
    specs = [native.FileSpec(f"shard-{i}", size) for i in range(options.files)]
    for spec in specs:
        with (source / spec.name).open("wb") as file:
            for offset in range(0, size, 64 << 20):
                file.write(os.urandom(min(64 << 20, size - offset)))
            os.fsync(file.fileno())
    threads = [int(text) for text in options.threads.split(",")]
    blocks = [int(text) for text in options.blocks_mib.split(",")]
    speeds = {}
    for turn in range(options.rounds):
        for count in threads:
            for block in blocks:
                destination = place / f"copy-{turn}-{count}-{block}"
                destination.mkdir()
                chosen = native.CopyOptions(threads=count, block_bytes=block << 20, strategy=options.strategy)
                result = native.copy_files(source, destination, specs, options=chosen)
                speeds.setdefault((count, block), []).append(size * options.files / 1e9 / result.seconds)
                shutil.rmtree(destination)
                os.sync()
                time.sleep(0.3)
    print(f"GB/s, {options.strategy}, medians of {options.rounds}; used: {result.strategies}")
    print("threads  " + "".join(f"{block:>7} MiB" for block in blocks))
    for count in threads:
        print(f"{count:>7}  " + "".join(f"{statistics.median(speeds[count, block]):>11.2f}" for block in blocks))


if __name__ == "__main__":
    main()
