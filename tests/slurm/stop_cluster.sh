#!/usr/bin/env bash
# Stops a test cluster: stop_cluster.sh DIR. Running jobs are canceled.
dir=${1:?usage: stop_cluster.sh DIR}
export SLURM_CONF=$dir/slurm.conf
timeout 10 scancel --user="$(id -un)" 2>/dev/null
for daemon in slurmd slurmctld munged; do
  [ -f "$dir/$daemon.pid" ] && kill "$(cat "$dir/$daemon.pid")" 2>/dev/null
done
exit 0
