#!/bin/bash
# What srun starts on each node of a training: one `accelerate launch`, which starts the node's ranks.
#
# Not one srun task per rank: the accelerate config stays the one place that says DDP or ZeRO, here as on a workstation.
# The price is that the launcher turns every exit code into 1; the run's own is read from its folder afterwards.
set -euo pipefail
# Slurm signals every process of a step. The ranks answer, by saving; a launcher that answered too would end them while
# they save (SIGUSR1 would end it, and its own SIGTERM would be the ranks' second one). Ignored here, inherited by all.
trap '' USR1 TERM INT
export PET_SIGNALS_TO_HANDLE=SIGHUP
ranks=$((SLURM_NNODES * SACCADE_RANKS))
config=${SACCADE_ACCELERATE:-$([ "$ranks" = 1 ] && echo one || echo nodes)}
if [ ! -f "$config" ]; then
  config=configs/accelerate/$config.yaml
fi
if ! getent ahosts "$SACCADE_HOST" >/dev/null; then
  echo "error: $(hostname) (node $SLURM_NODEID of the job) cannot resolve the rendezvous host '$SACCADE_HOST':" \
    "set SACCADE_RENDEZVOUS to a name or an address that all nodes reach" >&2
  exit 2
fi
threads=$((${SLURM_CPUS_PER_TASK:-1} / SACCADE_RANKS))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
accelerate launch --config_file "$config" --num_processes "$ranks" --num_machines "$SLURM_NNODES" \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$SACCADE_HOST" --main_process_port "$SACCADE_PORT" "$@" || {
  status=$?
  mkdir -p "$(dirname "$SACCADE_FAILED")"
  touch "$SACCADE_FAILED"
  exit "$status"
}
