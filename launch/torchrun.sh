#!/usr/bin/env bash
# Trains under torchrun, on one node or on each of several:
#
#     bash launch/torchrun.sh CONFIG [KEY=VALUE ...]
#     NNODES=2 HEAD=node-a:29400 bash launch/torchrun.sh CONFIG     # the same on every node; HEAD is one of them
#
# Set by the environment:
#     NPROC         processes on this node, the same on all        [one per GPU; 1 without GPUs]
#     NNODES        nodes; 2:4 starts with two or more and continues with those that remain or join   [1]
#     HEAD          HOST:PORT of the rendezvous: one of the nodes, by a name that all of them resolve
#     RUN_ID        the same on all nodes of a run, if several runs share one HOST    [CONFIG's name]
#     LOCAL_ADDR    this node's address, if others can't resolve its hostname
#     JOIN_TIMEOUT  seconds within which all nodes must join  [300]
#     MAX_RESTARTS  how often torchrun restarts the ranks after one was lost   [0; 3 if NNODES is a range]
#     PYTHON        the Python that has dist_lora                  [that of .venv next to launch/, else python3]
#
# TERM, INT and USR1 ask all ranks to save and stop. The exit code is that of the run (75: saved, run it again), which
# torchrun alone doesn't pass on.
set -euo pipefail
exec < /dev/null

usage() {
    printf 'launch/torchrun.sh: %s\n' "$*" >&2
    exit 2
}
is_number() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

(($#)) || usage "no config is given: bash launch/torchrun.sh CONFIG [KEY=VALUE ...]"
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[[ -n ${PYTHON-} || -x $python ]] || python=python3
command -v -- "$python" > /dev/null || usage "PYTHON: there is no $python"
nnodes=${NNODES:-1}
join_timeout=${JOIN_TIMEOUT:-300}
[[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || usage "NNODES: found $nnodes, expected a number, or a range like 2:4"
is_number "$join_timeout" || usage "JOIN_TIMEOUT: found $join_timeout, expected seconds"
[[ -z ${NPROC-} ]] || is_number "$NPROC" || usage "NPROC: found $NPROC, expected a number of processes"

if [[ $nnodes == 1 ]]; then
    rendezvous=(--standalone)
else
    [[ ${HEAD-} =~ ^[^:[:space:]]+:[1-9][0-9]*$ ]] || usage "HEAD: found ${HEAD:-nothing}, expected HOST:PORT of one of the nodes"
    rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-$(basename -- "$1")}"
        --rdzv-conf="join_timeout=$join_timeout")
    [[ -z ${LOCAL_ADDR-} ]] || rendezvous+=(--local-addr="$LOCAL_ADDR")
fi
restarts=0
[[ $nnodes != *:* ]] || restarts=3
nproc=${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun's own choice, without its warning

started=$(date +%s)
# Without these options torchrun dies of USR1, and kills its ranks 30 s after a signal.
"$python" -m torch.distributed.run --nnodes="$nnodes" --nproc-per-node="$nproc" "${rendezvous[@]}" \
    --max-restarts="${MAX_RESTARTS:-$restarts}" --shutdown-timeout=600 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m dist_lora train "$@" &
torchrun=$!
for name in TERM INT HUP USR1; do
    # shellcheck disable=SC2064  # expanded now
    trap "kill -s $name $torchrun 2> /dev/null || true" "$name"
done

# A torchrun that has lost the node of HEAD may wait for it for a quarter of an hour, ignoring TERM, long after its
# ranks have ended. It gets as much time as a restart of the ranks would take.
end_when_stuck() {
    local had_ranks='' idle_s=0
    while sleep 1 && kill -0 "$torchrun" 2> /dev/null; do
        if [[ -n $(cat /proc/"$torchrun"/task/*/children 2> /dev/null) ]]; then
            had_ranks=1 idle_s=0
        elif [[ -n $had_ranks ]] && ((++idle_s > 2 * join_timeout)); then
            printf 'launch/torchrun.sh: torchrun has had no ranks for %s s and is ended\n' "$idle_s" >&2
            kill -s KILL "$torchrun"
        fi
    done
}
end_when_stuck &
watcher=$!
while kill -0 "$torchrun" 2> /dev/null; do wait "$torchrun" || true; done # a trap ends a wait early
code=0
wait "$torchrun" || code=$?
kill "$watcher" 2> /dev/null || true
((code)) || exit 0

# The status file in the run's folder has the exit code.
arguments=()
for argument; do [[ $argument == --* ]] || arguments+=("$argument"); done
status=0
"$python" -m dist_lora status "${arguments[@]}" --since "$started" >&2 || status=$?
if ((status == 1)) && [[ $nnodes != 1 ]]; then
    joined="not all of $nnodes nodes"
    [[ $nnodes != 2 ]] || joined="1 of 2 nodes"
    printf 'launch/torchrun.sh: if the error above is a RendezvousTimeoutError, %s joined at %s within %s s: %s\n' \
        "$joined" "$HEAD" "$join_timeout" "start it on each, with the same NNODES, HEAD, RUN_ID and CONFIG" >&2
fi
((status == 0)) || code=$status
exit "$code"
