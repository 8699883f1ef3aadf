# The part of common.sh that runs in a job: preflight, training, and what comes after an attempt.

run_job() {
    early= # a signal of before the training
    trap 'exit 143' TERM
    trap 'early=USR1' USR1
    check "$SLURM_JOB_NUM_NODES"
    export NEUCLIP_SUBMISSION=${NEUCLIP_SUBMISSION:-$SLURM_JOB_ID}
    attempt=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    rendezvous
    # Over all ranks.
    on_all=(srun "--ntasks=$world_size" "--ntasks-per-node=$tasks" --label --kill-on-bad-exit=0)
    on_all+=(${NEUCLIP_SRUN_OPTIONS[@]+"${NEUCLIP_SRUN_OPTIONS[@]}"})
    logs=$run_dir/logs
    local decision
    decision=$("${neuclip[@]}" job begin "$run_dir" --submission "$NEUCLIP_SUBMISSION" --job "$attempt" \
        --tries "${NEUCLIP_TRIES:-3}")
    case $decision in
        finished) exit 0 ;;
        stop) exit 1 ;;
    esac
    preflight
    start_training
    wait_for_training
    decision=$("${neuclip[@]}" job end "$run_dir" --status "$status" --tries "${NEUCLIP_TRIES:-3}")
    case $decision in
        finished) exit 0 ;;
        again) again ;;
    esac
    exit $((status ? status : 1))
}

# The ranks meet at the first node, at a port of this job, below those of outgoing connections.
rendezvous() {
    local nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${nodes%%$'\n'*}
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 2 + ${SLURM_RESTART_COUNT:-0}) % 12000))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
    # srun does not take this one over from sbatch by itself.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    # NCCL's flight recorder: the last collectives of each rank, which a hang leaves beside the stacks.
    mkdir -p "$run_dir/stacks"
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
    TORCH_FR_DUMP_TEMP_FILE=$(cd "$run_dir/stacks" && pwd)/nccl_rank_
    export TORCH_FR_DUMP_TEMP_FILE
}

preflight() { :; }

# A rank that dies leaves the others waiting for it: they are ended half a minute later, not at once, for at a stop the
# ranks leave one after the other.
start_training() {
    exec {pipe}> >("${neuclip[@]}" job logs "$logs" --header "=== attempt $attempt, $SLURM_JOB_NODELIST")
    splitter=$!
    # No function: $! must be srun itself, which passes USR1 on to the ranks.
    "${on_all[@]}" "--wait=${NEUCLIP_RANK_WAIT:-30}" "${neuclip[@]}" train "${arguments[@]}" >&"$pipe" 2>&1 &
    training=$!
}

# Slurm sends USR1 to this shell alone, some time before the limit, and TERM to the ranks as well.
wait_for_training() {
    local signal=none
    trap 'signal=USR1; kill -USR1 "$training" 2>/dev/null || true' USR1
    trap 'signal=TERM' TERM
    if [[ -n $early ]]; then kill -USR1 "$training"; fi
    until [[ -z $signal ]]; do # a signal ends `wait` early
        signal=
        status=0
        wait "$training" || status=$?
    done
    exec {pipe}>&-
    wait "$splitter" || true
    trap - USR1 TERM
}

# Queue this job again, once all is saved: Slurm ends the shell at once. A job that is being cancelled stays so.
again() {
    if [[ ${NEUCLIP_REQUEUE:-1} == 1 ]] && scontrol show job -o "$SLURM_JOB_ID" | grep -q ' JobState=RUNNING '; then
        scontrol requeue "$SLURM_JOB_ID" && sleep 60
    fi
    exit 75
}
