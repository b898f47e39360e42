#!/bin/sh
# Makes a Python environment with the packages that tests/interop compares with, and prints the path
# of its interpreter.
#
#   make-venv.sh DIR
#
# Quick when it is there already. Exit code 77, which CTest calls skipped, and one line that says why
# where packages cannot be installed; that stands for ten minutes, so that a run of the tests asks once.
set -eu
dir=${1:?usage: make-venv.sh DIR}
packages="numpy==2.4.6 safetensors==0.8.0 gguf==0.19.0 h5py==3.16.0"
log=$dir.log

skip() {
  echo "tests/interop is left out: $1 (see $log)" | tee "$dir.failed" >&2
  exit 77
}

# Whole only once the list of its packages is in it.
if [ "$(cat "$dir/packages" 2>/dev/null)" != "$packages" ]; then
  mkdir -p "$(dirname "$dir")"
  exec 9>"$dir.lock"
  flock 9 # tests may ask for it at the same time
  if [ -n "$(find "$dir.failed" -mmin -10 2>/dev/null)" ]; then
    cat "$dir.failed" >&2
    exit 77
  fi
  if [ "$(cat "$dir/packages" 2>/dev/null)" != "$packages" ]; then
    python=/usr/bin/python3
    [ -x $python ] || python=python3
    rm -rf "$dir" "$dir.failed"
    $python -m venv "$dir" >"$log" 2>&1 || skip "python3 cannot make environments"
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check $packages >>"$log" 2>&1 ||
      skip "pip could not install $packages"
    echo "$packages" >"$dir/packages"
  fi
fi
echo "$dir/bin/python"
