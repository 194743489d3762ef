"""Builds the one extension; everything else is in pyproject.toml."""

import os
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# Hidden, and never -march=native: the fast paths are chosen at run time (csrc/crc.cpp), one wheel serves every CPU.
# -isystem: other people's headers are not ours to warn about.
FLAGS = ["-O3", "-pthread", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-isystem", pybind11.get_include()]
if os.environ.get("CKPTSTORE_WERROR"):
    FLAGS.append("-Werror")
# For tests/native/sanitize.sh: flags that come last and win.
EXTRA = os.environ.get("CKPTSTORE_CXXFLAGS", "").split()

ParallelCompile("CKPTSTORE_BUILD_JOBS", default=os.cpu_count() or 1).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "ckptstore._native",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").glob(pattern)),
            cxx_std=20,
            extra_compile_args=[*FLAGS, *EXTRA],
            extra_link_args=["-pthread", *EXTRA],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
