#!/bin/sh
# A real Slurm cluster of four nodes on this machine, for tests: munged, slurmctld, four slurmd, all
# on loopback, on ports that are free, with everything they write in DIR.
#
#   tests/slurm/cluster.sh up DIR          # DIR: absolute and short, e.g. /tmp/cluster; made anew
#   tests/slurm/cluster.sh down DIR        # ends jobs and daemons, removes DIR
#   tests/slurm/cluster.sh kill-rank DIR N     # SIGKILL for the ranks on node nN
#   tests/slurm/cluster.sh kill-node DIR N     # the same as if it lost its power
#   tests/slurm/cluster.sh start-node DIR N    # it comes back
#   tests/slurm/cluster.sh left DIR        # prints the processes that belong to DIR
#
# Use it with SLURM_CONF=DIR/slurm.conf. `up` first ends what an earlier run with the same DIR left.
# Jobs of the partition `urgent` put others back into the queue. Exit code 77: there can be no
# cluster here, and why.
set -eu

# The processes of a cluster are told by this variable: this script must not be one of them.
[ -z "${SLURM_CONF:-}" ] || exec env -u SLURM_CONF "$0" "$@"

nodes="1 2 3 4"

unable() {
  echo "cluster.sh: $*" >&2
  exit 77
}

# Debian's daemons are not in every user's PATH.
PATH=$PATH:/usr/sbin:/sbin

check_tools() {
  for tool in slurmctld slurmd sbatch munged mungekey; do
    command -v $tool >/dev/null ||
      unable "$tool is not installed (launch/install-packages.sh cluster)"
  done
  getent hosts "$(hostname -s)" >/dev/null ||
    unable "this machine does not know its own name, $(hostname -s): add it to /etc/hosts"
}

# Five ports in a row that nobody listens on, below those that the system hands out.
free_port() {
  awk -v seed=$$ '
    { split($2, address, ":"); used[strtonum_hex(address[2])] = 1 }
    function strtonum_hex(text,   i, value) {
      for (i = 1; i <= length(text); ++i)
        value = 16 * value + index("0123456789ABCDEF", substr(text, i, 1)) - 1
      return value
    }
    END {
      for (try = 0; try < 2000; ++try) {
        port = 12000 + (seed * 7 + try) % 2500 * 8
        taken = 0
        for (i = 0; i < 5; ++i) taken += (port + i) in used
        if (!taken) { print port; exit }
      }
    }' /proc/net/tcp
}

# cred_expire: a requeued job starts after that time, two minutes by default.
write_config() {
  host=$(hostname -s)
  port=$(free_port)
  cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=$port
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
TmpFS=$dir/%n/tmp
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=pmix
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
KillWait=10
SlurmdTimeout=3
MessageTimeout=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-4] NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1))-$((port + 4)) CPUs=1 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
  # Not every container has control groups mounted; this plugin looks for them only when it has to.
  grep -q ' /sys/fs/cgroup' /proc/mounts || echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"
}

start_node() {
  # What a reboot clears; PMIx refuses to start a step whose folder it finds.
  rm -rf "$dir/n$1/tmp" "$dir/n$1"/pmix.* "$dir/n$1"/stepd.* "$dir/n$1/n$1"_*
  mkdir -p "$dir/n$1/tmp"
  slurmd -N "n$1" -f "$dir/slurm.conf"
}

