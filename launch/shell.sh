# shellcheck shell=bash disable=SC2154 # Options are set by the script that asks for them.
# What the launch scripts share: options, running or only printing a command, the preflight, restarts, the worker's paths.
#
# A script sets $usage, its help text, and calls `parse_options "$@"`. The options it takes are those its help lists: a line
# "  --name VALUE   ..." declares one with a value, "  --name   ..." a switch. The value of --node-count goes to $node_count,
# a switch is `yes`; defaults are set before the call. Words before the options go to `words`, all behind -- to `train`.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "this needs bash 5.1 or newer (as in Ubuntu 22.04); this one is $BASH_VERSION" >&2
  exit 2
fi

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$launch")
program="launch/$(basename "$0")"

usage=""
words=()
train=()
dry_run=""

# --- speaking --------------------------------------------------------------------------------------------------------

say() { printf '%s\n' "$*" >&2; }

# Exit code 2, as of `avlm`: unusable arguments.
fail() {
  say "$program: $*"
  exit 2
}

# A remark between printed commands, so that the output of --dry-run is a script one can read and run by hand.
note() { if [[ $dry_run ]]; then printf '\n# %s\n' "$*"; else say "# $*"; fi; }

# A word as one can paste it into a shell: plain where nothing in it needs quotes.
quote() {
  if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+~^-]+$ && $1 != '~'* ]]; then printf '%s' "$1"; else printf '%s' "${1@Q}"; fi
}

# A command as one can paste it, in one line.
quote_all() {
  local word separator=""
  for word in "$@"; do
    printf '%s' "$separator"
    quote "$word"
    separator=" "
  done
}

