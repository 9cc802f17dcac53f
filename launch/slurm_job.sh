#!/usr/bin/env bash
# What slurm.sh submits: runs in the repository's root on the job's first node, starts the tasks, queues the job again.
set -euo pipefail
# Slurm runs a copy of this file from elsewhere, so that its own place says nothing.
# shellcheck source=launch/shell.sh
source launch/shell.sh
program=launch/slurm_job.sh

usage="The batch script that launch/slurm.sh submits; not to be started by hand.

  --max-requeues N   so many times the job is queued again (100)
  --dry-run          print the command of the tasks
  -h, --help         this text"

max_requeues=100
parse_options "$@"
avlm=avlm
if [[ ! $dry_run && -x .venv/bin/avlm ]]; then avlm=.venv/bin/avlm; fi
reports=runs/slurm/${SLURM_JOB_ID:-JOB}

# Each task's own exit code is in its report: srun returns the highest alone, and when one task has ended with 2 the others
# have been killed (137). --cpus-per-task: srun does not take it over from sbatch.
tasks=(srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}
  bash launch/supervise.sh --max-restarts 0 --report "$reports" -- "$avlm" train "${train[@]}")
if [[ $dry_run ]]; then
  show "${tasks[@]}"
  exit 0
fi

rm -rf "$reports"
pass_on_signals # srun passes them on to the tasks.
exec "${tasks[@]}" & # exec: see supervise.sh.
child=$!
tell_if_stopped
wait_for_child

# One task that has given up for good decides.
if ((code)); then
  while read -r line; do
    [[ $line == ended\ * ]] || continue
    ended=${line#ended }
    ended=${ended%% *}
    if [[ $ended != 0 ]] && ! worth_a_restart "$ended"; then code=$ended; fi
  done < <(cat "$reports"/*.status 2> /dev/null || true)
fi

# 143 without a signal here is scancel, which is meant, or preemption, after which Slurm queues the job again by itself.
if worth_a_restart "$code" && [[ $code != 143 || $stopped ]]; then
  if ((${SLURM_RESTART_COUNT:-0} >= max_requeues)); then
    say "$program: exit code $code, and the job has been queued again ${SLURM_RESTART_COUNT:-0} times; giving up"
  else
    say "$program: exit code $code; queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
