#!/bin/sh
# Runs an MPI program on several "nodes" of this machine: network namespaces that only a bridge with
# TCP joins, each line held to a rate.
#
#   tests/support/with-nodes.sh NODES RANKS_PER_NODE [--rate RATE|none] COMMAND...
#
# RATE as tc has it (default 1gbit). Needs root, iproute2 and util-linux. Everything lives in
# namespaces of its own and is gone when the command ends.
set -eu
usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 64
}
[ $# -ge 3 ] || usage
for number in "$1" "$2"; do
  case $number in *[!0-9]* | 0 | ????*) usage ;; esac
done
[ "$3" != --rate ] || [ $# -ge 5 ] || usage
if [ "${ARCUS_NODES:-}" != inside ]; then
  ARCUS_NODES=inside exec unshare --net --mount sh "$0" "$@"
fi
nodes=$1
per_node=$2
shift 2
rate=1gbit
if [ "$1" = --rate ]; then
  rate=$2
  shift 2
fi

mkdir -p /run/netns
mount -t tmpfs tmpfs /run/netns
ip link set lo up
ip link add br0 type bridge
ip address add 10.77.0.254/24 dev br0
ip link set br0 up
hosts=""
for i in $(seq "$nodes"); do
  ip netns add "n$i"
  ip link add "v$i" type veth peer name eth0 netns "n$i"
  ip link set "v$i" master br0 up
  ip -n "n$i" link set lo up
  ip -n "n$i" address add "10.77.0.$i/24" dev eth0
  ip -n "n$i" link set eth0 up
  # An inherited bbr makes small exchanges erratic.
  ip netns exec "n$i" sysctl -q -w net.ipv4.tcp_congestion_control=reno
  if [ "$rate" != none ]; then
    ip netns exec "n$i" tc qdisc add dev eth0 root tbf rate "$rate" burst 128kb latency 50ms
  fi
  hosts="$hosts${hosts:+,}n$i:$per_node"
done

agent=/run/netns/agent
cat >"$agent" <<'AGENT'
#!/bin/sh
host=$1
shift
exec ip netns exec "$host" unshare -u sh -c "hostname $host; $*"
AGENT
chmod +x "$agent"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# Every node believes that its cores are its own: without yielding, waiting ranks would hold them.
mpirun -q --host "$hosts" --bind-to none --mca plm_rsh_agent "$agent" \
  --mca mpi_yield_when_idle 1 --mca pml ob1 --mca btl tcp,self,vader \
  --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 \
  -x OMP_NUM_THREADS=1 -x OMP_WAIT_POLICY=passive "$@"
