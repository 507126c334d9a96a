#!/usr/bin/env bash
# Starts a real Slurm of one node on the loopback interface, for the tests: start_cluster.sh DIR, then
#
#   export SLURM_CONF=DIR/slurm.conf     sbatch, squeue and scancel now talk to it
#   stop_cluster.sh DIR
#
# Needs Debian's slurm-wlm and munge; runs as root or as any user, and touches nothing outside DIR. No cgroups and no
# systemd, so it works in containers. Two partitions: jobs of `urgent` preempt (requeue) those of `debug`.
#   CPUS (default: all), MAX_ARRAY_SIZE (default: Slurm's 1001)
set -euo pipefail
dir=${1:?usage: start_cluster.sh DIR}
mkdir -p "$dir"/{spool,state,log}
dir=$(cd "$dir" && pwd)
host=$(hostname -s)
user=$(id -un)
# Two free ports, so that several clusters may run side by side.
read -r ctld_port slurmd_port < <(python3 - <<'PYTHON'
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
PYTHON
)
memory_mb=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
[ -s "$dir/munge.key" ] || dd if=/dev/urandom of="$dir/munge.key" bs=1 count=1024 2>/dev/null
chmod 400 "$dir/munge.key"
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
  --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed"
# cred_expire: a requeued job waits until its old credential cannot be valid any more, 120 s by default.
cat >"$dir/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$ctld_port
SlurmdPort=$slurmd_port
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize=${MAX_ARRAY_SIZE:-1001}
ReturnToService=2
InactiveLimit=0
KillWait=10
SlurmdTimeout=300
NodeName=$host NodeAddr=127.0.0.1 CPUs=${CPUS:-$(nproc)} RealMemory=$memory_mb State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=1-0 State=UP PriorityTier=1
PartitionName=urgent Nodes=$host MaxTime=1-0 State=UP PriorityTier=10
CONF
export SLURM_CONF=$dir/slurm.conf
# Without these, a job that starts this script (or a shell of one) would hand its own job to the daemons.
for name in $(compgen -v SLURM_ | grep -v '^SLURM_CONF$' || true); do unset "$name"; done
slurmctld -c -f "$SLURM_CONF"
slurmd -c -f "$SLURM_CONF" -N "$host"
for _ in $(seq 100); do
  [ "$(sinfo -h -p debug -o %t 2>/dev/null)" = idle ] && { sinfo; exit 0; }
  sleep 0.2
done
echo "the node did not come up; logs: $dir/log" >&2
tail -n 5 "$dir"/log/*.log >&2
exit 1
