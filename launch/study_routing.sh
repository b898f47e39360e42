#!/bin/sh
# Trains the same small model with every routing of launch/configs/routing on the quickstart's text,
# the same tokens each, and writes a report with a table and pictures.
#
#   launch/study_routing.sh [--steps N] [--out DIR] [NAME...]
#
# N steps of 2048 tokens each (default 500: about 40 minutes in all on two cores); DIR takes runs and
# report (default runs/routing); NAMEs are files of launch/configs/routing without .toml (default:
# all, and mixtral without any balancing). Needs launch/quickstart.sh to have prepared its text.
# Started again, it goes on with what is missing.
set -eu
cd "$(dirname "$0")/.."

steps=500
out=runs/routing
names=""
while [ $# -gt 0 ]; do
  case "$1" in
    --steps | --out)
      [ $# -gt 1 ] || { echo "study_routing.sh: $1 needs a value" >&2; exit 64; }
      if [ "$1" = --out ]; then out=$2; else steps=$2; fi
      shift ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "study_routing.sh: unknown option $1; it takes --steps N, --out DIR and names" >&2; exit 64 ;;
    *) names="$names $1" ;;
  esac
  shift
done
[ -n "$names" ] || names="$(cd launch/configs/routing && ls ./*.toml | sed 's#^\./##; s#\.toml$##') unbalanced"

arcus=${ARCUS:-build/quickstart/arcus}
data=data/quickstart/tokens
for needed in "$arcus" "$data/dataset.json"; do
  [ -e "$needed" ] || { echo "study_routing.sh: $needed is not there; run launch/quickstart.sh first" >&2; exit 65; }
done
launch/install-packages.sh study
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_btl_base_warn_component_unused=0
mpirun_2="mpirun -q --oversubscribe --bind-to none -np 2"
mkdir -p "$out"

# The configuration that a name stands for, and what is set on top of it.
config_of() { case "$1" in unbalanced) echo mixtral ;; *) echo "$1" ;; esac; }
extra_of() { case "$1" in unbalanced) echo "--set routing.aux_loss=0" ;; esac; }

train_and_evaluate() {
  name=$1
  same="$steps steps of $(cksum <"launch/configs/routing/$(config_of "$name").toml")"
  if [ "$(cat "$out/$name.of" 2>/dev/null)" != "$same" ]; then
    rm -rf "${out:?}/$name" "$out/$name.json"  # of other steps or settings
  elif [ -s "$out/$name.json" ]; then
    return
  fi
  echo "$same" >"$out/$name.of"
  # The file's extra settings are words without blanks.
  # shellcheck disable=SC2046
  $mpirun_2 "$arcus" train "launch/configs/routing/$(config_of "$name").toml" \
    --set run.dir="$out/$name" --set train.steps="$steps" --set train.warmup_steps=$((steps / 20)) \
    --set eval.every=0 --set checkpoint.every=0 $(extra_of "$name") >"$out/$name.log" 2>&1 ||
    { tail -n 5 "$out/$name.log" >&2; exit 1; }
  $mpirun_2 "$arcus" eval "$out/$name" --data $data --json --routing >"$out/$name.tmp"
  mv "$out/$name.tmp" "$out/$name.json"
}

# Of the held-out text's tokens per expert: largest / mean of the worst layer; experts that got less
# than a twentieth of their share.
load_of() {
  jq -r '[[.eval[].tokens_per_expert] | transpose[] | map(select(length > 0)) | select(length > 0)
    | transpose | map(add) | add as $sum | length as $n
    | {load: (if $sum == 0 then 0 else max * $n / $sum end),
       dead: (map(select(. * $n * 20 < $sum)) | length)}]
    | "\(map(.load) | max | . * 100 | round / 100) \(map(.dead) | add)"' "$1"
}

