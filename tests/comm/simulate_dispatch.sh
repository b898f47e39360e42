#!/bin/sh
# Small exchanges on clusters that are not there: dispatch and combine, flat against shared memory
# and rails, run by the code of comm/ under SimGrid's SMPI, with a table of simulated times.
#
#   tests/comm/simulate_dispatch.sh [--gbit N] [--latency US] [--message US] [--tokens "T..."] [--tiny]
#                                   [CLUSTER...]
#
# CLUSTER is NODESxRANKS, ranks on each node (default 2x4 4x2 8x8 16x8). Every node has one full-duplex
# line of N Gbit/s (default 10), US microseconds from node to node (default 20); ranks of a node are
# joined by 80 Gbit/s and 0.5 us. A message takes US of its sender's and of its receiver's time (default
# 1). T tokens a rank (default 1 4 16 64), 4 choices, rows of 512 floats, 32 experts or one a rank if
# there are more ranks. Computing and copying take no simulated time; a look at a flag in shared memory
# takes 0.5 us. Combine follows dispatch at once, so that early ranks' rows back meet late ranks' rows
# out. --tiny: two small clusters and two T, to see that it works.
# The 128 ranks of 16x8 take minutes; the other clusters seconds. Needs what a build needs and
# libsimgrid-dev; everything it makes is in build/simulate.
set -eu
cd "$(dirname "$0")/../.."

fail() {
  echo "simulate_dispatch.sh: $2" >&2
  exit "$1"
}
gbit=10 latency=20 message=1 clusters="" tokens="1 4 16 64" tiny=""
while [ $# -gt 0 ]; do
  case "$1" in
    --gbit | --latency | --message | --tokens)
      [ $# -gt 1 ] || fail 64 "$1 needs a value"
      case $1:$2 in
        --tokens:*[!0-9\ ]* | --[!t]*:*[!0-9.]* | *: | *:.) fail 64 "$1 cannot be '$2'" ;;
        --gbit:*) gbit=$2 ;;
        --latency:*) latency=$2 ;;
        --message:*) message=$2 ;;
        --tokens:*) tokens=$2 ;;
      esac
      shift ;;
    --tiny) tiny=1 ;;
    -h | --help) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *[!0-9x]* | x* | *x | *x*x*) fail 64 "unknown argument $1; try --help" ;;
    *x*) clusters="$clusters $1" ;;
    *) fail 64 "unknown argument $1; try --help" ;;
  esac
  shift
done
if [ -n "$tiny" ]; then
  clusters="2x2 3x1" tokens="1 5"
fi
for tool in smpicxx smpirun; do
  command -v "$tool" >/dev/null || fail 65 "$tool is not there; install libsimgrid-dev"
done

out=build/simulate
mkdir -p "$out"
# comm/ and what it uses of other folders: a symbol that the linker does not find asks for its file here.
sources="$(echo comm/*.cpp) tests/comm/simulate_dispatch.cpp
  kernels/arena.cpp kernels/profile.cpp kernels/stream.cpp kernels/cpu/context.cpp
  kernels/cpu/elementwise.cpp kernels/cpu/gemm_cache.cpp kernels/cpu/gemm_f64.cpp kernels/cpu/permute.cpp
  src/base/dtype.cpp src/base/error.cpp src/base/hash.cpp src/base/rng.cpp"
include=$(dirname "$(command -v smpicxx)")/../include/smpi
objects="" changed=""
for source in $sources; do
  object=$out/$(echo "${source%.cpp}" | tr / .).o
  objects="$objects $object"
  [ ! -e "$object" ] || [ -n "$(find "$source" "$0" comm kernels src/base \
    \( -name '*.hpp' -o -path "$source" -o -path "$0" \) -newer "$object")" ] || continue
  [ -n "$changed" ] || echo "building in $out" >&2
  changed=1
  # Not by smpicxx, which replaces getpid: shared memory is opened by the number of the process.
  ${CXX:-c++} -std=c++20 -O2 -fPIC -fopenmp -march=native -ffp-contract=off -I. -I"$include" \
    -c "$source" -o "$object"
done
if [ -n "$changed" ] || [ ! -e "$out/simulate_dispatch" ]; then
  # shellcheck disable=SC2086
  smpicxx $objects -o "$out/simulate_dispatch" -fopenmp -s -Wl,--wrap=sched_yield \
    -lfmt -lspdlog -lxxhash -ldnnl
fi

# simulate NODES RANKS_PER_NODE: the lines of one cluster.
simulate() {
  experts=$(($1 * $2 > 32 ? $1 * $2 : 32))
  # A message from node to node passes two lines.
  half=$(awk -v us="$latency" 'BEGIN { print us / 2 }')
  cat >"$out/platform.xml" <<XML
<?xml version="1.0"?>
<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">
<platform version="4.1">
  <cluster id="nodes" prefix="node-" suffix="" radical="0-$(($1 - 1))" core="$2" speed="1Gf"
           bw="${gbit}Gbps" lat="${half}us" sharing_policy="SPLITDUPLEX"
           loopback_bw="80Gbps" loopback_lat="0.5us"/>
</platform>
XML
  for node in $(seq 0 $(($1 - 1))); do
    for _ in $(seq "$2"); do echo "node-$node"; done
  done >"$out/hosts"
  # Bandwidth and latency as given, without SMPI's factors for the messages of one real cluster. SMPI
  # lets time pass in tests of messages; here it passes where the program waits.
  # shellcheck disable=SC2086
  smpirun -platform "$out/platform.xml" -hostfile "$out/hosts" -np $(($1 * $2)) \
    --log=root.thres:critical --cfg=smpi/simulate-computation:no --cfg=smpi/test:0 \
    --cfg=smpi/bw-factor:0:1 --cfg=smpi/lat-factor:0:1 --cfg=network/crosstraffic:0 \
    --cfg=smpi/os:"0:${message}e-6:0" --cfg=smpi/ois:"0:${message}e-6:0" \
    --cfg=smpi/or:"0:${message}e-6:0" "$out/simulate_dispatch" "$2" "$experts" $tokens >"$out/times" ||
    fail 70 "the simulation of $1 x $2 ranks failed"
  awk -v cluster="$1 x $2" -v experts="$experts" '
    NF == 5 {
      printf "%-8s %7d %6d %11.1f %9.1f %6.2f %11.1f %9.1f %6.2f %9.2f\n", cluster, experts, $1,
        $4 / 1e3, $5 / 1e3, $4 / $5, $2 / 1e3, $3 / 1e3, $2 / $3, ($2 + $4) / ($3 + $5)
      ++lines
    }
    END { exit lines != '"$(echo "$tokens" | wc -w)"' }' "$out/times" || {
    cat "$out/times" >&2
    fail 70 "the simulation of $1 x $2 ranks printed this"
  }
}

echo "simulated ($(smpicxx --version | head -n 1), SMPI), microseconds until the last rank is done"
echo "$gbit Gbit/s and $latency us between nodes; $message us of a rank's time for a message, at each end;"
echo "computing and copying take no time; 4 choices, rows of 512 floats; ratio: flat / rails"
printf '%-8s %7s %6s %28s %28s %9s\n' "" "" "" "dispatch + combine" "plan (counts exchange)" sum
printf '%-8s %7s %6s %11s %9s %6s %11s %9s %6s %9s\n' cluster experts tokens \
  flat rails ratio flat rails ratio ratio
for cluster in ${clusters:-2x4 4x2 8x8 16x8}; do
  simulate "${cluster%x*}" "${cluster#*x}"
done
