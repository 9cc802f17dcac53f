#!/usr/bin/env bash
# Trains on GKE through xpk. Options as of xpk 1.16.0 (`xpk workload create --help`, github.com/AI-Hypercomputer/xpk).
set -euo pipefail
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
# shellcheck source=launch/slices.sh
source "$(dirname "${BASH_SOURCE[0]}")/slices.sh"

usage="Train on TPU slices of a GKE cluster through xpk (pip install xpk; also gcloud, kubectl, docker). GKE brings failed
machines back, and starts all pods of the run again when one ends. The cluster is made once: launch/README.md.

  launch/xpk.sh --name saven-2a --cluster my-cluster --zone us-central2-b --project my-project --topology v5e:16x16 \\
      --num-slices 2 --image us-docker.pkg.dev/my-project/avlm/avlm:1 --bucket my-bucket \\
      -- --config configs/savenvideo.py:size=7b,stage=2a --workdir /mnt/avlm/runs/7b

action, before the options:
  run       preflight, build and push the image, create the workload, wait for its end (the default)
  attach    make the bucket known to the cluster, once, before the first run
  image     build and push the image
  create    preflight, create the workload
  watch     wait for its end
  logs      follow the log of all pods
  delete    delete the workload; the cluster's machines go on costing money (unless it provisions them by need)

options:
  --name NAME        of the workload
  --cluster NAME     made by \`xpk cluster create\`
  --zone ZONE        of the cluster
  --project ID       of Google Cloud
  --topology NAME    of one slice, as \`avlm preflight\` takes it: v4:2x2x4, v5e:16x16, v5p:2x2x4, v6e:4x4, tpu7x:2x2x2
  --num-slices N     slices; the data axis of the mesh spans them (1)
  --image IMAGE      where the image is pushed to and pulled from
  --bucket BUCKET    without gs://; mounted at /mnt/avlm in every pod
  --max-restarts N   so many times all pods are started again (50)
  --telemetry        let xpk send usage data to Google (otherwise it is switched off in xpk's configuration)
  --no-preflight     do not try whether the step fits before renting
  --dry-run          print the commands
  -h, --help         this text

exit codes: 0 training has finished; 2 unusable arguments; 125 the workload failed; else the last command's"

name="" cluster="" zone="" project="" topology="" num_slices=1 image="" bucket="" max_restarts=50 telemetry="" no_preflight=""
parse_options "$@"
choose_action run attach image create watch logs delete
require --cluster my-cluster --zone us-central2-b --project my-project
require_number --num-slices --max-restarts
bucket=${bucket#gs://}
cd "$root"

in_cluster=(--cluster="$cluster" --zone="$zone" --project="$project")

# xpk sends usage data unless its configuration says otherwise (xpk/core/telemetry.py).
opt_out() {
  if [[ ! $telemetry ]]; then
    note "No usage data to Google."
    run xpk config set send-telemetry false
  fi
}

# A JobSet's size is no quota here: Cloud Storage FUSE asks for one and does not use it.
attach() {
  require --bucket my-bucket
  opt_out
  note "The bucket, for workloads that name it."
  # metadata-cache:ttl-secs:0: what one pod writes, the others must find at once (the parent stage's result).
  run xpk storage attach "$bucket" --type=gcsfuse --bucket="$bucket" --mount-point=/mnt/avlm --readonly=false \
    --auto-mount=false --size=1 --mount-options=implicit-dirs,metadata-cache:ttl-secs:0 --no-prefetch-metadata "${in_cluster[@]}"
}

image() {
  require --image us-docker.pkg.dev/my-project/avlm/avlm:1
  note "The image: what is committed, installed from the lock file."
  # shellcheck disable=SC2016 # Expanded by the shell that bash -c starts.
  run bash -o pipefail -c 'git archive HEAD | docker build --file launch/Dockerfile --build-arg EXTRA=tpu --tag "$1" -' build "$image"
  run docker push "$image"
}

create() {
  local command
  # exec: xpk passes SIGTERM to the shell that it wraps around the command, and to nothing below that.
  command="exec avlm train $(quote_all "${train[@]}")"
  [[ $command != *$'\n'* ]] || fail "an option of \`avlm train\` holds a line break, which xpk's manifest cannot carry"
  opt_out
  note "The workload: $num_slices slice(s) of $topology. All pods start again after 75; xpk's own list has 127 to 255."
  run xpk workload create --workload="$name" "${in_cluster[@]}" --tpu-type="$tpu" --num-slices="$num_slices" \
    --docker-image="$image" --storage="$bucket" --max-restarts="$max_restarts" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=60 --command="$command"
}

watch() {
  note "Wait for the end: 0 finished, 125 failed."
  run xpk workload list "${in_cluster[@]}" --wait-for-job-completion="$name"
}

read_workload() {
  require --name saven-2a --topology v5e:16x16 --image us-docker.pkg.dev/my-project/avlm/avlm:1 --bucket my-bucket
  check_name
  read_topology
  require_training_on_bucket
  # xpk/core/system_characteristics.py: names of generation and shape.
  tpu=${generation/v5e/v5litepod}-$shape
}

case $action in
  run)
    read_workload
    preflight "$topology" "$num_slices"
    image
    create
    watch
    ;;
  create)
    read_workload
    preflight "$topology" "$num_slices"
    create
    ;;
  attach | image)
    "$action"
    ;;
  watch)
    require --name saven-2a
    watch
    ;;
  logs)
    require --name saven-2a
    run kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$name" --follow --prefix --max-log-requests=256
    ;;
  delete)
    require --name saven-2a
    run xpk workload delete --workload="$name" "${in_cluster[@]}" --force
    ;;
esac
