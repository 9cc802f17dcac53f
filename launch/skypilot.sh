#!/usr/bin/env bash
# Trains in a SkyPilot managed job. Options as of SkyPilot 0.14.1 (`sky jobs launch --help`, docs.skypilot.co).
set -euo pipefail
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
# shellcheck source=launch/slices.sh
source "$(dirname "${BASH_SOURCE[0]}")/slices.sh"

usage="Train in a SkyPilot managed job (pip install 'skypilot[gcp]', then \`sky check\`), on a TPU slice or on machines with GPUs,
in whatever zone or cloud has them. The job itself is launch/skypilot.yaml.

  launch/skypilot.sh --name saven-2a --topology v6e:4x4 --bucket my-bucket \\
      -- --config configs/savenvideo.py:size=7b,stage=2a --workdir /mnt/avlm/runs/7b
  launch/skypilot.sh --name saven-2a --gpus H200:8 --num-nodes 2 --bucket my-bucket \\
      -- --config configs/savenvideo.py:size=7b,stage=2a --workdir /mnt/avlm/runs/7b

action, before the options:
  run      preflight (TPUs), launch the job and follow its log (the default); Ctrl-C leaves the job running
  logs     follow its log
  queue    what has become of all jobs
  cancel   end it; its machines are given back, and cost nothing from then on

options:
  --name NAME       of the job
  --topology NAME   a TPU slice, as \`avlm preflight\` takes it: v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4
  --gpus NAME:N     GPUs of each machine, as \`sky gpus list\` calls them, instead of a slice
  --num-nodes N     machines with GPUs (1)
  --bucket BUCKET   without gs://; mounted at /mnt/avlm
  --infra WHERE     cloud, cloud/region or cloud/region/zone (default: the cheapest that has it)
  --on-demand       no spot machines
  --secret NAME     of an environment variable to hand on, such as WANDB_API_KEY; its value is in no command
  --no-preflight    do not try whether the step fits before renting
  --dry-run         print the commands
  -h, --help        this text"

name="" topology="" gpus="" num_nodes=1 bucket="" infra="" on_demand="" secret="" no_preflight=""
parse_options "$@"
choose_action run logs queue cancel
require_number --num-nodes
bucket=${bucket#gs://}
cd "$root"

# SkyPilot sends usage data unless it is told not to (sky/usage/constants.py).
sky=(env SKYPILOT_DISABLE_USAGE_COLLECTION=1 sky jobs)

launch() {
  local accelerators extra=gpu
  require --name saven-2a --bucket my-bucket
  check_name
  [[ ! ($topology && $gpus) ]] || fail "--topology and --gpus exclude each other"
  if [[ $gpus ]]; then
    accelerators=$gpus
    require_training_on_bucket
  else
    require --topology v6e:4x4
    read_topology
    require_training_on_bucket
    ((num_nodes == 1)) || fail "--num-nodes goes with --gpus; a job has one TPU slice (for more: launch/xpk.sh)"
    extra=tpu
    case $generation in # docs.skypilot.co/en/latest/reference/tpu.html
      v5e) accelerators=tpu-v5litepod-$chips ;;
      v6e) accelerators=tpu-v6e-$chips ;;
      v4 | v5p) accelerators=tpu-$generation-$((2 * chips)) ;;
      *) fail "SkyPilot rents TPUs through the Cloud TPU API, which has no TPU7x; use launch/gce_instance_group.sh or" \
        "launch/xpk.sh" ;;
    esac
    preflight "$topology"
  fi
  local job=("${sky[@]}" launch --name "$name" --yes --gpus "$accelerators")
  ((num_nodes == 1)) || job+=(--num-nodes "$num_nodes")
  [[ ! $infra ]] || job+=(--infra "$infra")
  if [[ $on_demand ]]; then job+=(--no-use-spot); else job+=(--use-spot); fi
  job+=(--env "AVLM_NAME=$name" --env "AVLM_BUCKET=$bucket" --env "AVLM_EXTRA=$extra"
    --env "AVLM_TRAIN=$(quote_all "${train[@]}")")
  [[ ! $secret ]] || job+=(--secret "$secret")
  note "The job: the working tree as it is, ignored files left out."
  run "${job[@]}" launch/skypilot.yaml
}

case $action in
  run) launch ;;
  logs | cancel)
    require --name saven-2a
    if [[ $action == cancel ]]; then
      run "${sky[@]}" cancel --name "$name" --yes
    else
      run "${sky[@]}" logs --name "$name"
    fi
    ;;
  queue) run "${sky[@]}" queue ;;
esac
