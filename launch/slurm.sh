#!/usr/bin/env bash
# Submits training to Slurm. Options as of sbatch(1); `jax.distributed` reads the rest from what srun sets.
set -euo pipefail
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

usage="Train on a Slurm cluster's GPUs: one task a GPU, as JAX expects under Slurm. The checkout and its .venv (\`make install\`, then
.venv/bin/pip install -e '.[gpu]') lie on a file system that all nodes see.

  launch/slurm.sh --name saven-2a --nodes 2 --gpus-per-node 8 --time 1-00:00:00 --partition gpu \\
      -- --config configs/savenvideo.py:size=7b,stage=2a --workdir /shared/runs/7b

The job is queued again, under the same number, after an exit code that a new start mends, after preemption, after a node's
failure, and at its time limit: a minute before it SIGTERM lets training save. Logs go to runs/slurm/<name>-<job>.log.

GPUs add up in another order at each run. To have a stopped run end to the bit as it would have ended, set
XLA_FLAGS=--xla_gpu_deterministic_ops=true before this command, which hands the environment on; it costs speed.

options:
  --name NAME           of the job
  --nodes N             (1)
  --gpus-per-node N     all of a node's GPUs, as a rule (8)
  --cpus-per-task N     CPU cores for each GPU; its loader runs there (8)
  --memory SIZE         of each node (default: the partition's)
  --time LIMIT          after which the job is queued again, such as 1-00:00:00
  --partition NAME      (default: the cluster's)
  --account NAME        to charge
  --qos NAME            quality of service
  --max-requeues N      so many times it is queued again (100)
  --dry-run             print the commands
  -h, --help            this text

\`scancel JOB\` ends it; submitting the same again goes on from its checkpoint. No preflight: that is for TPU slices."

name="" nodes=1 gpus_per_node=8 cpus_per_task=8 memory="" time="" partition="" account="" qos="" max_requeues=100
parse_options "$@"
((${#words[@]} == 0)) || fail "unexpected ${words[*]}; options of \`avlm train\` stand behind --"
require --name saven-2a --time 1-00:00:00
require_number --nodes --gpus-per-node --cpus-per-task --max-requeues
require_training /shared/runs/7b
cd "$root"

# One task a GPU: JAX gives a task that Slurm started the device of its SLURM_LOCALID. All GPUs stay visible to all tasks of a
# node; --gpus-per-task would show each its own as number 0.
job=(sbatch --job-name="$name" --nodes="$nodes" --gpus-per-node="$gpus_per_node" --ntasks-per-node="$gpus_per_node"
  --cpus-per-task="$cpus_per_task" --time="$time")
[[ ! $memory ]] || job+=(--mem="$memory")
[[ ! $partition ]] || job+=(--partition="$partition")
[[ ! $account ]] || job+=(--account="$account")
[[ ! $qos ]] || job+=(--qos="$qos")
# B: slurm_job.sh gets the signal; it tells the tasks, and queues the job again.
job+=(--requeue --open-mode=append --signal=B:TERM@60 --output=runs/slurm/%x-%j.log)

note "Submit; the job then runs the srun below on its nodes."
run mkdir -p runs/slurm
run "${job[@]}" launch/slurm_job.sh --max-requeues "$max_requeues" -- "${train[@]}"
if [[ $dry_run ]]; then
  note "In the job:"
  SLURM_JOB_ID='' SLURM_CPUS_PER_TASK=$cpus_per_task bash launch/slurm_job.sh --dry-run -- "${train[@]}"
fi
