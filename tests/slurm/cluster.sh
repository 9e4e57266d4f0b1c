#!/usr/bin/env bash
# A real SLURM on this machine: one controller, two compute nodes (slurmd), munge. For tests.
#
#     tests/slurm/cluster.sh up FOLDER      prints the line that points SLURM's commands at it: export SLURM_CONF=...
#     tests/slurm/cluster.sh down FOLDER
#
# Needs root, slurm-wlm and munge. Everything lies in FOLDER; a munge that already runs is used as it is.
set -euo pipefail
folder=$(realpath -m "$2")
host=$(hostname -s)

munge_socket() { for path in /run/munge/munge.socket.2 /var/run/munge/munge.socket.2; do [ -S "$path" ] && munge -n >/dev/null 2>&1 && return 0; done; return 1; }

up() {
    mkdir -p "$folder"/{state,spool1,spool2,log}
    if ! munge_socket; then
        [ -s /etc/munge/munge.key ] || { dd if=/dev/urandom bs=1 count=1024 of=/etc/munge/munge.key status=none; }
        mkdir -p /run/munge
        chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge
        chmod 400 /etc/munge/munge.key
        runuser -u munge -- munged
        touch "$folder/munged"
    fi
    cat >"$folder/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
SlurmctldPort=$(free_port)
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdSpoolDir=$folder/spool-%n
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=60
SwitchType=switch/none
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$(nproc) State=UNKNOWN
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
EOF
    : >"$folder/cgroup.conf"
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld
    slurmd -N node1
    slurmd -N node2
    for _ in $(seq 100); do
        [ "$(sinfo -h -N -t idle 2>/dev/null | wc -l)" = 2 ] && { echo "export SLURM_CONF=$SLURM_CONF"; return; }
        sleep 0.2
    done
    echo "error: the two nodes did not come up; see $folder/log" >&2
    sinfo -N >&2 || true
    exit 1
}

down() {
    for pidfile in "$folder"/slurmd-node1.pid "$folder"/slurmd-node2.pid "$folder"/slurmctld.pid; do
        [ -s "$pidfile" ] && kill "$(cat "$pidfile")" 2>/dev/null || true
    done
    [ -e "$folder/munged" ] && kill "$(cat /run/munge/munged.pid)" 2>/dev/null || true
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

"$1"
