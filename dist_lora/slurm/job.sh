if [[ -z ${SLURM_JOB_ID-} || -z ${SLURM_JOB_NODELIST-} ]]; then
    echo "error: SLURM_JOB_ID and SLURM_JOB_NODELIST are not set: this is a script for sbatch" >&2
    exit 2
fi
# However this attempt ends, the status file in the run's folder says how: CODE AGAIN STEP STALLED ATTEMPT REASON.
# The exit code alone isn't enough: torchrun turns every failure into 1.
attempt="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
job=$SLURM_JOB_ID # of an array: only this task, since its last task has the ID of the whole array
[[ -z ${SLURM_ARRAY_JOB_ID-} ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"

say() { printf '== %s %s\n' "$(date '+%F %T')" "$*"; }
say "start ${SLURM_RESTART_COUNT:-0} of job $job: $config on $SLURM_JOB_NODELIST"

# Slurm sends the signal of --signal to the ranks or, on some clusters, only to this shell, which forwards it. TERM means
# that the job was cancelled, preempted or is out of time: whether it is requeued is then up to Slurm.
is_ending=
trap 'say "USR1: asking the ranks to save and stop"; scancel --signal=USR1 "$job"' USR1
trap 'say "TERM: Slurm is ending this job"; is_ending=1' TERM

@START@
srun_pid=$!
while kill -0 "$srun_pid" 2> /dev/null; do wait "$srun_pid"; done # a trap interrupts wait
wait "$srun_pid"
srun_code=$?

give_up() {
    [[ $code != running ]] || code=1 # killed without a status
    exit "$code"
}

code=none again=final step=0 stalled=0 marked='' reason=''
[[ ! -e $run_dir/status ]] || read -r code again step stalled marked reason < "$run_dir/status"
if [[ $marked != "$attempt" && $srun_code == 138 ]]; then # USR1 arrived before the ranks had a handler
    restarts=${SLURM_RESTART_COUNT:-0} # since the last start of this job that wrote a status, if one did
    [[ ${marked%.*} != "$SLURM_JOB_ID" ]] || restarts=$((stalled + restarts - ${marked##*.}))
    code=75 again=again stalled=$restarts reason='signalled before it had a signal handler'
elif [[ $marked != "$attempt" ]]; then # it ended before it opened its folder: a mistake, or a failed import
    say "srun ended with exit code $srun_code, and the run wrote no status for this attempt"
    exit "$srun_code"
fi
say "exit code $code (srun's: $srun_code), step $step is saved: $reason"
[[ $again == again && -z $is_ending && $srun_code != [234] ]] || give_up
if ((stalled >= max_stalled)); then
    say "not requeued: $stalled starts in a row have saved no newer step"
    give_up
fi
say "requeueing"
if scontrol requeue "$job"; then
    sleep 300 # Slurm ends this shell long before
fi
say "Slurm didn't requeue the job; the same command resumes from step $step"
give_up
