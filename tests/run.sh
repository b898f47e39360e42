#!/bin/sh
# Installs what is missing, builds Arcus with its tests and runs them.
#
#   tests/run.sh              every test but the slow ones, Release
#   tests/run.sh --sanitize   the unit tests under the address and undefined-behaviour sanitizers
#   tests/run.sh --slow       the slow tests too
#
# Further arguments go to ctest, e.g. tests/run.sh -R launch
set -eu
cd "$(dirname "$0")/.."

preset=release
slow=no
while [ $# -gt 0 ]; do
  case "$1" in
    --sanitize) preset=sanitize ;;
    --slow) slow=yes ;;
    -h | --help)
      sed -n '2,8s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *) break ;;
  esac
  shift
done

launch/install-packages.sh build test study
launch/install-packages.sh cluster ||
  echo "tests/run.sh: without these packages the tests on a Slurm cluster are left out" >&2
launch/install-packages.sh fuzz ||
  echo "tests/run.sh: without these packages the fuzz tests are left out" >&2
cmake --preset "$preset"
cmake --build --preset "$preset"
if [ "$preset" = release ]; then
  # Says it once where the Python packages of tests/interop cannot be had; those tests are skipped then.
  tests/interop/make-venv.sh build/release/interop-venv >/dev/null || true
fi
# Ranks share few cores here: one that waits must leave its core to the others.
export OMPI_MCA_mpi_yield_when_idle=1
if [ "$slow" = yes ]; then
  exec ctest --test-dir "build/$preset" --output-on-failure --label-exclude gpu \
    --parallel "$(nproc)" "$@"
fi
exec ctest --preset "$preset" --parallel "$(nproc)" "$@"
