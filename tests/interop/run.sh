#!/bin/sh
# Runs test_interop.py in the environment of make-venv.sh; exit code 77 (skipped) where there is none.
#
#   ARCUS=build/release/arcus tests/interop/run.sh build/release/interop-venv [--full] [Export ...]
set -eu
here=$(dirname "$0")
python=$("$here/make-venv.sh" "${1:?usage: run.sh VENV [arguments of test_interop.py]}")
shift
# Small matrices: threads of numpy only wait for each other.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
exec "$python" "$here/test_interop.py" "$@"
