#!/usr/bin/env bash
# A throw-away SLURM on this machine, for tests: real munged, slurmctld and slurmd, everything in one folder.
# No systemd, no cgroups, nothing in /etc; any user can run it. Debian packages: see packages.sh beside it.
#
#   single_node.sh start DIR [OWNER]   then: . DIR/env.sh; sinfo. It stops by itself when process OWNER is gone.
#   single_node.sh stop DIR            cancels all jobs, ends the daemons
#   single_node.sh daemons DIR         names of those that run
#
# The machine plays two nodes, n1 and n2, with $CPUS processors each. Jobs of partition urgent preempt those of
# partition main, which are requeued.
set -euo pipefail

command=$1
D=$(realpath -m "$2")   # sockets live in it: at most about 90 characters
OWNER=${3:-}
CPUS=${CPUS:-4}
PORT=${PORT:-16817}     # and the two after it
NODES="n1 n2"
ME=$(id -un)
HOST=$(hostname -s)
export SLURM_CONF=$D/slurm.conf PATH=$PATH:/usr/sbin:/sbin

pid_of() { cat "$D/run/$1.pid" 2>/dev/null || echo 0; }

runs() {   # is the process of that pid file ours by name, and not a zombie that nobody collects?
  local pid; pid=$(pid_of "$1")
  grep -qsx "${1%%.*}" "/proc/$pid/comm" && grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$pid/status"
}

wait_for() {   # up to 30 s
  for _ in $(seq 150); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
  echo "SLURM did not come up: $*" >&2
  tail -qn 5 "$D"/log/*.log >&2
  return 1
}

all_idle() { [ "$(timeout 5 sinfo -h -N -p main -o %T | sort | uniq -c | xargs)" = "2 idle" ]; }

write_configuration() {
  cat <<CONF
ClusterName=test
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
# a requeued job starts again when its old credential has expired: 120 s by default
AuthInfo=socket=$D/run/munge.sock,cred_expire=10
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
# a request that no node can meet is refused, not queued for ever
EnforcePartLimits=ALL
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=2
# squeue tells of jobs that ended so many seconds ago
MinJobAge=3600
# ids of an earlier cluster must not come again: submitit would find that one's results in a folder used twice
FirstJobId=$(($(date +%s) % 60000000 + 1000))
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
CONF
  local port=$PORT
  for node in $NODES; do
    port=$((port + 1))
    echo "NodeName=$node NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$port CPUs=$CPUS RealMemory=4000 State=UNKNOWN"
  done
}

start() {
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || { echo "$program is not installed" >&2; return 1; }
  done
  for port in $(seq "$PORT" $((PORT + 2))); do   # a stranger's slurmd there would take our jobs
    if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then echo "port $port is taken; set PORT" >&2; return 1; fi
  done
  if [ -e "$D" ]; then rmdir "$D"; fi            # an empty folder, or none: nothing of others is wiped
  mkdir -p "$D"/{run,log,state}
  for node in $NODES; do mkdir -p "$D/spool/$node"; done
  trap 'if [ $? != 0 ]; then stop; fi' EXIT
  (umask 077; head -c 1024 /dev/urandom >"$D/munge.key")
  # --force: it dislikes parent folders that are private, or that a group can write
  munged --force --num-threads=2 --key-file="$D/munge.key" --socket="$D/run/munge.sock" --seed-file="$D/state/munge.seed" \
    --pid-file="$D/run/munged.pid" --log-file="$D/log/munged.log" 2>>"$D/log/munged.log"
  write_configuration >"$D/slurm.conf"
  slurmctld
  for node in $NODES; do slurmd -N "$node"; done
  wait_for all_idle
  # nodes called n1, n2 have no address that a second process could look up
  echo "export SLURM_CONF=$D/slurm.conf MASTER_ADDR=127.0.0.1" >"$D/env.sh"
  if [ -n "$OWNER" ]; then setsid "$0" watch "$D" "$OWNER" </dev/null >/dev/null 2>&1 & fi
}

stop() {
  if runs slurmctld; then
    timeout 10 scancel --quiet --user="$ME" 2>/dev/null || true
    for _ in $(seq 75); do   # jobs end before the daemons that would end them
      [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
      sleep 0.2
    done
  fi
  for daemon in slurmd.n1 slurmd.n2 slurmctld munged; do
    if runs "$daemon"; then kill "$(pid_of "$daemon")"; fi
    for _ in $(seq 75); do runs "$daemon" || continue 2; sleep 0.2; done
    kill -9 "$(pid_of "$daemon")"
  done
}

watch() {
  while kill -0 "$OWNER" 2>/dev/null && runs slurmctld; do sleep 1; done
  stop
}

daemons() {
  for daemon in munged slurmctld slurmd.n1 slurmd.n2; do if runs "$daemon"; then echo "$daemon"; fi; done
}

"$command"
