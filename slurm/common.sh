# What the batch scripts of trainings share; they source it from the repository's root.
#
# Variables that a submission may set (sbatch hands its environment to the job):
#   SACCADE_ROOT        repository (default: the folder that the job was submitted from)
#   SACCADE_ACCELERATE  file or name in configs/accelerate (default: nodes; one where the job has a single rank)
#   SACCADE_RANKS       ranks on each node (default: its GPUs, or 1)
#   SACCADE_RENDEZVOUS  host at which the ranks meet (default: the address of the job's first node)
#   SACCADE_PATIENCE    seconds between a launcher's failure and giving up a node that does not answer (default: 60)

if [ -f .venv/bin/activate ]; then
  source .venv/bin/activate
fi

complain() {
  echo "$SLURM_JOB_NAME $SLURM_JOB_ID: $*" >&2
}

# Address of the first host of the job. Slurm's own address of a node is what its nodes reach each other by, also where
# node names mean nothing to the resolver.
rendezvous_host() {
  local first address
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  echo "${address:-$first}"
}

# train PROGRAM OPTION...: the program on all nodes of the job. Leaves the script with the program's exit code, or asks
# Slurm to run the job again.
train() {
  local program=$1 folder status=0 host
  asked=''
  trap 'asked=yes' USR1
  shift
  # the program's own parser says where the run lies, and refuses bad options before a node is kept busy
  folder=$(python engine/requeue.py locate "$program" "$@") || exit
  host=${SACCADE_RENDEZVOUS:-$(rendezvous_host)}
  if ! getent ahosts "$host" >/dev/null; then
    complain "error: rendezvous host '$host' cannot be resolved: set SACCADE_RENDEZVOUS to a name or an address of" \
      "the job's first node that all of its nodes reach"
    exit 2
  fi
  export SACCADE_HOST=$host
  # jobs that share a first node, and a requeued job whose last ranks still hold their port, get ports of their own
  export SACCADE_PORT=$((15000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0}) % 15000))
  export SACCADE_RANKS=${SACCADE_RANKS:-${SLURM_GPUS_ON_NODE:-1}}
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  rm -f "$folder/exit.json"
  if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    rm -f "$folder/failures.jsonl" # whoever submits by hand wants another try
  fi
  run_step "$folder" "$program" "$@" || status=$?
  finish "$folder" "$status"
}

# run_step RUN_FOLDER PROGRAM OPTION...: one launcher on each node, with the signals that Slurm sends to this script passed
# on to all ranks.
run_step() {
  local failed=$1/launcher-failed step seconds=0 lost=0 status=0
  shift
  rm -f "$failed"
  SACCADE_FAILED=$failed srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --wait=0 \
    --kill-on-bad-exit=1 bash slurm/node.sh "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    # again and again: ranks that are still importing have no ears yet, and asking twice does no harm
    if [ -n "$asked" ] && [ $((seconds % 5)) = 0 ]; then
      kill -USR1 "$step" 2>/dev/null || true
    fi
    # srun waits for ever for the tasks of a node that has vanished
    if [ -e "$failed" ] && [ $((lost += 1)) -gt "${SACCADE_PATIENCE:-60}" ]; then
      complain "a launcher has failed and srun still waits for a node that does not answer: no longer"
      kill -KILL "$step" 2>/dev/null || true
    fi
    sleep 1
    seconds=$((seconds + 1))
  done
  wait "$step" || status=$?
  rm -f "$failed"
  return "$status"
}

# finish RUN_FOLDER STATUS: leave with the run's exit code, or requeue the job.
finish() {
  local code=0 id=$SLURM_JOB_ID
  python engine/requeue.py judge "$1" "$2" || code=$?
  if [ "$code" = 75 ]; then
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
      id=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    fi
    complain "requeue $id"
    scontrol requeue "$id" || complain "error: Slurm did not requeue: submit the same line again, the run goes on"
  fi
  exit "$code"
}
