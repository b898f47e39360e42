#!/bin/sh
# Loads exports in the engines themselves, transformers and llama.cpp, and compares logits,
# perplexity and greedy text with Arcus'. By hand, not part of the tests: it installs several GB
# (PyTorch) and compiles llama.cpp, 20 minutes on two cores the first time.
#
#   tests/interop/with_engines.sh [reference] [writers] [exports] [tokenizers]    all by default
#
# ARCUS is the program (build/release/arcus), ARCUS_ENGINES the folder of the environment
# (build/engines), kept between calls.
set -eu
cd "$(dirname "$0")/../.."
export ARCUS="${ARCUS:-$PWD/build/release/arcus}"
venv=${ARCUS_ENGINES:-build/engines}
packages="numpy==2.4.6 safetensors==0.8.0 gguf==0.19.0 h5py==3.16.0 transformers==5.24.0 torch==2.15.0
  sentencepiece==0.2.3"

case " $* " in *" -h "* | *" --help "*) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
if [ ! -x "$venv/bin/python" ]; then
  python=/usr/bin/python3
  [ -x $python ] || python=python3
  $python -m venv "$venv"
fi
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check $packages
# Compiled here; without the instructions of this one machine, so that the wheel can be kept.
CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=OFF}" CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" \
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
[ $# -gt 0 ] || set -- reference writers exports tokenizers
code=0
for check in "$@"; do
  echo "== $check"
  "$venv/bin/python" tests/interop/engines.py "$check" || code=1
done
exit $code
