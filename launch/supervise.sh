#!/usr/bin/env bash
# Runs a command and starts it again where that helps; every launcher that has one process on a machine uses it there.
set -euo pipefail
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

usage="Run a command, and start it again when it ends in a way that a new start mends.

  launch/supervise.sh [options] -- avlm train --config configs/savenvideo.py:size=7b --workdir runs/7b

Started again: exit code 75 (a stuck step, a lost process), 143 (SIGTERM from elsewhere), 134, 137, 142 and other signals.
Not started again: 0 (done), 1 (training failed), 2 (unusable configuration), 130 (Ctrl-C), 126 and 127 (no such command).
SIGTERM or Ctrl-C here becomes a SIGTERM to the command, which has time to save, and is the end. Exit code: the command's last.

  --max-restarts N     so many starts again without a long attempt between them (10); 0: never
  --long SECONDS       an attempt that lasts so long sets that count back to 0 (900)
  --pause SECONDS      before a start again, so that the other processes of the run have ended as well (15)
  --report DIR         keep DIR/<host>.status (running N, or: ended CODE) up to date, and write DIR/<host>.log, an attempt's
                       last lines, when the attempt has ended; <host>-<task> under Slurm
  --dry-run            print the command
  -h, --help           this text"

max_restarts=10 long=900 pause=15 report=""
parse_options "$@"
((${#words[@]} == 0)) || fail "the command stands behind --: $program -- ${words[*]}"
((${#train[@]})) || fail "say behind -- what to run: $program -- avlm train ..."
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max-restarts is ${max_restarts@Q}; it must be a whole number"
require_seconds --long --pause
if [[ $dry_run ]]; then
  show "${train[@]}"
  exit 0
fi

export PYTHONUNBUFFERED=1 # The log tells what is, not what was.
LOG_LINES=200 # Of the report: enough for a traceback of every process thread.
host=$(hostname)${SLURM_PROCID:+-$SLURM_PROCID}
place=$(mktemp -d)
log=$place/log
trap 'rm -rf "$place"' EXIT

# A report that cannot be written costs the report, not the run.
report_status() {
  [[ $report ]] || return 0
  { mkdir -p "$report" && printf '%s\n' "$*" > "$report/$host.status"; } ||
    say "$program: cannot write $report/$host.status"
}
report_log() {
  [[ $report ]] || return 0
  tail -n "$LOG_LINES" "$log" > "$report/$host.log" || say "$program: cannot write $report/$host.log"
}

pass_on_signals
attempt=0 short=0
while :; do
  attempt=$((attempt + 1)) begun=$SECONDS
  report_status "running $attempt"
  : > "$log"
  # tee ignores the signals, so that the command's last words are heard.
  open_pipe
  (trap '' INT TERM && exec tee -a "$log" <&"$listen" {listen}<&- {speak}>&-) &
  listener=$!
  # exec: because of the traps bash would keep a process of its own between, which the signal would end instead.
  exec "${train[@]}" >&"$speak" 2>&1 {listen}<&- {speak}>&- &
  child=$!
  exec {listen}<&- {speak}>&-
  tell_if_stopped
  wait_for_child
  # The last lines; but not what something that the command has left running may still say.
  for ((tenth = 0; tenth < 50; tenth++)); do
    kill -0 "$listener" 2> /dev/null || break
    sleep 0.1
  done
  if ((SECONDS - begun >= ${long%.*})); then short=0; else short=$((short + 1)); fi
  report_log
  if [[ $stopped ]] || ! worth_a_restart "$code"; then break; fi
  if ((short > max_restarts || max_restarts == 0)); then
    say "$program: exit code $code at attempt $attempt, of which the last $short took less than $long s each; giving up"
    break
  fi
  say "$program: exit code $code after $((SECONDS - begun)) s; starting again in $pause s (attempt $((attempt + 1)))"
  # In the background, because bash runs a trap only after what it waits for in the foreground.
  sleep "$pause" &
  child=$!
  tell_if_stopped
  wait_for_child
  if [[ $stopped ]]; then code=143; break; fi
done
report_status "ended $code after $attempt attempts"
exit "$code"
