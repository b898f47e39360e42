#!/bin/sh
# failing_job.sh HOW EXIT_CODE LAST_LINE LAUNCHER...: runs the job that goes wrong as HOW says and
# checks that it ends within 10 s of its start (the launcher's own start not counted: a machine that
# cannot resolve its name takes seconds for that) with EXIT_CODE, that the last line of its output matches the
# extended regular expression LAST_LINE, and that this line was printed once.
how=$1 expected=$2 pattern=$3
shift 3
output=$(mktemp)
# Touched by the job's rank 0 once the ranks have met.
ARCUS_TEST_STARTED=$(mktemp)
export ARCUS_TEST_STARTED
trap 'rm -f "$output" "$ARCUS_TEST_STARTED"' EXIT
timeout -k 1 30 "$@" "$how" >"$output" 2>&1
code=$?
elapsed=$((($(date +%s%N) - $(date -r "$ARCUS_TEST_STARTED" +%s%N)) / 1000000))
cat "$output"
echo "$how: exit code $code after $elapsed ms"
fail=0
[ "$code" = "$expected" ] || { echo "FAILED: exit code $code, expected $expected"; fail=1; }
[ "$elapsed" -lt 10000 ] || { echo "FAILED: took $elapsed ms"; fail=1; }
tail -n 1 "$output" | grep -Eq "$pattern" || { echo "FAILED: last line is no '$pattern'"; fail=1; }
[ "$(grep -Ec "$pattern" "$output")" = 1 ] || { echo "FAILED: not printed once"; fail=1; }
exit $fail
