#!/usr/bin/env bash
# Trains on Cloud TPU slices, v4 to v6e, through the Cloud TPU API's queued resources.
# docs.cloud.google.com/tpu/docs/queued-resources; flags as of `gcloud help compute tpus queued-resources create`.
set -euo pipefail
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
# shellcheck source=launch/slices.sh
source "$(dirname "${BASH_SOURCE[0]}")/slices.sh"

usage="Train on Cloud TPU slices (v4, v5e, v5p, v6e): ask for them, wait, install, train, bring them back when they are taken
away, and delete them when training has ended. Needs gcloud, a project with TPU quota, and a bucket: launch/README.md.

  launch/tpu_queued_resources.sh --name saven-2a --zone us-west4-a --topology v5e:16x16 --bucket my-bucket --spot \\
      -- --config configs/savenvideo.py:size=7b,stage=2a --workdir /mnt/avlm/runs/7b

action, before the options:
  run       all of it (the default). Ctrl-C leaves the slices training; \`watch\` takes it up again
  create    preflight, ask for the slices, wait until they are there
  start     install on every machine and start training (again)
  watch     wait for the end, bring taken slices back, delete them at the end
  logs      follow the log of the first machine
  stop      SIGTERM to the training on every machine; it saves a checkpoint
  delete    delete the slices; they cost money until then, whether they train or not

options:
  --name NAME              of the request, and the beginning of the machines' names
  --zone ZONE              where; docs.cloud.google.com/tpu/docs/regions-zones
  --project ID             of Google Cloud (default: gcloud's own setting)
  --topology NAME          of one slice, as \`avlm preflight\` takes it: v5e:4x4, v6e:2x4, v5p:2x2x4, v4:2x2x4
  --node-count N           slices; the data axis of the mesh spans them (1)
  --bucket BUCKET          without gs://; mounted at /mnt/avlm on every machine
  --spot                   cheaper, and taken away when somebody pays more
  --reserved               from the project's reservation
  --service-account EMAIL  what the machines may do (default: Compute Engine's own)
  --network NAME           (default)
  --subnetwork NAME        of that network
  --internal-ips           machines without public addresses (the network needs Cloud NAT for PyPI)
  --runtime-version NAME   the machines' image (by generation)
  --recreations N          so many times taken slices are asked for again (50)
  --poll SECONDS           between two looks at the slices (60)
  --keep                   do not delete the slices when training has ended
  --no-preflight           do not try whether the step fits before renting
  --dry-run                print the commands
  -h, --help               this text

exit codes: 0 training has finished; 1 it failed; 2 unusable arguments or configuration; else the last command's"

name="" zone="" project="" topology="" node_count=1 bucket="" spot="" reserved="" service_account=""
network="" subnetwork="" internal_ips="" runtime_version="" recreations=50 poll=60 keep="" no_preflight=""
parse_options "$@"
bucket=${bucket#gs://}
choose_action run create start watch logs stop delete
require --name saven-2a --zone us-west4-a
check_name
require_number --node-count --recreations
require_seconds --poll
cd "$root"

# Environments stay, so that a new start is quick.
UNPACK='sudo systemctl stop avlm-train 2> /dev/null; mkdir -p avlm_jax && find avlm_jax -mindepth 1 -maxdepth 1 ! -name .venv ! -name .cache -exec rm -rf {} + && tar -xzf avlm_jax.tar.gz'

cloud=(gcloud compute tpus)
where=(--zone="$zone" ${project:+--project="$project"})
if ((node_count == 1)); then
  nodes=("$name")
else # docs.cloud.google.com/tpu/docs/multislice-introduction: nodes are called <prefix>-<number>.
  nodes=()
  for ((index = 0; index < node_count; index++)); do nodes+=("$name-$index"); done
fi

read_request() {
  require --topology v5e:4x4 --bucket my-bucket
  read_topology
  [[ ! ($spot && $reserved) ]] || fail "--spot and --reserved exclude each other"
  # The Cloud TPU API gets bug and security fixes alone and has no TPU7x: docs.cloud.google.com/tpu/docs/jax-pods
  [[ $generation != tpu7x ]] || fail "the Cloud TPU API does not offer TPU7x; use launch/gce_instance_group.sh" \
    "(Compute Engine) or launch/xpk.sh (GKE)"
  # docs.cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX"
  case $generation in
    v4) image=tpu-ubuntu2204-base ;;
    v5e) image=v2-alpha-tpuv5-lite ;;
    v5p) image=v2-alpha-tpuv5 ;;
    v6e) image=v2-alpha-tpuv6e ;;
  esac
  image=${runtime_version:-$image}
  # v4 and v5p are named by TensorCores, two a chip: docs.cloud.google.com/tpu/docs/v5p
  case $generation in
    v5e) accelerator=v5litepod-$chips ;;
    v6e) accelerator=v6e-$chips ;;
    *)
      accelerator=$generation-$((2 * chips))
      check_default_shape
      ;;
  esac
}

# An accelerator type says how many chips, and the API picks the shape. docs.cloud.google.com/tpu/docs/v4, "default topology"
check_default_shape() {
  local expected
  case $chips in
    4) expected=2x2x1 ;;
    8) expected=2x2x2 ;;
    16) expected=2x2x4 ;;
    32) expected=2x4x4 ;;
    64) expected=4x4x4 ;;
    128) expected=4x4x8 ;;
    256) expected=4x8x8 ;;
    512) expected=8x8x8 ;;
    1024) expected=8x8x16 ;;
    2048) expected=8x16x16 ;;
    *) fail "--topology $topology: $chips chips are no slice that $accelerator names" ;;
  esac
  [[ $shape == "$expected" ]] || fail "--topology $topology: $accelerator is a slice of $expected; write $generation:$expected"
}

ask() {
  local request=("${cloud[@]}" queued-resources create "$name" "${where[@]}" --accelerator-type="$accelerator"
    --runtime-version="$image")
  if ((node_count == 1)); then
    request+=(--node-id="$name")
  else
    request+=(--node-count="$node_count" --node-prefix="$name")
  fi
  [[ ! $service_account ]] || request+=(--service-account="$service_account")
  [[ ! $network ]] || request+=(--network="$network")
  [[ ! $subnetwork ]] || request+=(--subnetwork="$subnetwork")
  [[ ! $internal_ips ]] || request+=(--internal-ips)
  [[ ! $spot ]] || request+=(--spot)
  [[ ! $reserved ]] || request+=(--reserved)
  note "Ask for $node_count slice(s) of $topology: ${chips} chips each, $accelerator."
  run "${request[@]}"
}

# The request's state; GONE if there is no such request, UNKNOWN if nobody could be asked: a broken connection must not look
# like a taken slice. REST: projects.locations.queuedResources, QueuedResourceState.
state() {
  local answer
  if answer=$("${cloud[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>&1); then
    printf '%s' "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    printf GONE
  else
    say "$program: $answer"
    printf UNKNOWN
  fi
}

is_taken() { [[ $1 == SUSPENDING || $1 == SUSPENDED || $1 == GONE || $1 == FAILED ]]; }

show_polls() { show "${cloud[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)'; }

# on_node NODE COMMAND...: on all machines of a slice at once. They need an ssh key that needs no typing: ssh-add.
on_node() {
  local node=$1
  shift
  run "${cloud[@]}" tpu-vm ssh "$node" "${where[@]}" --worker=all ${internal_ips:+--internal-ip} --quiet \
    --command="$(quote_all "$@")"
}

# Called where `set -e` does not hold (behind if and ||), hence each `|| return`.
start() {
  local node
  pack_code || return
  forget_reports
  for node in "${nodes[@]}"; do
    note "Install on every machine of $node."
    run "${cloud[@]}" tpu-vm scp "$archive" "$node:avlm_jax.tar.gz" "${where[@]}" --worker=all ${internal_ips:+--internal-ip} \
      --quiet || return
    on_node "$node" bash -c "$UNPACK" || return
    on_node "$node" bash avlm_jax/launch/on_worker.sh install --bucket "$bucket" --extra tpu || return
  done
  note "Start on all of them."
  for node in "${nodes[@]}"; do
    on_node "$node" bash avlm_jax/launch/on_worker.sh start --name "$name" --bucket "$bucket" -- "${train[@]}" || return
  done
}

delete() {
  note "Nothing costs money after this but the bucket."
  run "${cloud[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
}

case $action in
  run)
    read_request
    require_training_on_bucket
    preflight "$topology" "$node_count"
    trap say_what_goes_on INT
    run_all
    watch
    finish
    ;;
  create)
    read_request
    require_training_on_bucket
    preflight "$topology" "$node_count"
    ask
    wait_active
    ;;
  start)
    require --bucket my-bucket
    require_training_on_bucket
    start
    ;;
  watch)
    read_request # To ask again for what is taken.
    require_training_on_bucket
    trap say_what_goes_on INT
    watch
    finish
    ;;
  logs)
    run "${cloud[@]}" tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 ${internal_ips:+--internal-ip} \
      --command="bash avlm_jax/launch/on_worker.sh logs"
    ;;
  stop)
    for node in "${nodes[@]}"; do on_node "$node" bash avlm_jax/launch/on_worker.sh stop; done
    ;;
  delete)
    delete
    ;;
esac
