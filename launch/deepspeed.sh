#!/usr/bin/env bash
# Trains under DeepSpeed's launcher, on one node or on several, with any engine:
#
#     bash launch/deepspeed.sh CONFIG [KEY=VALUE ...]
#     HOSTFILE=launch/hostfile bash launch/deepspeed.sh CONFIG      # on the first node only: the others are started by ssh
#     HOSTFILE=launch/hostfile NODE_RANK=1 HEAD=node-a:29400 bash launch/deepspeed.sh CONFIG    # on each node: without ssh
#
# Set by the environment:
#     NPROC      processes on this node, without a hostfile        [one per GPU; 1 without GPUs]
#     HOSTFILE   a line per node: NAME slots=PROCESSES, the same number on all; see launch/hostfile
#     NODE_RANK  this node's line in it, from 0: run the script on each node, without ssh
#     HEAD       HOST:PORT of the node whose rank is 0             [by ssh: its first address, and a random port]
#     PYTHON     the Python that has dist_lora                     [that of .venv next to launch/, else python3]
#
# By ssh it needs pdsh here, the same folders on all nodes, and no space in this one's name; DeepSpeed passes on
# variables that start with PYTHON or NCCL, and those in the file .deepspeed_env (lines NAME=VALUE) of this folder or of
# $HOME.
#
# TERM, INT and USR1 ask this node's ranks to save and stop, and all others follow; by ssh, touch STOP in the run's
# folder instead. The exit code is that of the run (75: saved, run it again).
set -euo pipefail
exec < /dev/null

usage() {
    printf 'launch/deepspeed.sh: %s\n' "$*" >&2
    exit 2
}

(($#)) || usage "no config is given: bash launch/deepspeed.sh CONFIG [KEY=VALUE ...]"
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[[ -n ${PYTHON-} || -x $python ]] || python=python3
command -v -- "$python" > /dev/null || usage "PYTHON: there is no $python"
[[ -z ${NPROC-} || $NPROC =~ ^[1-9][0-9]*$ ]] || usage "NPROC: found $NPROC, expected a number of processes"
[[ -z ${HEAD-} || $HEAD =~ ^[^:[:space:]]+:[1-9][0-9]*$ ]] || usage "HEAD: found $HEAD, expected HOST:PORT of the first node"
# Without this DeepSpeed looks for a GPU on a machine that has none.
[[ -e /dev/nvidiactl || -e /dev/kfd ]] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

by_ssh=
nproc=${NPROC-}
if [[ -z ${HOSTFILE-} ]]; then
    [[ -z ${NODE_RANK-} ]] || usage "NODE_RANK is set and HOSTFILE isn't: set HOSTFILE, which has the number of nodes"
else
    [[ -z $nproc ]] || usage "NPROC and HOSTFILE are both set: the hostfile's slots are the processes of each node"
    [[ -f $HOSTFILE ]] || usage "HOSTFILE: there is no file $HOSTFILE"
    slots=$(sed -n 's/^[[:space:]]*[^#[:space:]][^[:space:]]*[[:space:]]\{1,\}slots=\([0-9]*\)[[:space:]]*\(#.*\)\{0,1\}$/\1/p' "$HOSTFILE")
    num_nodes=$(grep -c . <<< "$slots" || true)
    ((num_nodes)) || usage "HOSTFILE: $HOSTFILE has no line like node-a slots=8"
    (($(sort -u <<< "$slots" | wc -l) == 1)) || usage "HOSTFILE: the nodes of $HOSTFILE have different slots; every node needs the same number"
    nodes=(--hostfile="$HOSTFILE")
    if [[ -n ${NODE_RANK-} ]]; then
        if [[ ! $NODE_RANK =~ ^[0-9]+$ ]] || ((NODE_RANK >= num_nodes)); then
            usage "NODE_RANK: found $NODE_RANK, expected 0 to $((num_nodes - 1)): a line of $HOSTFILE"
        fi
        [[ -n ${HEAD-} ]] || usage "HEAD: found nothing, expected HOST:PORT of the first node, as reached from each"
        nodes+=(--no_ssh --node_rank="$NODE_RANK")
    elif ((num_nodes > 1)); then
        by_ssh=1
        [[ $PWD$python != *[[:space:]]* ]] || usage "DeepSpeed's ssh can't go to a folder with a space in its name: $PWD; set NODE_RANK on each node"
        command -v pdsh > /dev/null || usage "DeepSpeed reaches other nodes by pdsh, which isn't here; install it, or set NODE_RANK on each node"
    else
        nproc=$slots # on this node, without the ssh to it that DeepSpeed would use
    fi
fi
if [[ -z ${HOSTFILE-} || $num_nodes == 1 && -z ${NODE_RANK-} ]]; then
    nodes=(--hostfile=/dev/null/none) # doesn't exist: otherwise DeepSpeed takes /job/hostfile if there is one
    if [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then # which DeepSpeed ignores if it is given a number
        IFS=, read -r -a gpus <<< "$CUDA_VISIBLE_DEVICES"
        ((${nproc:=${#gpus[@]}} <= ${#gpus[@]})) || usage "NPROC: found $nproc, and CUDA_VISIBLE_DEVICES has ${#gpus[@]} GPUs"
        gpus=("${gpus[@]:0:nproc}")
        nodes+=(--include="localhost:$(IFS=,; printf '%s' "${gpus[*]}")")
    else
        nodes+=(--num_accelerators="${nproc:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}")
    fi
fi
# Below the ephemeral ports (from 32768): it may take half a minute until the ranks listen.
free_port() {
    local port
    while port=$((15000 + RANDOM % 17000)) && (: <> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do :; done
    printf '%s\n' "$port"
}
if [[ -n ${HEAD-} ]]; then
    nodes+=(--master_addr="${HEAD%:*}" --master_port="${HEAD##*:}")
else
    nodes+=(--master_port="$(free_port)")
fi

"$python" -m deepspeed.launcher.runner "${nodes[@]}" --no_local_rank --log_level=warning --module dist_lora train "$@" &
runner=$!

# shellcheck disable=SC2329  # by ask
children() { cat "/proc/$1/task/$1/children" 2> /dev/null || true; }
# DeepSpeed's own processes die of USR1 and orphan the ranks, or kill them 30 s after TERM. So the ranks get the signal.
# shellcheck disable=SC2329  # by the traps
ask() {
    local launcher ranks=()
    local -a pids
    if [[ -z $by_ssh ]]; then
        for launcher in $(children "$runner"); do
            read -r -a pids <<< "$(children "$launcher")"
            ranks+=("${pids[@]}")
        done
    fi
    kill -s "$1" "${ranks[@]:-$runner}" 2> /dev/null || true
}
for name in TERM INT USR1; do
    # shellcheck disable=SC2064  # expanded now
    trap "ask $name" "$name"
done
while kill -0 "$runner" 2> /dev/null; do wait "$runner" || true; done # a trap ends a wait early
code=0
wait "$runner" || code=$?
exit "$code"
