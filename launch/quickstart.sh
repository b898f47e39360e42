#!/bin/sh
# From a fresh Debian machine to a trained mixture-of-experts language model.
#
#   launch/quickstart.sh [--minutes N]
#
# Installs packages, builds `arcus`, prepares text of three far-apart domains (English prose, C and
# C++ code, Chinese), trains a small model on two ranks that own half of the experts each for at most
# N minutes (default 8), evaluates it on text it has never seen and prints a sample. Started again,
# it goes on where it stopped or says what is done.
set -eu
cd "$(dirname "$0")/.."

minutes=8
case "${1:-}" in
  "") ;;
  --minutes)
    minutes=${2:-}
    case "$minutes" in
      "" | *[!0-9.]* | .* | *.*.* | 0 | 0.0*)
        echo "quickstart.sh: --minutes takes a number above 0, e.g. --minutes 8" >&2
        exit 64
        ;;
    esac
    ;;
  -h | --help)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  *)
    echo "quickstart.sh: unknown option $1; it takes --minutes N" >&2
    exit 64
    ;;
esac

build=build/quickstart
data=data/quickstart
run=runs/quickstart
arcus=$build/arcus
config=launch/configs/quickstart.toml
text_packages="bible-kjv bible-kjv-text fortunes fortunes-zh manpages-zh debian-reference-zh-cn"
megabytes_of_code=24

say() { printf '\n== %s\n' "$*"; }

# Ctrl-C: mpirun sends TERM after five seconds and KILL after five more, in which an interrupted run
# saves a checkpoint. As many ranks as
# asked for, on however few cores; one that waits leaves its core to the other.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_btl_base_warn_component_unused=0 OMPI_MCA_odls_base_sigkill_timeout=5
mpirun_2="mpirun -q --oversubscribe --bind-to none -np 2"

introduce() {
  cat <<TEXT
This builds Arcus and trains a small mixture-of-experts language model, in about
$(awk "BEGIN { printf \"%.0f\", $minutes + 7 }") minutes on two cores:

  1. install packages (needs root or sudo)                    about 1 min
  2. build the program, arcus, in $build          about 3 min
  3. fetch text packages and prepare them in $data about 1 min
  4. train on 2 ranks, half of the experts on each            at most $minutes min
  5. evaluate on text that was held out, print a sample       about 1 min

Everything it makes stays in build/, data/ and runs/.
TEXT
}

build_arcus() {
  cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release -DARCUS_BUILD_TESTS=OFF \
    -DARCUS_BUILD_BENCHMARKS=OFF >$build.log 2>&1 || { cat $build.log >&2; exit 1; }
  cmake --build $build --target arcus
}

# Text comes out of packages that are unpacked here, not installed: no root is needed, and systems
# that leave documentation out of installed packages have it nonetheless.
fetch_packages() {
  [ -e $data/packages/complete ] && return
  rm -rf $data/packages
  mkdir -p $data/packages/unpacked
  (
    cd $data/packages
    # As root, apt drops its rights and says so when it cannot write here.
    apt-get download -qq -o APT::Sandbox::User=root $text_packages
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
  )
  touch $data/packages/complete
}

# Chapters, with "%" between them as in files of fortunes.
extract_prose() {
  unpacked=$data/packages/unpacked
  mkdir -p "$1"
  $unpacked/usr/bin/bible -p $unpacked/usr/lib -l79 'gen1:1-rev22:21' </dev/null |
    awk '/^([1-3] )?[A-Z][A-Za-z ]* [0-9]+$/ { print "%" } { print }' >"$1/bible.txt"
  for file in "$unpacked"/usr/share/games/fortunes/*; do
    case "$file" in
      *.dat | *.u8 | */chinese | */song100 | */tang300) ;;
      *) iconv -f UTF-8 -t UTF-8 "$file" >"$1/$(basename "$file").txt" 2>/dev/null ||
        rm -f "$1/$(basename "$file").txt" ;;
    esac
  done
}

