#!/bin/sh
# How the speed of a training step behaves as one thing grows, with a table and a picture each.
#
#   launch/study_growth.sh [--repeats N] [--out DIR] [--tiny] AXIS...
#
# AXIS is one of
#   experts     8 to 256 at fixed active parameters, 16,384 tokens a micro-batch (hidden 256, width 256)
#   sequence    256 to 8,192 tokens, 8,192 tokens a micro-batch (bench model)
#   vocabulary  256 to 131,072 (bench model, 2,048 tokens a micro-batch)
#   hidden      256 to 2,048, experts twice as wide (2 layers)
#   ranks       1 (two threads), 2, 4, 8 ranks of a thread, more than there are cores (bench model)
#   skew        tokens spread evenly, and half of them to one expert (two ranks, bench model)
#   memory      activations kept, and layers run again in backward (bench model, 4,096 tokens)
#   micro       1, 2, 4 micro-batches of one step on two threads; 2, 4 on two ranks (bench model)
# N is the number of timed steps (default 5); DIR takes figures (JSON), report and pictures (default
# runs/growth); --tiny makes everything as small as it goes, to see that it works.
# Needs a build: build/quickstart/arcus (launch/quickstart.sh makes it) or the one in $ARCUS.
set -eu
cd "$(dirname "$0")/.."

repeats=5
out=runs/growth
tiny=""
axes=""
while [ $# -gt 0 ]; do
  case "$1" in
    --repeats | --out)
      [ $# -gt 1 ] || { echo "study_growth.sh: $1 needs a value" >&2; exit 64; }
      if [ "$1" = --out ]; then out=$2; else repeats=$2; fi
      shift ;;
    --tiny) tiny=1 ;;
    -h | --help) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 0 ;;
    experts | sequence | vocabulary | hidden | ranks | skew | memory | micro) axes="$axes $1" ;;
    *) echo "study_growth.sh: unknown argument $1; try --help" >&2; exit 64 ;;
  esac
  shift
done
[ -n "$axes" ] || { echo "study_growth.sh: no axis given; try --help" >&2; exit 64; }

arcus=${ARCUS:-build/quickstart/arcus}
[ -x "$arcus" ] || { echo "study_growth.sh: $arcus is not there; run launch/quickstart.sh first" >&2; exit 65; }
launch/install-packages.sh study
version=$("$arcus" --version | cksum)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_btl_base_warn_component_unused=0 OMP_WAIT_POLICY=passive
mkdir -p "$out"