# The same, broken where it grows long.
show() {
  local line="" word
  for word in "$@"; do
    word=$(quote "$word")
    if [[ $line ]] && ((${#line} + ${#word} > 105)); then
      printf '%s \\\n' "$line"
      line="    $word"
    else
      line+="${line:+ }$word"
    fi
  done
  printf '%s\n' "$line"
}

# Prints a command, and runs it unless --dry-run was given. The exit code is the command's.
run() {
  if [[ $dry_run ]]; then
    show "$@"
  else
    show "$@" >&2
    "$@"
  fi
}

# The text on stdin becomes a file; with --dry-run it is printed as the command that would write it.
write_file() {
  if [[ $dry_run ]]; then
    printf "cat > %s <<'END'\n" "$(quote "$1")"
    cat
    printf 'END\n'
  else
    cat > "$1"
  fi
}

# --- options ---------------------------------------------------------------------------------------------------------

# "--name VALUE" or "--name", one a line, as the help text declares them.
declared_options() {
  sed -nE 's/^  (-h, )?(--[a-z][a-z-]*)( [A-Z][A-Z0-9_:./x-]*)?(  .*)?$/\2\3/p' <<< "$usage"
}

parse_options() {
  local -A _takes_value=()
  local _line _option _value # Not the name of any option: --name sets $name.
  while read -r _line; do
    _takes_value[${_line%% *}]=$([[ $_line == *' '* ]] && echo yes || true)
  done < <(declared_options)
  while (($#)); do
    case $1 in
      --)
        shift
        train=("$@")
        break
        ;;
      -h | --help)
        printf '%s\n' "$usage"
        exit 0
        ;;
      -*)
        _option=${1%%=*}
        [[ ${_takes_value[$_option]+known} ]] || unknown_option "$_option" "${!_takes_value[@]}"
        if [[ ! ${_takes_value[$_option]} ]]; then
          [[ $1 != *=* ]] || fail "$_option takes no value"
          _value=yes
        elif [[ $1 == *=* ]]; then
          _value=${1#*=}
        else
          (($# > 1)) || fail "$_option needs a value ($program --help)"
          _value=$2
          shift
        fi
        _option=${_option#--}
        printf -v "${_option//-/_}" '%s' "$_value"
        shift
        ;;
      *)
        words+=("$1")
        shift
        ;;
    esac
  done
}

unknown_option() {
  local name=$1 near
  shift
  if [[ $name == --config* || $name == --workdir ]]; then
    fail "$name is an option of \`avlm train\`; those stand behind --, as in: $program ... -- $name ..."
  fi
  near=$(nearest "$name" "$@")
  if [[ $near ]]; then
    fail "unknown option $name; did you mean $near?"
  fi
  fail "unknown option $name; there are: $(printf '%s\n' "$@" | LC_ALL=C sort | paste -sd ' ')"
}

# The word of the rest that the first one takes the fewest changes to become; none if that is more than a third of it.
nearest() {
  printf '%s\n' "${@:2}" | LC_ALL=C sort | awk -v word="$1" '
    function smaller(a, b) { return a < b ? a : b }
    function distance(a, b,    i, j, row, before, corner) {
      for (j = 0; j <= length(b); j++) row[j] = j
      for (i = 1; i <= length(a); i++) {
        corner = row[0]; row[0] = i
        for (j = 1; j <= length(b); j++) {
          before = row[j]
          row[j] = smaller(smaller(row[j], row[j - 1]) + 1, corner + (substr(a, i, 1) != substr(b, j, 1)))
          corner = before
        }
      }
      return row[length(b)]
    }
    { d = distance(word, $0); if (best == "" || d < least) { best = $0; least = d } }
    END { if (best != "" && least * 3 <= length(word)) print best }'
}

# require --zone us-west4-a --name my-run: each option must have a value; what stands behind it is the example of the error.
require() {
  local variable missing="" example=""
  while (($#)); do
    variable=${1#--}
    variable=${variable//-/_}
    if [[ ! ${!variable-} ]]; then
      missing+="${missing:+, }$1"
      example+=" $1 $2"
    fi
    shift 2
  done
  [[ ! $missing ]] || fail "$missing must be given, for example:$example ($program --help explains them)"
}

# require_number --node-count ...: whole numbers, 1 or more.
require_number() {
  local option variable
  for option in "$@"; do
    variable=${option#--}
    variable=${variable//-/_}
    [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || fail "$option is ${!variable@Q}; it must be a whole number from 1 on"
  done
}

# require_seconds --poll ...: fractions are allowed.
require_seconds() {
  local option variable
  for option in "$@"; do
    variable=${option#--}
    variable=${variable//-/_}
    [[ ${!variable} =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "$option is ${!variable@Q}; it must be a number of seconds"
  done
}

# The first of `words` if it is one of the arguments, the first of which is the default.
choose_action() {
  ((${#words[@]} <= 1)) || fail "one action at a time, not: ${words[*]}; options of \`avlm train\` stand behind --"
  action=${words[0]-$1}
  local known near
  for known in "$@"; do
    [[ $action != "$known" ]] || return 0
  done
  near=$(nearest "$action" "$@")
  fail "unknown action ${action@Q}; ${near:+did you mean $near? }there are: $*"
}

# Names become those of machines, policies and objects: what all of them allow.
check_name() {
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "--name is ${name@Q}; use up to 40 of a-z, 0-9 and -, beginning with a letter, such as saven-2a"
}

# --- what is trained -------------------------------------------------------------------------------------------------

# avlm of this checkout's environment, else the one on the path.
avlm() {
  if [[ -x $root/.venv/bin/avlm ]]; then "$root/.venv/bin/avlm" "$@"; else command avlm "$@"; fi
}

# `train` must name a configuration and a working directory, which becomes $workdir: of several the last, as for `avlm train`.
require_training() {
  local index word has_config=""
  workdir=""
  for ((index = 0; index < ${#train[@]}; index++)); do
    word=${train[index]}
    case $word in
      --config | --config=*) has_config=yes ;;
      --workdir) workdir=${train[index + 1]-} ;;
      --workdir=*) workdir=${word#*=} ;;
    esac
  done
  [[ $has_config && $workdir ]] || fail "say behind -- what to train, for example:" \
    "$program ... -- --config configs/savenvideo.py:size=7b,stage=2a --workdir ${1:-/mnt/avlm/runs/7b}"
}

# The same on rented machines, whose own disks go with them; the bucket stays.
require_training_on_bucket() {
  require_training
  [[ $workdir == /mnt/avlm/?* && $workdir/ != */../* ]] ||
    fail "--workdir is ${workdir@Q}; only /mnt/avlm outlives the machines: --workdir /mnt/avlm/runs/7b"
}

# preflight TOPOLOGY [SLICES]: compiles the step for that slice on this machine, before any money is spent; if it does not
# fit, or cannot be tried, nothing is rented. Of the options of `avlm train`, those that make up the configuration.
preflight() {
  if [[ $no_preflight ]]; then
    note "No preflight (--no-preflight)."
    return
  fi
  note "Does it fit? Nothing is rented if not (--no-preflight skips this)."
  local index word options=() code=0
  for ((index = 0; index < ${#train[@]}; index++)); do
    word=${train[index]}
    case $word in
      --config | --config.*)
        options+=("$word")
        if [[ $word != *=* ]]; then
          index=$((index + 1))
          options+=("${train[index]-}")
        fi
        ;;
      --config=*) options+=("$word") ;;
    esac
  done
  [[ ${2:-1} == 1 ]] || options+=(--slices "$2")
  run avlm preflight "${options[@]}" --topology "$1" || code=$?
  if ((code)); then
    say "$program: the preflight ended with exit code $code; nothing was rented (--no-preflight goes on without it)"
    exit "$code"
  fi
}

# --- a process under watch -------------------------------------------------------------------------------------------

# A pipe with no name: $listen reads from it, $speak writes to it. Both are open from the beginning, so that neither side ever
# waits for the other one to come, which may have been ended before.
open_pipe() {
  local folder both
  folder=$(mktemp -d)
  mkfifo "$folder/pipe"
  exec {both}<> "$folder/pipe" {listen}< "$folder/pipe" {speak}> "$folder/pipe"
  exec {both}>&-
  rm -r "$folder"
}

# `pass_on_signals`, then start $child in the background, `tell_if_stopped`, `wait_for_child`: SIGTERM and Ctrl-C become a
# SIGTERM to the child (bash starts what it runs beside itself with SIGINT ignored), are noted in $stopped, and $code is what
# the child made of it.
child="" stopped="" interrupted=""
pass_on_signals() { trap stop TERM INT; }
# shellcheck disable=SC2329 # By the trap.
stop() {
  stopped=yes interrupted=yes
  if [[ $child ]]; then kill -s TERM "$child" 2> /dev/null || true; fi
}

# It may have come before there was a child.
tell_if_stopped() {
  if [[ $stopped ]]; then kill -s TERM "$child" 2> /dev/null || true; fi
}

# The child's own exit code: a signal with a trap ends `wait` early.
wait_for_child() {
  local again
  interrupted=""
  code=0
  wait "$child" || code=$?
  while [[ $interrupted ]]; do
    interrupted=""
    again=0
    wait "$child" || again=$?
    ((again == 127)) || code=$again # 127: it had been waited for after all.
  done
  child=""
}

# What a launcher does about an exit code of `avlm train`: 0 is done; 1 (training failed), 2 (unusable configuration), 130
# (interrupted) and the shell's 126 and 127 (no such command) would only come again. All else is mended by a new start: 75, a
# stuck step or a lost process; 142, a frozen interpreter; 143, SIGTERM; 134, ended by JAX because another process is gone; 137, no memory or killed.
worth_a_restart() {
  case $1 in
    0 | 1 | 2 | 126 | 127 | 130) return 1 ;;
    *) return 0 ;;
  esac
}
