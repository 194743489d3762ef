"""Run the benchmarks and write docs/performance.md: benchmarks/run.py [--dir DIR] [--size 8GiB] [--json FILE] [pytest options].

This is `./run bench`. `--report-only FILE…` renders earlier ones again. Options of pytest choose what runs, for example
`-k "shards and warm"` or `benchmarks/test_digest.py`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import report

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="", help="a folder on the disk to measure (default: the current one)")
    parser.add_argument("--size", default="2GiB", help="bytes to copy in one run")
    parser.add_argument("--rounds", default="4", help="turns of each contender; the first is dropped")
    parser.add_argument("--json", default="", help="where to keep the figures (default: .benchmarks/last.json)")
    parser.add_argument("--output", default="", help="the page to write (default: docs/performance.md)")
    parser.add_argument("--report-only", nargs="+", metavar="FILE", help="only render these JSON files, as one")
    options, others = parser.parse_known_args()
    page = Path(options.output or HERE.parent / "docs" / "performance.md")
    if options.report_only:
        report.write([Path(file) for file in options.report_only], page)
        return 0
    figures = Path(options.json or HERE.parent / ".benchmarks" / "last.json").absolute()
    figures.parent.mkdir(parents=True, exist_ok=True)
    places = [other for other in others if not other.startswith("-") and Path(other.split("::")[0]).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={HERE.parent}"]
    command += [f"--dir={options.dir}", f"--size={options.size}", f"--rounds={options.rounds}"]
    command += [f"--benchmark-json={figures}", "--benchmark-columns=median,rounds", "--benchmark-group-by=func"]
    # Else a run in which nothing could be measured ends with its complaint about that, and not with the reason.
    command += ["--benchmark-disable-gc", "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning"]
    everything = [str(HERE / f"test_{name}.py") for name in ("copy", "digest", "save", "objects")]
    command += others if places else [*others, *everything]
    status = subprocess.run(command).returncode
    if figures.exists():
        report.write([figures], page)
        print(f"figures: {figures}\npage:    {page}")
    return status


if __name__ == "__main__":
    sys.exit(main())