# measure NAME RANKS THREADS [SETTING... [-- OPTION...]]: one benchmark, unless the figures of the same
# program and settings are there.
measure() {
  name=$1 ranks=$2 threads=$3
  shift 3
  file=$out/$name.json
  sets="--set parallel.threads=$threads"
  while [ $# -gt 0 ] && [ "$1" != -- ]; do sets="$sets --set $1"; shift; done
  [ $# -eq 0 ] || shift
  if [ -n "$tiny" ]; then
    sets="$sets --set model.hidden_size=32 --set model.expert_ff_size=32 --set model.num_layers=1"
    sets="$sets --set train.seq_len=32 --set train.micro_batch_seqs=2 --set train.global_batch_seqs=8"
    sets="$sets --set model.num_heads=2 --set model.num_kv_heads=1"
  fi
  same="$version: $ranks ranks, $repeats repeats, $sets $*"
  [ -s "$file" ] && [ "$(cat "$out/$name.of" 2>/dev/null)" = "$same" ] && return
  launcher=""
  [ "$ranks" = 1 ] || launcher="mpirun -q --oversubscribe --bind-to none -np $ranks"
  echo "$name"
  # Settings are words without blanks.
  # shellcheck disable=SC2086
  $launcher "$arcus" bench step --repeats "$repeats" --account --json "$file.tmp" $sets "$@" \
    >"$out/$name.txt" 2>&1 || { tail -n 5 "$out/$name.txt" >&2; exit 1; }
  mv "$file.tmp" "$file"
  echo "$same" >"$out/$name.of"
}

# Columns of the table, from one file of figures: tokens/s of the whole step; of forward and backward
# alone (without optimizer, sums and the reduction of gradients); the same as a share of the peak;
# busiest expert; memory; optimizer and sums against STREAM.
columns='. as $f
  | ($f.account_ms) as $a
  | ($a.step - $a.optimizer - $a["order-independent sums"] - $a["reduction and gathering"]) as $passes
  | ($f.tokens / $f.step_ms.median * 1000) as $whole
  | ($f.tokens / $passes * 1000) as $both
  | def r(n): . * pow(10; n) | round / pow(10; n);
  [($whole | r(0)), ($both | r(0)), ($f.flop / $f.peak_gflop_per_s / $f.step_ms.median / 1e4 | r(0)),
   ($f.flop / $f.peak_gflop_per_s / $passes / 1e4 | r(0)),
   ($f.load | r(2)), ($a["waiting for others"] / $a.step * 100 | r(1)),
   ($f.memory.measured / 1048576 | r(0)), ($f.memory.planned_even / 1048576 | r(0)),
   ($f.memory.planned_worst / 1048576 | r(0)),
   ($f.bytes.optimizer / $a.optimizer / 1e6 | r(1)),
   ($f.bytes.sums / ($a["order-independent sums"] + 1e-9) / 1e6 | r(1)),
   ($f.triad_gb_per_s | r(1))]'

# report AXIS LABEL NAME...: table and picture of the figures NAME, whose labels are what follows the
# axis in their names.
report() {
  axis=$1 label=$2
  shift 2
  {
    echo "# $label"
    echo
    echo "\`launch/study_growth.sh --repeats $repeats $axis\`. Tokens a second of whole steps, and of forward and"
    echo "backward without optimizer, sums and reduction, with their shares of the peak of a 1024^3 product of the"
    echo "same run; busiest expert / mean; share of the step that ranks wait for each other; memory of the rank that"
    echo "took most, as measured and as planned with even load and at worst; optimizer and sums in GB/s beside STREAM."
    echo
    echo "| $label | tokens/s | passes alone | % of peak | passes % | load | waiting % | MiB | planned | at worst | optimizer | sums | STREAM |"
    echo "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for name in "$@"; do
      echo "| ${name#"$axis"-} | $(jq -r "$columns | map(tostring) | join(\" | \")" "$out/$name.json") |"
    done
    echo
    echo "![tokens a second](growth-$axis.png)"
  } >"$out/growth-$axis.md"
  for name in "$@"; do
    echo "\"${name#"$axis"-}\" $(jq -r "$columns | \"\\(.[0]) \\(.[1])\"" "$out/$name.json")"
  done >"$out/$axis.dat"
  gnuplot -e "set terminal pngcairo size 700,420; set output '$out/growth-$axis.png'; set xlabel '$label' noenhanced;
    set ylabel 'tokens/s'; set yrange [0:*]; set key bottom left;
    plot '$out/$axis.dat' using 2:xtic(1) with linespoints title 'whole step',
         '$out/$axis.dat' using 3 with linespoints title 'forward and backward alone'"
  echo "written: $out/growth-$axis.md"
}

for axis in $axes; do
  names=""
  run() { measure "$@"; names="$names $1"; }
  case "$axis" in
    experts)
      label="experts"
      # A bias that follows the load quickly keeps segments even.
      for n in 8 16 32 64 128 256; do
        run "experts-$n" 1 2 model.num_experts=$n model.hidden_size=256 model.expert_ff_size=256 \
          model.num_layers=2 model.num_heads=4 model.num_kv_heads=2 train.micro_batch_seqs=64 \
          train.global_batch_seqs=64 routing.score=sigmoid routing.expert_bias_rate=0.02
      done ;;
    sequence)
      label="tokens a sequence"
      for n in 256 512 1024 2048 4096 8192; do
        run "sequence-$n" 1 2 train.seq_len=$n train.micro_batch_seqs=$((8192 / n)) \
          train.global_batch_seqs=$((8192 / n))
      done ;;
    vocabulary)
      label="vocabulary"
      for n in 256 2048 16384 131072; do
        run "vocabulary-$n" 1 2 model.vocab_size=$n train.micro_batch_seqs=8
      done ;;
    hidden)
      label="hidden size"
      for n in 256 512 1024 2048; do
        run "hidden-$n" 1 2 model.hidden_size=$n model.expert_ff_size=$((2 * n)) model.num_layers=2 \
          model.num_heads=$((n / 64)) model.num_kv_heads=$((n / 128)) train.micro_batch_seqs=8
      done ;;
    ranks)
      label="ranks"
      run "ranks-1x2" 1 2 train.micro_batch_seqs=1
      for n in 2 4 8; do run "ranks-$n" $n 1 train.micro_batch_seqs=1; done ;;
    skew)
      label="tokens of one expert"
      run "skew-even" 2 1 routing.select=hash routing.aux_loss=0 routing.renormalize=false model.topk=1
      run "skew-half" 2 1 routing.select=hash routing.aux_loss=0 routing.renormalize=false model.topk=1 -- --repeated 0.5 ;;
    memory)
      label="activations"
      run "memory-kept" 1 2 train.micro_batch_seqs=16 train.global_batch_seqs=16
      run "memory-recomputed" 1 2 train.micro_batch_seqs=16 train.global_batch_seqs=16 \
        train.recompute=true ;;
    micro)
      label="micro-batches"
      for n in 1 2 4; do run "micro-1x2:$n" 1 2 train.micro_batch_seqs=$((8 / n)); done
      for n in 2 4; do run "micro-2x1:$n" 2 1 train.micro_batch_seqs=$((8 / n)); done ;;
  esac
  # Names are words without blanks.
  # shellcheck disable=SC2086
  report "$axis" "$label" $names
done
