#!/bin/sh
# What a run's model makes of the held-out text, beside `xz -9e` on the same bytes of each domain.
#
#   launch/compare-with-xz.sh ARCUS RUN DATA [LAUNCHER...]
#
# ARCUS is the binary, RUN a run folder, DATA the data set it was trained on; LAUNCHER, if given,
# starts the evaluation (e.g. mpirun -np 2). The last row counts all bytes of all domains.
set -eu
if [ $# -lt 3 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 64
fi
arcus=$1
run=$2
data=$3
shift 3

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$@" "$arcus" eval "$run" --data "$data" >"$work/eval.txt"
# Behind its title and heading, `arcus eval` prints a line a domain, then one for all.
for domain in $(awk 'NR > 2 && $1 != "all" { print $1 }' "$work/eval.txt"); do
  printf '%s %s\n' "$domain" \
    "$("$arcus" inspect "$data" --held-out "$domain" | xz -9e -c | wc -c)" >>"$work/xz.txt"
done
awk 'BEGIN { form = "%-10s %14s %26s %22s\n"
             printf form, "domain", "held-out bytes", "Arcus, bits per byte", "xz -9e, bits per byte" }
  NR == FNR { xz[$1] = $2; xz["all"] += $2; next }
  FNR > 2 { printf form, $1, $2, sprintf("%.3f", $NF), sprintf("%.3f", 8 * xz[$1] / $2) }' \
  "$work/xz.txt" "$work/eval.txt"
