#!/usr/bin/env bash
# Trains on virtual CPU devices: what a slice does, at home. In one process, or in several that form a cluster.
set -euo pipefail
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

usage="Train on virtual CPU devices of this machine, to see sharding, several processes and restarts at work without a slice.

  launch/local_cpu.sh -- --config configs/savenvideo.py:size=demo --workdir runs/mine --config.mesh.fsdp=2
  launch/local_cpu.sh --processes 2 -- --config configs/savenvideo.py:size=demo --workdir runs/mine

Several processes talk through gloo. When one of them ends they all do, and are started again where that helps, as by the
other launchers (launch/supervise.sh --help). Their output is preceded by their number.

options:
  --devices N        virtual devices in all processes together (8)
  --processes N      (1)
  --port N           of this machine, for the processes to meet at (8476)
  --max-restarts N   so many starts again in a row (10); 0: never
  --pause SECONDS    before each (15)
  --dry-run          print the commands
  -h, --help         this text

exit codes: those of \`avlm train\`; of several processes, of the one that is the cause"

devices=8 processes=1 port=8476 max_restarts=10 pause=15
parse_options "$@"
((${#words[@]} == 0)) || fail "unexpected ${words[*]}; options of \`avlm train\` stand behind --"
require_number --devices --processes --port
((devices % processes == 0)) || fail "--devices $devices cannot be shared out among $processes processes"
require_training runs/mine
cd "$root"

# Without the files of the accelerators' plugins JAX would look for their devices.
each=(env JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$((devices / processes))")
avlm=avlm
if [[ ! $dry_run && -x .venv/bin/avlm ]]; then avlm=.venv/bin/avlm; fi
command=("$avlm" train "${train[@]}")

if ((processes == 1)); then
  if [[ $dry_run ]]; then
    show "${each[@]}" "${command[@]}"
    exit 0
  fi
  exec bash launch/supervise.sh --max-restarts "$max_restarts" --pause "$pause" -- "${each[@]}" "${command[@]}"
fi

process() { # NUMBER: its command, in `one`
  one=("${each[@]}" AVLM_COORDINATOR="localhost:$port" AVLM_NUM_PROCESSES="$processes" AVLM_PROCESS_ID="$1"
    "${command[@]}")
}
if [[ $dry_run ]]; then
  note "Side by side:"
  for ((number = 0; number < processes; number++)); do
    process "$number"
    show "${one[@]}"
  done
  exit 0
fi
# Restarts are supervise.sh's, which runs this script once an attempt.
if [[ ! ${AVLM_ONE_ATTEMPT-} ]]; then
  export AVLM_ONE_ATTEMPT=yes
  exec bash launch/supervise.sh --max-restarts "$max_restarts" --pause "$pause" -- \
    bash launch/local_cpu.sh --devices "$devices" --processes "$processes" --port "$port" -- "${train[@]}"
fi

children=()
pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
# shellcheck disable=SC2329 # By the traps.
end_all() { kill -s "$1" "${children[@]}" 2> /dev/null || true; }
trap 'end_all TERM' TERM INT
for ((number = 0; number < processes; number++)); do
  process "$number"
  mkfifo "$pipes/$number"
  (trap '' INT TERM && exec sed -u "s/^/[$number] /" < "$pipes/$number") &
  exec "${one[@]}" > "$pipes/$number" 2>&1 & # exec: see supervise.sh.
  children+=($!)
done
# The first failure is the cause, unless one of them has a reason not to be started again. The others end by themselves, as
# a rule, and say why; after a while they are told to, and `avlm train` needs up to 25 s to save.
code=0 left=("${children[@]}") killer=""
while ((${#left[@]})); do
  ended="" now=0
  wait -n -p ended "${left[@]}" || now=$?
  [[ ${ended-} ]] || continue # A signal with a trap ends `wait` early.
  remaining=()
  for child in "${left[@]}"; do
    if [[ $child != "$ended" ]]; then remaining+=("$child"); fi
  done
  left=(${remaining[@]+"${remaining[@]}"})
  if ((now)) && { ((code == 0)) || ! worth_a_restart "$now"; }; then code=$now; fi
  if ((now)) && [[ ! $killer ]]; then
    { sleep 10 && end_all TERM && sleep 30 && end_all KILL; } > /dev/null 2>&1 &
    killer=$!
  fi
done
if [[ $killer ]]; then kill "$killer" 2> /dev/null || true; fi
exit "$code"
