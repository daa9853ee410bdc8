#!/usr/bin/env bash
# A private SLURM on this machine, for tests: munged, slurmctld and one slurmd per node, as the user who starts it, in a
# folder and on ports of its own. GPUs are links to /dev/null. Needs the Debian packages slurm-wlm and munge.
#   slurmlab.sh start DIR [NODES=3] [GPUS=2]    then: export SLURM_CONF=DIR/slurm.conf
#   slurmlab.sh stop DIR
set -euo pipefail
PATH=$PATH:/usr/sbin
command=${1:-} dir=${2:-} nodes=${3:-3} gpus=${4:-2}
export SLURM_CONF=$dir/slurm.conf

free_ports() { # $1 ports in a row that nobody listens on, below those the system gives out
    local base port
    while :; do
        base=$((20000 + RANDOM % 10000))
        for port in $(seq "$base" $((base + $1 - 1))); do
            ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
        done
        echo "$base" && return
    done
}

configure() {
    local host user port node gpu
    host=$(hostname -s) user=$(id -un) port=$(free_ports $((nodes + 1)))
    mkdir -p "$dir"/{state,log,munge,spool,gpu}
    cat >"$SLURM_CONF" <<END
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job waits until credentials have expired: by default two minutes.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
StateSaveLocation=$dir/state
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdSpoolDir=$dir/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobs.txt
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=0
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
GresTypes=gpu
PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP
END
    for node in $(seq "$nodes"); do
        echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=4 RealMemory=8000 Gres=gpu:fake:$gpus"
    done >>"$SLURM_CONF"
    for gpu in $(seq 0 $((gpus - 1))); do ln -s /dev/null "$dir/gpu/gpu$gpu"; done
    echo "Name=gpu Type=fake File=$dir/gpu/gpu[0-$((gpus - 1))]" >"$dir/gres.conf"
    echo "CgroupAutomount=no" >"$dir/cgroup.conf"
}

start() {
    local node
    stop
    rm -rf "$dir"
    configure
    chmod 755 "$dir" "$dir/munge"
    head -c 128 /dev/urandom >"$dir/munge/key" && chmod 400 "$dir/munge/key"
    munged --force --num-threads=2 --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
        --pid-file="$dir/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
    slurmctld
    for node in $(seq "$nodes"); do slurmd -N "n$node"; done
    for _ in $(seq 100); do
        [ "$(sinfo --noheader --states idle --format %D 2>/dev/null)" = "$nodes" ] && return
        sleep 0.2
    done
    tail -n 5 "$dir"/log/*.log >&2
    return 1
}

stop() {
    local file pid
    [ -s "$SLURM_CONF" ] || return 0
    timeout 5 scancel --user "$(id -un)" --full 2>/dev/null || true
    for _ in $(seq 25); do [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break; sleep 0.2; done
    for file in "$dir"/slurmd.*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
        pid=$(cat "$file" 2>/dev/null) && kill -9 "$pid" 2>/dev/null || true # nothing of theirs is needed any more
    done
}

case "$command" in
    start | stop) [ -n "$dir" ] && "$command" ;;
    *) sed -n '2,5p' "$0" && exit 2 ;;
esac
