# shellcheck shell=bash disable=SC2034 # the sbatch files use what is set here
# Sourced by the sbatch files of this folder in the job's batch shell, on the first node: addresses, containers,
# signals, requeue by the run's exit code. Variables: docs/clusters.md.
set -euo pipefail

STOPPED=75 # exit code of a run that was asked to end: its checkpoint is saved, the same command goes on from it

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=${#nodes[@]}
export NGPUS_PER_NODE=${NGPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
export CPUS_PER_NODE=${CPUS_PER_NODE:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}}
export START_TIMEOUT=${START_TIMEOUT:-300} # seconds until all nodes must have joined
MAX_RESTARTS=${MAX_RESTARTS:-100}          # how often the job may go back to the queue
CONTAINER=${CONTAINER:-}                   # an image of Apptainer (a file ending in .sif) or, for Pyxis, any other
CONTAINER_OPTIONS=${CONTAINER_OPTIONS:-}   # of apptainer exec or of srun, separated by spaces
PATH=$PATH:/usr/sbin:/sbin                 # where ip is on some systems

# The first node's address, in the network of INTERFACE if that is set.
address_of() { ip -o -4 addr show dev "$1" | awk '{ sub("/.*", "", $4); print $4; exit }'; }
if [[ -z ${HEAD_ADDRESS:-} ]]; then
    if [[ -n ${INTERFACE:-} ]]; then
        HEAD_ADDRESS=$(address_of "$INTERFACE") || true
        [[ -n $HEAD_ADDRESS ]] || { echo "Error: INTERFACE=$INTERFACE: has no IPv4 address on $(hostname)" >&2; exit 1; }
    else
        HEAD_ADDRESS=$(hostname -I | cut -d ' ' -f 1)
    fi
fi
export HEAD_ADDRESS INTERFACE=${INTERFACE:-}

# Run at the start of each node's task: the address by which the others see it, and the interface for torch's ranks.
# shellcheck disable=SC2016 # the node's own shell expands it
ON_NODE='
route=$(ip -o -4 route get "$HEAD_ADDRESS" 2>/dev/null) || true
NODE_ADDRESS=$(sed -nE "s/.* src ([0-9.]+).*/\1/p" <<<"$route")
if ((SLURM_NODEID == 0)) || [[ -z $NODE_ADDRESS ]]; then NODE_ADDRESS=$HEAD_ADDRESS; fi
if [[ -z $INTERFACE ]]; then
    INTERFACE=$(ip -o -4 addr 2>/dev/null | awk -v address="$NODE_ADDRESS" "index(\$4, address \"/\") == 1 { print \$2; exit }") || true
fi
if [[ -n $INTERFACE ]]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE}
fi
'

# A task that runs a command as a process group, and passes SIGUSR1 on to it: many a Slurm signals only the task.
# shellcheck disable=SC2016 # the node's own shell expands it
RELAY='
trap : USR1
(trap "" USR1; exec setsid "$@") <&0 &
group=$!
trap "kill -USR1 -- -$group 2>/dev/null" USR1
while wait "$group"; kill -0 "$group" 2>/dev/null; do :; done
wait "$group"
'

# What starts a command on all nodes or on the first, one task each, with the environment of this shell.
read -ra container_options <<<"$CONTAINER_OPTIONS"
in_container=() srun_options=()
if [[ $CONTAINER == *.sif ]]; then
    in_container=(apptainer exec --nv "${container_options[@]}" "$CONTAINER")
elif [[ -n $CONTAINER ]]; then
    srun_options=(--container-image="$CONTAINER" "${container_options[@]}")
fi
on_all_nodes=(
    srun --export=ALL --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --cpus-per-task="$CPUS_PER_NODE"
    --cpu-bind=none "${srun_options[@]}"
)
on_first_node=("${in_container[@]}") # this shell is on it, but not in the container of Pyxis
if ((${#srun_options[@]})); then
    on_first_node=(
        srun --overlap --export=ALL --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" "${srun_options[@]}"
        bash -c "$RELAY" task
    )
fi

# SIGUSR1 and SIGTERM to this shell become SIGUSR1 to the run, again and again: while a program starts, it ignores it.
run_pid='' asker=''
ask() {
    asked=1
    if [[ -n $run_pid && -z $asker ]]; then
        while kill -USR1 -- "$run_pid" 2>/dev/null; do sleep 5; done &
        asker=$!
    fi
}
asked=''
trap ask USR1 TERM

# Wait for a process however many signals come; its exit code.
wait_for() {
    local code
    while :; do
        code=0
        wait "$1" || code=$?
        kill -0 "$1" 2>/dev/null || break
    done
    code=0
    wait "$1" || code=$? # that of a process which ended just when a signal came
    return "$code"
}

# Run a command as a process group of its own, in which a program must handle SIGUSR1 to feel it.
run_group() {
    [[ -z $asked ]] || return "$STOPPED"
    (
        trap '' USR1
        exec setsid "$@"
    ) &
    run_pid=-$!
    local code=0
    wait_for $! || code=$?
    [[ -z $asker ]] || kill "$asker" 2>/dev/null || true
    return "$code"
}

# End the job with the run's exit code. One that was asked to end goes back to the queue, unless it is cancelled, or
# Slurm has put it there itself: then it is not RUNNING any more.
end_job() {
    local code=$1 restarts=${SLURM_RESTART_COUNT:-0}
    if ((code == STOPPED)) && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
        if ((restarts >= MAX_RESTARTS)); then
            echo "Error: MAX_RESTARTS=$MAX_RESTARTS: the job was requeued as often; submit it again to go on" >&2
        else
            echo "Requeued: the run ended at a checkpoint, restart $((restarts + 1)) of at most $MAX_RESTARTS"
            scontrol requeue "$SLURM_JOB_ID"
        fi
    fi
    exit "$code"
}
