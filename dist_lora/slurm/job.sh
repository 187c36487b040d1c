if [[ -z ${SLURM_JOB_ID-} || -z ${SLURM_JOB_NODELIST-} ]]; then
    echo "error: SLURM_JOB_ID and SLURM_JOB_NODELIST are not set: this is a script for sbatch" >&2
    exit 2
fi
# Whatever ends this start of the job, the run's folder says how: CODE AGAIN STEP STALLED ATTEMPT REASON. An exit code
# alone doesn't: torchrun makes 1 of each.
attempt="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
job=$SLURM_JOB_ID # of an array: this task alone, since its last task has the number of the whole
[[ -z ${SLURM_ARRAY_JOB_ID-} ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"

say() { printf '== %s %s\n' "$(date '+%F %T')" "$*"; }
say "start ${SLURM_RESTART_COUNT:-0} of job $job: $config on $SLURM_JOB_NODELIST"

# A cluster sends the signal of --signal to the ranks or, where it is configured so, to this shell alone, which passes it
# on. TERM comes when the job is cancelled, preempted or out of time: what comes after that is Slurm's to decide.
is_ending=
trap 'say "USR1: the ranks are asked to save and stop"; scancel --signal=USR1 "$job"' USR1
trap 'say "TERM: Slurm ends this job"; is_ending=1' TERM

@START@
srun_pid=$!
while kill -0 "$srun_pid" 2> /dev/null; do wait "$srun_pid"; done # a trap ends a wait early
wait "$srun_pid"
srun_code=$?

give_up() {
    [[ $code != running ]] || code=1 # killed, without a word
    exit "$code"
}

code=none again=final step=0 stalled=0 marked='' reason=''
[[ ! -e $run_dir/status ]] || read -r code again step stalled marked reason < "$run_dir/status"
if [[ $marked != "$attempt" && $srun_code == 138 ]]; then # USR1 came in the ranks' first moments
    code=75 again=again stalled=${SLURM_RESTART_COUNT:-0} reason='asked to stop before it could listen'
elif [[ $marked != "$attempt" ]]; then # it ended before it came to its folder: a mistake, or an import that failed
    say "srun ended with exit code $srun_code and the run wrote no status for this attempt"
    exit "$srun_code"
fi
say "exit code $code (srun's: $srun_code), step $step is saved: $reason"
[[ $again == again && -z $is_ending && $srun_code != [234] ]] || give_up
if ((stalled >= max_stalled)); then
    say "not started again: $stalled starts in a row have saved no newer step"
    give_up
fi
say "to be started again"
if scontrol requeue "$job"; then
    sleep 300 # Slurm ends this shell long before
fi
say "Slurm did not start it again; the same command goes on from step $step"
give_up
