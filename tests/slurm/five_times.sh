#!/bin/sh
# The cluster comes up, trains and goes down in the middle of it, five times in a row, and leaves
# nothing: no process, no folder, no shared memory. DIR is the cluster's, ARCUS the program.
set -eu
dir=$1
here=$(cd "$(dirname "$0")" && pwd)
cluster=$here/cluster.sh
work=$(mktemp -d)
trap '"$cluster" down "$dir"; rm -rf "$work"' EXIT

# Of this user's things, those that a cluster, PMIx or Open MPI under Slurm would make.
things() {
  find /tmp /dev/shm -maxdepth 1 -user "$(id -u)" \
    \( -name 'spmix*' -o -name 'vader_segment*' -o -name 'osc_*' -o -name 'pmix*' -o \
    -name "${dir##*/}*" \) 2>/dev/null | sort
}

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
export OMPI_MCA_btl_tcp_if_include=127.0.0.1/8 OMPI_MCA_oob_tcp_if_include=lo
cd "$here/../.."
for file in 1 2 3 4 5 6 7 8 9; do seq "$file" 200 >"$work/$file.txt"; done
"$ARCUS" prepare --out "$work/data" --valid-fraction 0.1 --domain "numbers=$work" >/dev/null
"$cluster" down "$dir"
things >"$work/before"
for turn in 1 2 3 4 5; do
  "$cluster" up "$dir"
  SLURM_CONF=$dir/slurm.conf sbatch --quiet --nodes=4 --output="$work/$turn.log" \
    slurm/train.sbatch launch/configs/tiny.toml --set run.data="$work/data" \
    --set run.dir="$work/run-$turn" --set train.steps=1000000
  tries=400
  until [ -s "$work/run-$turn/metrics.jsonl" ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || { cat "$work/$turn.log"; exit 1; }
    sleep 0.05
  done
  "$cluster" down "$dir"
  left=$("$cluster" left "$dir")
  things >"$work/after"
  if [ -n "$left" ] || ! cmp "$work/before" "$work/after"; then
    echo "left behind after turn $turn:"
    diff "$work/before" "$work/after" || true
    for pid in $left; do ps -o pid=,args= -p "$pid"; done
    exit 1
  fi
done
echo "five times up and down, nothing is left"
