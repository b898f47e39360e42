#!/bin/sh
# Makes sure that the Debian packages for a purpose are there, and installs those that are missing
# where this user may. Purposes: build, test, text, study, cluster, fuzz (see the lists below).
#
#   launch/install-packages.sh build test
set -eu

build_packages="g++ make cmake ninja-build pkg-config git
  libopenmpi-dev openmpi-bin libhdf5-dev libdnnl-dev libhwloc-dev libcli11-dev libtomlplusplus-dev
  nlohmann-json3-dev libfmt-dev libspdlog-dev libxxhash-dev libsentencepiece-dev
  libpcre2-dev libutf8proc-dev"
test_packages="libgtest-dev hdf5-tools python3-numpy python3-h5py python3-venv"
# The texts themselves are fetched and unpacked by the quickstart, not installed.
text_packages="xz-utils libreadline8"
study_packages="jq gnuplot-nox"
# For tests, which start daemons of their own.
cluster_packages="slurmctld slurmd slurm-client munge"
# For tests that feed readers of files with changed ones.
fuzz_packages="clang libclang-rt-dev"

packages_for() {
  case "$1" in
    build) echo $build_packages ;;
    test) echo $test_packages ;;
    text) echo $text_packages ;;
    study) echo $study_packages ;;
    cluster) echo $cluster_packages ;;
    fuzz) echo $fuzz_packages ;;
    *)
      echo "install-packages.sh: unknown purpose $1; there are build, test, text, study, cluster and fuzz" >&2
      exit 64
      ;;
  esac
}

is_installed() {
  dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q '^install ok installed$'
}

[ $# -gt 0 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 64; }
if ! command -v dpkg-query >/dev/null; then
  echo "Not a Debian system: make sure that these are there (Debian's names):" >&2
  for purpose in "$@"; do packages_for "$purpose" >&2; done
  exit 0
fi

missing=""
for purpose in "$@"; do
  packages=$(packages_for "$purpose")
  for package in $packages; do
    is_installed "$package" || missing="$missing $package"
  done
done
[ -n "$missing" ] || exit 0

install="apt-get install --yes --no-install-recommends$missing"
if [ "$(id -u)" -eq 0 ]; then
  as_root=""
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root="sudo"
else
  echo "These packages are missing and this user may not install them; ask somebody to run" >&2
  echo "  apt-get update && $install" >&2
  exit 1
fi
echo "Installing$missing"
export DEBIAN_FRONTEND=noninteractive
# Debian starts services that it installs; nobody asked for Slurm's on this machine. (After a
# reboot Slurm's need an /etc/slurm/slurm.conf, which is not there; munge's listens on a local socket.)
policy=/usr/sbin/policy-rc.d
case " $* " in
  *" cluster "*)
    if [ ! -e $policy ]; then
      trap '$as_root rm -f $policy' EXIT
      printf '#!/bin/sh\nexit 101\n' | $as_root tee $policy >/dev/null
      $as_root chmod 755 $policy
    fi
    ;;
esac
# Another package manager at work is waited for.
$as_root apt-get -o DPkg::Lock::Timeout=300 -qq update
$as_root env DEBIAN_FRONTEND=noninteractive \
  apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -qq install --yes \
  --no-install-recommends $missing >/dev/null
