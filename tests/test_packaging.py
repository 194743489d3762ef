"""What is given to those who have no checkout: a source archive from which the tests run, too."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "ckptstore", "csrc", "docs", "examples", "tests")
FILES = ("CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "run", "setup.py")


def test_the_source_archive_is_whole(tmp_path: Path) -> None:
    """A header that lacks is found by nobody who builds in a checkout."""
    not_ours = shutil.ignore_patterns("__pycache__", "*.so")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=not_ours)
    for name in (*FILES, "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path / name)
    wanted = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} - {"MANIFEST.in"}
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as opened:
        there = {name.partition("/")[2] for name in opened.getnames()}
    assert wanted - there == set()
