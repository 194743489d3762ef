#!/usr/bin/env bash
# Builds the extension with one sanitizer into a temporary copy of the package, and runs the native tests on it.
# usage: tests/native/sanitize.sh [address|thread|undefined|all] [pytest arguments]
#        CKPTSTORE_PLANT=1: plants a bug of that kind first; the run must then fail (the proof that it would see one).
set -euo pipefail
kind=${1:-all}
[[ $# -gt 0 ]] && shift
if [[ $kind == all ]]; then
  for each in address undefined thread; do "$0" "$each" "$@"; done
  exit 0
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/csrc" "$root/ckptstore" "$root/tests" "$root/setup.py" "$root/pyproject.toml" "$work"
touch "$work/README.md"
rm -f "$work"/ckptstore/_native*.so

if [[ -n ${CKPTSTORE_PLANT:-} ]]; then
  case $kind in
    address)   sed -i 's/chunks\[chunk->index\]/chunks[chunk->index + 1]/' "$work/csrc/copy.cpp" ;;
    thread)    sed -i 's/std::atomic<std::uint64_t> reused_{0}/std::uint64_t reused_{0}/; s/done_.fetch_add(bytes, std::memory_order_relaxed)/reused_ += 1/' "$work/csrc/copy.cpp" ;;
    undefined) sed -i 's/word >> (8 \* i)/word >> (64 + 8 * i)/' "$work/csrc/crc.cpp" ;;
  esac
  if diff -rq "$root/csrc" "$work/csrc" >/dev/null; then echo "no bug was planted: the code has changed" >&2; exit 3; fi
fi

case $kind in
  address)   library=libasan.so ;;
  thread)    library=libtsan.so ;;
  undefined) library=libubsan.so ;;
  *) echo "not a sanitizer: $kind" >&2; exit 2 ;;
esac
recover=
[[ $kind == undefined ]] && recover=-fno-sanitize-recover=all
cd "$work"
echo "building with -fsanitize=$kind"
CKPTSTORE_CXXFLAGS="-O1 -g -fsanitize=$kind -fno-omit-frame-pointer $recover" \
  "$python" setup.py -q build_ext --inplace >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }

# The runtime must be the first library of the process, and libstdc++ be there when it looks for __cxa_throw. Leaks are Python's own habit at exit. TSan's die_after_fork is
# off because some tests fork. CKPTSTORE_SANITIZED tells the tests which limits make no sense under a sanitizer.
LD_PRELOAD="$(g++ -print-file-name=$library) $(g++ -print-file-name=libstdc++.so.6)"
export LD_PRELOAD
# Reports go to files: a test runner swallows what a dying process says. Any file is a failure.
reports=$work/report
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$reports
export TSAN_OPTIONS=exitcode=66:die_after_fork=0:log_path=$reports
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$reports
export PYTHONPATH=$work
export CKPTSTORE_SANITIZED=$kind
status=0
"$python" -m pytest "$work/tests/native" -q -p no:cacheprovider -c "$work/pyproject.toml" --rootdir "$work" "$@" || status=$?
if compgen -G "$reports.*" >/dev/null; then
  unset LD_PRELOAD
  head -n 60 "$reports".* >&2
  [[ $status == 0 ]] && status=66
fi
exit "$status"
