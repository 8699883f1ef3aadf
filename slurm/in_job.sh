# shellcheck shell=bash disable=SC2154
# The part of common.sh that runs in a job: preflight, training, and what comes after an attempt.

run_job() {
    early= # a signal of before the training
    trap 'exit 143' TERM
    trap 'early=USR1 interrupted=1' USR1
    check "$SLURM_JOB_NUM_NODES"
    # Of a queued job each start is an attempt. In an interactive allocation each call is one, and a submission by itself.
    local number=${SLURM_RESTART_COUNT:-0} submission=$SLURM_JOB_ID
    if [[ $(scontrol show job -o "$SLURM_JOB_ID") != *" BatchFlag=1 "* ]]; then
        number=$(date +%s%3N)
        submission=$SLURM_JOB_ID.$number NEUCLIP_REQUEUE=0
    fi
    export NEUCLIP_SUBMISSION=${NEUCLIP_SUBMISSION:-$submission}
    attempt=$SLURM_JOB_ID.$number
    rendezvous "$number"
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
    trap leave TERM
    preflight
    start_training
    wait_for_training
    note_end "$status"
    case $decision in
        finished) exit 0 ;;
        again) again ;;
    esac
    exit $((status ? status : 1))
}

# As a job that Slurm ends before its training: no failure of the run.
leave() {
    note_term
    note_end 75
    exit 143
}

# At once: until Python has started for `job end`, Slurm may have killed this shell. A full disk, of which bash tells
# itself, must not end it before that.
note_term() { echo "$attempt" >"$run_dir/terminated" || true; }

# Slurm ends a job's steps, sets its state, and tells this shell, in an order of its own: a step may be over before TERM comes.
ended_by_slurm() {
    local said
    said=$(scontrol show job -o "$SLURM_JOB_ID") && [[ $said != *" JobState=RUNNING "* ]]
}

note_end() { # STATUS: what comes next is left in $decision; nothing where Slurm's TERM has ended the command too
    decision=$("${neuclip[@]}" job end "$run_dir" --job "$attempt" --status "$1" --tries "${NEUCLIP_TRIES:-3}") || decision=
}

# The ranks meet at the first node, at a port of this attempt, below those of outgoing connections.
rendezvous() { # NUMBER of the attempt
    local nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${nodes%%$'\n'*}
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 2 + $1) % 12000))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
    # srun does not take this one over from sbatch by itself.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    # NCCL's flight recorder: the last collectives of each rank, which a hang leaves beside the stacks.
    mkdir -p "$run_dir/stacks"
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
    TORCH_FR_DUMP_TEMP_FILE=$(cd "$run_dir/stacks" && pwd)/nccl_rank_
    export TORCH_FR_DUMP_TEMP_FILE
}

# Exits unless all nodes are fit; with NEUCLIP_EXCLUDE_BAD=1 the job goes back to the queue without those that are not.
preflight() {
    if [[ ${NEUCLIP_PREFLIGHT:-1} != 1 ]]; then return; fi
    local folder=$run_dir/preflight/$attempt floor=${NEUCLIP_FLOOR_GBPS:-0} seconds=${NEUCLIP_PREFLIGHT_SECONDS:-110}
    local names probing judge bad patience
    mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    mkdir -p "$folder"
    exec {answers}> >("${neuclip[@]}" preflight judge --nodes "${names[@]}" --ranks-per-node "$tasks" \
        --floor "$floor" --seconds "$seconds" --json "$folder/verdict.json" >"$folder/bad")
    judge=$!
    "${on_all[@]}" "${neuclip[@]}" preflight probe --folder "$folder/seen" --data "$data" --ranks-per-node "$tasks" \
        --floor "$floor" >&"$answers" 2>&1 &
    probing=$!
    exec {answers}>&-
    await "$judge"
    local verdict=$status
    # Ranks that have said all end by themselves, and get the time to: a step that is killed as it ends can leave Slurm
    # waiting for it, and then Slurm drains the node. Those that hang are killed.
    for ((patience = 75; patience > 0; patience--)); do
        kill -0 "$probing" 2>/dev/null || break
        sleep 0.2
    done
    if ((patience == 0)); then kill_steps; fi
    await "$probing"
    if ((verdict == 0)); then return; fi
    if ended_by_slurm; then leave; fi
    trap 'note_term; exit 143' TERM
    note_end 1
    bad=$(<"$folder/bad")
    if [[ ${NEUCLIP_EXCLUDE_BAD:-0} == 1 && -n $bad ]]; then exclude "$bad"; fi
    fail 1 "preflight: ${bad:-no node in particular, but the job} is not fit, as said above (NEUCLIP_EXCLUDE_BAD=1 requeues without bad nodes, \
NEUCLIP_PREFLIGHT=0 does not look)"
}

# The ranks' steps, not this shell's own. What Slurm refuses is said: then the ranks are waited for.
kill_steps() {
    local steps
    if ! steps=$(squeue -h -s -j "$SLURM_JOB_ID" -o %i | sed -n '/\.[0-9][0-9]*$/p'); then
        echo "preflight: squeue does not list the steps of ranks that hang; waiting for them" >&2
    elif [[ -n $steps ]]; then
        # shellcheck disable=SC2086
        scancel --signal=KILL $steps || echo "preflight: not killed, or just ended: step(s) ${steps//$'\n'/ }" >&2
    fi
}

# Nodes of a job can be changed only while it waits in the queue, but putting it there ends this shell: a child that
# Slurm's TERM does not end does both, in the time that Slurm gives a job to end (KillWait).
exclude() { # NODES
    local before
    before=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p')
    if [[ $before == '(null)' ]]; then before=; fi
    echo "preflight: back to the queue without $1"
    (
        trap '' TERM
        scontrol requeuehold "$SLURM_JOB_ID"
        until scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${before:+$before,}$1" 2>/dev/null; do sleep 0.5; done
        scontrol release "$SLURM_JOB_ID"
    ) &
    wait $! || true # TERM ends it; if the job may not be requeued, the child has said so and ended
}

await() { # PID: leaves its exit status in $status, however many signals come meanwhile
    while :; do
        interrupted=
        status=0
        wait "$1" || status=$?
        if [[ -z $interrupted ]]; then return; fi
    done
}

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
    trap 'interrupted=1; kill -USR1 "$training" 2>/dev/null || true' USR1
    local terminated=
    trap 'interrupted=1 terminated=1; note_term' TERM
    if [[ -n $early ]]; then kill -USR1 "$training"; fi
    await "$training"
    local training_status=$status
    exec {pipe}>&-
    await "$splitter"
    status=$training_status
    trap '' USR1
    trap 'note_term; exit 143' TERM
    # TERM came before the ranks could note it.
    if [[ $status == 143 ]] && { [[ -n $terminated ]] || ended_by_slurm; }; then
        note_term
        status=75
    fi
}

# Queue this job again, once all is saved: Slurm ends the shell at once. A job that is being cancelled stays so.
again() {
    trap - TERM
    if [[ ${NEUCLIP_REQUEUE:-1} == 1 ]] && ! ended_by_slurm; then
        scontrol requeue "$SLURM_JOB_ID" && sleep 60
    fi
    exit 75
}