# Headers that the build needed anyway, spread over all of them.
extract_code() {
  mkdir -p "$1"
  find /usr/include -type f -size +1k -size -64k \
    \( -name '*.h' -o -name '*.hpp' -o -path '*/c++/*' \) -printf '%s %p\n' |
    LC_ALL=C sort -k2 | LC_ALL=C sort -R -k2 --random-source=/dev/zero |
    awk -v most=$megabytes_of_code '{ sum += $1; if (sum > most * 1e6) exit; print $2 }' |
    while read -r file; do
      iconv -f UTF-8 -t UTF-8 "$file" >/dev/null 2>&1 || continue
      cp "$file" "$1/$(echo "${file#/usr/include/}" | tr / _)"
    done
}

extract_chinese() {
  unpacked=$data/packages/unpacked
  mkdir -p "$1"
  for name in chinese song100 tang300; do
    sed 's/\x1b\[[0-9;]*m//g' "$unpacked/usr/share/games/fortunes/$name" >"$1/$name.txt"
  done
  zcat $unpacked/usr/share/debian-reference/debian-reference.zh-cn.txt.gz >"$1/reference.txt"
  # Manual pages without their comments and font changes.
  find $unpacked/usr/share/man/zh_CN -type f -name '*.gz' -size +0 | while read -r file; do
    page="$1/$(basename "$file" .gz).txt"
    zcat "$file" | sed -e "/^[.']\\\\\"/d" -e 's/\\f[BIRP]//g' -e 's/\\-/-/g' \
      -e 's/^\.[A-Z][A-Z] *//' >"$page"
    iconv -f UTF-8 -t UTF-8 "$page" >/dev/null 2>&1 && [ "$(wc -c <"$page")" -gt 500 ] ||
      rm -f "$page"
  done
}

prepare_text() {
  if [ -e $data/tokens/dataset.json ]; then
    echo "already there: $data/tokens"
    return
  fi
  fetch_packages
  rm -rf $data/text
  extract_prose $data/text/prose
  extract_code $data/text/code
  extract_chinese $data/text/chinese
  $arcus prepare --out $data/tokens --tokenizer spm:4096 --spm-sample-mib 8 \
    --valid-fraction 0.03 --skip-bad \
    --domain prose=$data/text/prose --domain code=$data/text/code \
    --domain chinese=$data/text/chinese --separator prose=% --separator chinese=% \
    --split-bytes prose=20000 --split-bytes chinese=20000
}

# How many steps fit into the time: the learning rate has to fall at the end, and machines differ.
choose_steps() {
  if [ ! -e $run/steps ]; then
    echo "measuring the speed of this machine"
    rm -rf $run-speed
    $mpirun_2 $arcus train $config --set run.dir=$run-speed --set train.steps=12 \
      --set train.warmup_steps=1 --set eval.batches=1 >$data/speed.log 2>&1 ||
      { tail -n 5 $data/speed.log >&2; exit 1; }
    mkdir -p $run
    # The median of the last steps; the rest of the time is for evaluations and checkpoints.
    sed -n 's/.*"step_ms":\([0-9.]*\).*/\1/p' $run-speed/metrics.jsonl | tail -n 9 | sort -n |
      awk -v minutes="$minutes" '{ ms[NR] = $1 }
        END { steps = int(minutes * 60e3 * 0.85 / ms[int((NR + 1) / 2)]); print steps < 20 ? 20 : steps }' \
        >$run/steps.new
    mv $run/steps.new $run/steps
    rm -rf $run-speed
  fi
  cat $run/steps
}

steps_done() {
  $arcus inspect --json $run 2>/dev/null | sed -n 's/^ *"step": \([0-9]*\).*/\1/p' | head -n 1
}

train() {
  steps=$(choose_steps | tail -n 1)
  done_steps=$(steps_done || true)
  if [ "${done_steps:-0}" -ge "$steps" ]; then
    echo "already trained: step $done_steps of $steps in $run; remove $run to train for another time"
    return
  fi
  $mpirun_2 $arcus train $config --set train.steps="$steps" --set run.max_minutes="$minutes" \
    --set train.warmup_steps=$((steps / 20 + 1))
}

print_sample() {
  $mpirun_2 $arcus generate $run --prompt 'And the LORD said' --max-tokens 80 --seed 3
  echo
  $mpirun_2 $arcus generate $run --prompt '#include <' --max-tokens 80 --seed 3
}

started=$(date +%s)
introduce
say "1. packages"
launch/install-packages.sh build text
say "2. build"
mkdir -p build $data
build_arcus
say "3. text"
prepare_text
say "4. training"
train
say "5. held-out text"
launch/compare-with-xz.sh $arcus $run $data/tokens $mpirun_2
say "A sample"
print_sample
cat <<TEXT

Done in $((($(date +%s) - started + 59) / 60)) minutes. To try next:

  $arcus generate $run --prompt "In the beginning" --temperature 0.5
  $arcus inspect $run
  $arcus train $config --plan --ranks 8
  $arcus help config
  $mpirun_2 $arcus train launch/configs/hour.toml   # an hour
  launch/quickstart.sh            # goes on if training was cut short
TEXT
