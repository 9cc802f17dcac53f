#!/usr/bin/env bash
# Trains on a TPU slice of Compute Engine: workload policy, instance template, managed instance group.
# docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice, docs.cloud.google.com/tpu/docs/spot-compute
set -euo pipefail
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
# shellcheck source=launch/slices.sh
source "$(dirname "${BASH_SOURCE[0]}")/slices.sh"

usage="Train on a TPU slice of Compute Engine (v5p, v6e, TPU7x) in a managed instance group: the way Google develops on, and the
only one of the two for TPU7x. The machines install themselves and start training at boot; nothing is done over ssh. One slice;
for several launch/xpk.sh. Needs gcloud, a project with TPU quota of Compute Engine, and a bucket: launch/README.md.

  launch/gce_instance_group.sh --name saven-2a --zone us-central1-c --topology tpu7x:2x2x2 --bucket my-bucket --spot \\
      -- --config configs/savenvideo.py:size=7b,stage=2a --workdir /mnt/avlm/runs/7b

action, before the options:
  run       all of it (the default). Ctrl-C leaves the slice training; \`watch\` takes it up again
  create    preflight, upload the code, ask for the slice
  watch     wait for the end, bring a taken slice back, delete it at the end
  logs      follow the log of one machine
  delete    delete group, template and policy; the machines cost money until then, whether they train or not

options:
  --name NAME              of the group, its template and its policy
  --zone ZONE              where; docs.cloud.google.com/tpu/docs/regions-zones
  --project ID             of Google Cloud
  --topology NAME          of the slice, as \`avlm preflight\` takes it: v5p:2x2x4, v6e:4x4, tpu7x:2x2x2
  --bucket BUCKET          without gs://; mounted at /mnt/avlm on every machine
  --spot                   cheaper, and taken away when somebody pays more
  --reservation NAME       from this reservation
  --service-account EMAIL  what the machines may do (default: Compute Engine's own)
  --network NAME           (default)
  --subnetwork NAME        of that network, as projects/P/regions/R/subnetworks/S
  --internal-ips           machines without public addresses (the network needs Cloud NAT for PyPI)
  --image-family NAME      of project ubuntu-os-accelerator-images (by generation)
  --disk-size SIZE         of each machine (200GB)
  --recreations N          so many times a taken slice is asked for again (50)
  --poll SECONDS           between two looks at the slice (60)
  --keep                   do not delete the slice when training has ended
  --no-preflight           do not try whether the step fits before renting
  --dry-run                print the commands
  -h, --help               this text

exit codes: 0 training has finished; 1 it failed; 2 unusable arguments or configuration; else the last command's"

name="" zone="" project="" topology="" bucket="" spot="" reservation="" service_account="" network="" subnetwork=""
internal_ips="" image_family="" disk_size=200GB recreations=50 poll=60 keep="" no_preflight=""
parse_options "$@"
choose_action run create watch logs delete
require --name saven-2a --zone us-central1-c --project my-project
check_name
require_number --recreations
require_seconds --poll
cd "$root"

region=${zone%-*}
cloud=(gcloud compute)
in_project=(--project="$project")
in_zone=(--zone="$zone" --project="$project")

read_request() {
  require --topology v6e:4x4 --bucket my-bucket
  bucket=${bucket#gs://}
  read_topology
  [[ ! ($spot && $reservation) ]] || fail "--spot and --reservation exclude each other"
  # Machine types: docs.cloud.google.com/compute/docs/tpus/tpu-machines. One machine makes a slice of up to 8 (v6e) or 4 chips.
  machines=$(((chips + 3) / 4))
  image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
  case $generation in
    v5p) machine=ct5p-hightpu-4t ;;
    v6e)
      machine=ct6e-standard-4t
      if ((chips == 1 || chips == 8)); then machine=ct6e-standard-${chips}t machines=1; fi
      ;;
    tpu7x)
      machine=tpu7x-standard-4t
      image=ubuntu-accel-2404-amd64-tpu-tpu7x
      ;;
    *) fail "--topology $topology: instance groups are there for v5p, v6e and TPU7x" \
      "(docs.cloud.google.com/tpu/docs/tpus-and-migs); use launch/tpu_queued_resources.sh" ;;
  esac
  image=${image_family:-$image}
}

startup=.cache/launch/$name.startup.sh

# The machines' startup script, run as root at every boot. Once installed, the enabled unit comes back by itself.
write_startup() {
  note "What each machine does at its first boot."
  write_file "$startup" << END
#!/bin/bash
set -euo pipefail
[[ ! -e /opt/avlm_jax/.cache/installed ]] || exit 0
failed() {
  echo 'ended 1 before training: the installation failed' | gcloud storage cp - "$(reports)/\$(hostname).status"
  journalctl --unit google-startup-scripts --lines 200 | gcloud storage cp - "$(reports)/\$(hostname).log"
}
trap failed ERR
export HOME=/root
cd /opt
gcloud storage cp $(quote "$code") avlm_jax.tar.gz
tar -xzf avlm_jax.tar.gz
bash avlm_jax/launch/on_worker.sh install --bucket $(quote "$bucket") --extra tpu
bash avlm_jax/launch/on_worker.sh start --name $(quote "$name") --bucket $(quote "$bucket") -- $(quote_all "${train[@]}")
touch avlm_jax/.cache/installed
END
}

ask() {
  code=$(reports).tar.gz
  pack_code || return
  run gcloud storage cp "$archive" "$code" "${in_project[@]}" || return
  forget_reports
  write_startup || return

  local template=("${cloud[@]}" instance-templates create "$name" "${in_project[@]}" --machine-type="$machine"
    --image-family="$image" --image-project=ubuntu-os-accelerator-images --boot-disk-size="$disk_size"
    --maintenance-policy=TERMINATE --scopes=cloud-platform --metadata-from-file=startup-script="$startup")
  if [[ $spot ]]; then
    template+=(--provisioning-model=SPOT --instance-termination-action=STOP)
  elif [[ $reservation ]]; then
    template+=(--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE
      --reservation-affinity=specific --reservation="$reservation")
  fi
  [[ ! $service_account ]] || template+=(--service-account="$service_account")
  [[ ! $network ]] || template+=(--network="$network")
  [[ ! $subnetwork ]] || template+=(--subnet="$subnetwork")
  [[ ! $internal_ips ]] || template+=(--no-address)
  note "What each of the $machines machine(s) is: $machine."
  run "${template[@]}" || return

  # do-nothing: a machine that is repaired alone does not fit into its slice again.
  local group=("${cloud[@]}" instance-groups managed create "$name" "${in_zone[@]}" --template="$name" --size="$machines"
    --default-action-on-vm-failure=do-nothing)
  if ((machines > 1)); then
    note "What makes one slice of them."
    run "${cloud[@]}" resource-policies create workload-policy "$name" "${in_project[@]}" --region="$region" \
      --type=HIGH_THROUGHPUT --accelerator-topology="$shape" || forget_parts || return
    # All or none: a group with an accelerator topology is refused in any other mode.
    group+=(--workload-policy="projects/$project/regions/$region/resourcePolicies/$name" --target-size-policy-mode=bulk)
  fi
  note "Ask for the slice: $topology, $chips chips."
  run "${group[@]}" || forget_parts
}

# What a group is made of, and would stand in the way of the next attempt. Returns what went before; its own failures do not
# count, for nothing of it costs money.
forget_parts() {
  local code=$?
  run "${cloud[@]}" instance-templates delete "$name" "${in_project[@]}" --quiet || true
  if ((${machines:-2} > 1)); then
    run "${cloud[@]}" resource-policies delete "$name" "${in_project[@]}" --region="$region" --quiet || true
  fi
  return "$code"
}

list_instances() {
  "$@" "${cloud[@]}" instance-groups managed list-instances "$name" "${in_zone[@]}" --format="value($fields)"
}

state() {
  local answer fields=instanceStatus
  if answer=$(list_instances 2>&1); then
    case $answer in
      *STOP* | *TERMINATED* | *SUSPEND*) printf TAKEN ;;
      *) if [[ $(grep -cx RUNNING <<< "$answer") == "$machines" ]]; then printf ACTIVE; else printf WAITING; fi ;;
    esac
  elif [[ $answer == *"was not found"* ]]; then
    printf GONE
  else
    say "$program: $answer"
    printf UNKNOWN
  fi
}

is_taken() { [[ $1 == TAKEN || $1 == GONE ]]; }

show_polls() {
  local fields=instanceStatus
  list_instances show
}

start() { note "The machines install themselves and start training."; }

# The group first: it holds on to the other two.
delete() {
  note "Nothing costs money after this but the bucket."
  if ! run "${cloud[@]}" instance-groups managed delete "$name" "${in_zone[@]}" --quiet && [[ $(state) != GONE ]]; then
    return 1
  fi
  forget_parts || true
}

case $action in
  run)
    read_request
    require_training_on_bucket
    preflight "$topology"
    trap say_what_goes_on INT
    run_all
    watch
    finish
    ;;
  create)
    read_request
    require_training_on_bucket
    preflight "$topology"
    ask
    ;;
  watch)
    read_request # To ask again for what is taken.
    require_training_on_bucket
    trap say_what_goes_on INT
    watch
    finish
    ;;
  logs)
    if [[ $dry_run ]]; then
      instance=INSTANCE
    else
      # shellcheck disable=SC2034 # For list_instances.
      fields="instance.basename()"
      instance=$(list_instances | head -n 1)
    fi
    run "${cloud[@]}" ssh "$instance" "${in_zone[@]}" ${internal_ips:+--internal-ip} \
      --command="sudo bash /opt/avlm_jax/launch/on_worker.sh logs"
    ;;
  delete)
    delete
    ;;
esac