failed() {
  tail -n 20 "$dir"/*.log "$dir"/n?/slurmd.log >&2 || true
  down
  echo "cluster.sh: $*" >&2
  exit 1
}

up() {
  check_tools
  down
  # munged wants its socket to be within everybody's reach.
  mkdir -m 711 "$dir"
  mkdir -m 700 "$dir/state"
  write_config
  srun --mpi=list 2>&1 | grep -q pmix || unable "this Slurm has no PMIx, which Open MPI needs"
  mungekey --create --keyfile="$dir/munge.key"
  munged --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
  slurmctld -c -f "$dir/slurm.conf" -L "$dir/slurmctld.log" || failed "slurmctld did not start"
  for node in $nodes; do start_node "$node" || failed "the slurmd of n$node did not start"; done
  tries=200
  until [ "$(sinfo -h -N -p main -t idle 2>/dev/null | wc -l)" -eq 4 ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || failed "the nodes did not come up"
    sleep 0.05
  done
}

# This process and those above it: their command lines name DIR too.
ancestors() {
  pid=$$
  while [ "${pid:-0}" -gt 0 ]; do
    printf ' %s ' "$pid"
    pid=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null)
  done
}

# Of the files of /proc, those with this very entry: of an environment, say.
with_entry() {
  entry=$1
  shift
  grep -lzxF -e "$entry" "$@" 2>/dev/null || true
}

# slurmstepd writes over its command line and environment, but keeps its node's log open.
stepds() {
  grep -lx slurmstepd /proc/[0-9]*/comm 2>/dev/null | while IFS=/ read -r _ _ pid _; do
    ! find "/proc/$pid/fd" -lname "$1/*" 2>/dev/null | grep -q . || echo "$pid"
  done
}

# Processes that Slurm started on a node: the batch shell, srun, ranks.
on_node() {
  files=$(with_entry "SLURMD_NODENAME=n$1" /proc/[0-9]*/environ)
  # shellcheck disable=SC2086  # several words
  [ -z "$files" ] || with_entry "SLURM_CONF=$dir/slurm.conf" $files | cut -d / -f 3
}

# Daemons by their command lines, steps, and what they started: not what a user's shell with this
# SLURM_CONF did.
left() {
  above=$(ancestors)
  {
    grep -lF -e "$dir/" /proc/[0-9]*/cmdline 2>/dev/null || true
    for node in $nodes; do on_node "$node" | sed 's|.*|/proc/&/|'; done
    stepds "$dir" | sed 's|.*|/proc/&/|'
  } | cut -d / -f 3 | sort -un | while read -r pid; do
    case "$above" in *" $pid "*) continue ;; esac
    # A zombie has ended already, whenever its parent looks.
    grep -q '^State:[[:space:]]*[^Z[:space:]]' "/proc/$pid/status" 2>/dev/null && echo "$pid"
  done || true
}

# Signals what belongs to DIR until nothing does.
end_with() {
  tries=$2
  while [ "$tries" -gt 0 ]; do
    pids=$(left)
    [ -n "$pids" ] || return 0
    # shellcheck disable=SC2086  # several words
    kill -s "$1" $pids 2>/dev/null || true
    tries=$((tries - 1))
    sleep 0.1
  done
}

down() {
  [ -e "$dir" ] || return 0
  # Only what this user made: the name is known to others.
  [ -n "$(find "$dir" -maxdepth 0 -type d -user "$(id -u)")" ] ||
    unable "$dir is there and is not a folder of yours"
  # Daemons that end do not end their steps.
  if [ -s "$dir/slurmctld.pid" ]; then
    timeout 5 scancel -u "$(id -un)" -s KILL -f 2>/dev/null || true
    timeout 5 scancel -u "$(id -un)" 2>/dev/null || true
    tries=50
    while [ $tries -gt 0 ] && [ -n "$(timeout 5 squeue -h 2>/dev/null)" ]; do
      tries=$((tries - 1))
      sleep 0.1
    done
  fi
  end_with TERM 30
  end_with KILL 30
  rm -rf "$dir"
}

kill_rank() {
  for pid in $(on_node "$1"); do
    ! grep -qx arcus "/proc/$pid/comm" 2>/dev/null || kill -s KILL "$pid"
  done
}

# Those first who could tell the controller of the others' end.
kill_node() {
  # shellcheck disable=SC2046  # several words
  kill -s KILL $(stepds "$dir/n$1") $(cat "$dir/n$1/slurmd.pid") $(on_node "$1") 2>/dev/null || true
}

case "${1:-}:${2:-}" in
  up:/* | down:/* | kill-rank:/* | kill-node:/* | start-node:/* | left:/*) ;;
  *)
    sed -n '2,16s/^# \{0,1\}//p' "$0"
    exit 64
    ;;
esac
dir=$2
export SLURM_CONF="$dir/slurm.conf"
case "$1" in
  up) up ;;
  down) down ;;
  kill-rank) kill_rank "$3" ;;
  kill-node) kill_node "$3" ;;
  start-node) start_node "$3" ;;
  left) left ;;
esac
