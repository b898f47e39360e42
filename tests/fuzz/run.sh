#!/bin/sh
# Runs one of the fuzzers and keeps the inputs that it finds worth keeping for the next time:
#
#   tests/fuzz/run.sh gguf 3600                  an hour
#   tests/fuzz/run.sh gguf 60 build/release      of the fuzzers in this folder
#
# A finding ends it with an error; the input is in build/release/tests/fuzz/gguf-crash-... or
# similar, and `build/release/fuzz_gguf FILE` runs it alone.
set -eu
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 64; }
name=$1
seconds=$2
build=${3:-build/release}
here=$(dirname "$0")
work=$build/tests/fuzz
mkdir -p "$work/corpus/$name" "$work/seeds/$name"
set -- "$work/corpus/$name" "$work/seeds/$name"
[ ! -d "$here/seeds/$name" ] || set -- "$@" "$here/seeds/$name"
[ ! -f "$here/$name.dict" ] || set -- "-dict=$here/$name.dict" "$@"
# What was freed is kept a while to catch uses of it: no more than fits below the limit.
export ASAN_OPTIONS="quarantine_size_mb=64${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
exec "$build/fuzz_$name" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=512 \
  -malloc_limit_mb=64 -print_final_stats=1 -artifact_prefix="$work/$name-" "$@"