# Of the last fifth of the steps: dropped share of the assignments, entropy (nats), share of the tokens
# that go through the experts, ms per step.
training_of() {
  jq -s -r --argjson from $((steps * 4 / 5)) '[.[] | select(.step > $from and .loss)]
    | ([.[].layers[] | select(.tokens_per_expert | length > 0)] ) as $layers
    | (($layers | map(.dropped) | add) / ($layers | map(.tokens_per_expert | add) | add) * 100 * 10 | round / 10) as $dropped
    | (($layers | map(.entropy) | add) / ($layers | length) * 100 | round / 100) as $entropy
    | ([.[].timing.step_ms] | sort | .[length / 2 | floor] | round) as $ms
    | (($layers | map(.stream_share // 1) | add) / ($layers | length) * 100 | round) as $share
    | "\($dropped) \($entropy) \($share) \($ms)"' "$1"
}

write_report() {
  report=$out/report.md
  {
    echo "# Routings on the same text"
    echo
    echo "$steps steps of 2048 tokens each, two ranks, \`launch/study_routing.sh --steps $steps\`. Held-out text"
    echo "in bits per byte; load = tokens of the busiest expert / mean on held-out text, worst layer; dead ="
    echo "experts with less than a twentieth of their share; dropped, entropy, share of the tokens that go"
    echo "through the experts, and time of training."
    echo
    echo "| routing | prose | code | chinese | load | dead | dropped % | entropy | routed % | ms/step |"
    echo "|---|---|---|---|---|---|---|---|---|---|"
    for name in $names; do
      # shellcheck disable=SC2046
      set -- $(jq -r '[.eval[].bits_per_byte | . * 1000 | round / 1000 | tostring] | join(" ")' "$out/$name.json") \
        $(load_of "$out/$name.json") $(training_of "$out/$name/metrics.jsonl")
      echo "| $name | $1 | $2 | $3 | $4 | $5 | $6 | $7 | $8 | $9 |"
    done
    echo
    echo "![loss](loss.png)"
    echo
    echo "![experts by domain](experts.png)"
  } >"$report.tmp"
  mv "$report.tmp" "$report"
  echo "written: $report"
}

draw_losses() {
  plots=""
  for name in $names; do
    jq -r 'select(.ce) | "\(.step) \(.ce)"' "$out/$name/metrics.jsonl" >"$out/$name.dat"
    plots="$plots${plots:+, }'$out/$name.dat' smooth bezier title '$name' noenhanced"
  done
  gnuplot -e "set terminal pngcairo size 900,600; set output '$out/loss.png'; set xlabel 'step';
    set ylabel 'cross-entropy, nats'; set key outside; plot $plots"
}

# Share of each domain's held-out tokens that each expert of the last layer gets.
draw_experts() {
  panels=0
  for name in $names; do
    jq -r '[.eval[].tokens_per_expert[-1] | add as $sum | map(. / $sum)] | .[] | map(tostring) | join(" ")' \
      "$out/$name.json" >"$out/$name.experts.dat"
    panels=$((panels + 1))
  done
  domains=$(jq -r '[.eval | keys_unsorted[]] | to_entries | map("\"\(.value)\" \(.key)") | join(", ")' \
    "$out/$(echo $names | cut -d' ' -f1).json")
  {
    echo "set terminal pngcairo size 900,$((90 * panels + 60)); set output '$out/experts.png'"
    echo "set multiplot layout $panels,1 title 'experts of the last layer by domain, each routing on a scale of its own'"
    echo "set palette defined (0 'white', 1 'dark-blue'); unset colorbox; unset xtics; set ytics ($domains); set yrange [-0.5:2.5] reverse"
    for name in $names; do
      echo "set ylabel '$name' noenhanced; plot '$out/$name.experts.dat' matrix with image notitle"
    done
  } >"$out/experts.gp"
  gnuplot "$out/experts.gp"
}

for name in $names; do
  echo "$name"
  train_and_evaluate "$name"
done
draw_losses
draw_experts
write_report
