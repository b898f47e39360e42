#!/bin/sh
# failing_job.sh HOW EXIT_CODE LAST_LINE LAUNCHER...: runs the job that goes wrong as HOW says and
# checks that it ends within 10 s with EXIT_CODE, that the last line of its output matches the
# extended regular expression LAST_LINE, and that this line was printed once.
how=$1 expected=$2 pattern=$3
shift 3
output=$(mktemp)
trap 'rm -f "$output"' EXIT
begin=$(date +%s%N)
timeout -k 1 30 "$@" "$how" >"$output" 2>&1
code=$?
elapsed=$((($(date +%s%N) - begin) / 1000000))
cat "$output"
echo "$how: exit code $code after $elapsed ms"
fail=0
[ "$code" = "$expected" ] || { echo "FAILED: exit code $code, expected $expected"; fail=1; }
[ "$elapsed" -lt 10000 ] || { echo "FAILED: took $elapsed ms"; fail=1; }
tail -n 1 "$output" | grep -Eq "$pattern" || { echo "FAILED: last line is no '$pattern'"; fail=1; }
[ "$(grep -Ec "$pattern" "$output")" = 1 ] || { echo "FAILED: not printed once"; fail=1; }
exit $fail
