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

supervised=(bash launch/supervise.sh --max-restarts "$max_restarts" --pause "$pause" --)
if ((processes == 1)); then
  supervised+=("${each[@]}" "${command[@]}")
  if [[ ! $dry_run ]]; then exec "${supervised[@]}"; fi
  show "${supervised[@]}"
  exit 0
fi

process() { # NUMBER: its command, in `one`
  one=("${each[@]}" AVLM_COORDINATOR="localhost:$port" AVLM_NUM_PROCESSES="$processes" AVLM_PROCESS_ID="$1"
    "${command[@]}")
}
supervised+=(bash launch/local_cpu.sh --devices "$devices" --processes "$processes" --port "$port" -- "${train[@]}")
if [[ $dry_run ]]; then
  show env AVLM_ONE_ATTEMPT=yes "${supervised[@]}"
  note "Each attempt, side by side:"
  for ((number = 0; number < processes; number++)); do
    process "$number"
    show "${one[@]}"
  done
  exit 0
fi
# Restarts are supervise.sh's, which runs this script once an attempt.
if [[ ! ${AVLM_ONE_ATTEMPT-} ]]; then
  exec env AVLM_ONE_ATTEMPT=yes "${supervised[@]}"
fi

children=() stopped=""
# shellcheck disable=SC2329 # By the traps.
end_all() { kill -s "$1" "${children[@]}" 2> /dev/null || true; }
trap 'stopped=yes && end_all TERM' TERM INT
for ((number = 0; number < processes; number++)); do
  process "$number"
  open_pipe
  (trap '' INT TERM && exec sed -u "s/^/[$number] /" <&"$listen" {listen}<&- {speak}>&-) &
  exec "${one[@]}" >&"$speak" 2>&1 {listen}<&- {speak}>&- & # exec: see supervise.sh.
  children+=($!)
  exec {listen}<&- {speak}>&-
done
if [[ $stopped ]]; then end_all TERM; fi # It may have come before all of them were there.
# The first failure is the cause, unless one of them has a reason not to be started again. The others end by themselves, as
# a rule, and say why; after a while they are told to, and `avlm train` needs up to 25 s to save.
code=0 left=("${children[@]}") failed="" due=(10:TERM 40:KILL) # Seconds after the first failure, and what is sent then.
while ((${#left[@]})); do
  # Not `wait -n`: it knows nothing of a process that had ended before it was called.
  ended="" now=0 remaining=()
  for child in "${left[@]}"; do
    if [[ $ended ]] || kill -0 "$child" 2> /dev/null; then remaining+=("$child"); else ended=$child; fi
  done
  if [[ $ended ]]; then
    wait "$ended" || now=$?
    left=(${remaining[@]+"${remaining[@]}"})
    if ((now)) && { ((code == 0)) || ! worth_a_restart "$now"; }; then code=$now; fi
    if ((now)); then failed=${failed:-$SECONDS}; fi
    continue
  fi
  if [[ $failed && ${#due[@]} -gt 0 ]] && ((SECONDS - failed >= ${due[0]%:*})); then
    end_all "${due[0]#*:}"
    due=("${due[@]:1}")
  fi
  sleep 0.2
done
exit "$code"
