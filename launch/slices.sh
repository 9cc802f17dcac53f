# shellcheck shell=bash disable=SC2154 # Options are set by the script that asks for them.
# A run on rented TPU slices, from the request to the bill's end. Sourced after shell.sh by the scripts that rent; each has
#   ask        asks for the slices; fails if the request is not taken
#   state      prints ACTIVE, GONE (there is no such request), UNKNOWN (nobody could be asked), or what the cloud calls it; `is_taken STATE` for those that end a run
#   start      installs and starts training on slices that are there
#   delete     gives everything back that costs money by the hour
#   show_polls prints, for --dry-run, how state and reports are asked for

# Splits --topology (v5e:4x4, as `avlm preflight` and JAX spell it) into $generation, $shape and $chips.
read_topology() {
  [[ $topology =~ ^(v4|v5e|v5p|v6e|tpu7x):([0-9]+)x([0-9]+)(x([0-9]+))?$ ]] ||
    fail "--topology is ${topology@Q}; write it as v5e:4x4, v6e:2x4, v5p:2x2x4, v4:2x2x4 or tpu7x:2x2x2"
  generation=${BASH_REMATCH[1]}
  shape=${topology#*:}
  chips=$((BASH_REMATCH[2] * BASH_REMATCH[3] * ${BASH_REMATCH[5]:-1}))
  case $generation in
    v5e | v6e)
      case $shape in
        1x1 | 2x2 | 2x4 | 4x4 | 4x8 | 8x8 | 8x16 | 16x16) ;;
        *) fail "--topology $topology: a $generation slice is 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16" ;;
      esac
      ;;
    *)
      [[ $shape == *x*x* ]] || fail "--topology $topology: a $generation slice has three sides, such as $generation:2x2x4"
      ((chips % 4 == 0)) || fail "--topology $topology: $chips chips; $generation is rented in machines of 4 chips"
      ;;
  esac
}

# The code of the last commit as an archive that unpacks to avlm_jax/. Uncommitted changes are not part of a run that one wants
# to repeat, and one that is continued gets the code that it began with, whatever has been committed since.
packed=""
pack_code() {
  archive=.cache/launch/$name.tar.gz
  [[ ! $packed ]] || return 0
  note "The code: what is committed, without local changes."
  run mkdir -p .cache/launch || return # `set -e` does not hold where this is called.
  run git archive --format=tar.gz --prefix=avlm_jax/ --output="$archive" HEAD || return
  packed=yes
  if [[ ! $dry_run && $(git status --porcelain --untracked-files=no) ]]; then
    say "$program: there are uncommitted changes; the run gets the last commit without them"
  fi
}

# Where the workers tell how they are: one object a worker, in the bucket, so that it outlives the machines.
reports() { printf 'gs://%s/launch/%s' "$bucket" "$name"; }

# Reads the workers' reports (see supervise.sh): sets $verdict to running, 0 when every one has ended with 0, or the exit
# code of one that has given up.
read_reports() {
  local line code ended=0 count=0
  verdict=running
  while read -r line; do
    count=$((count + 1))
    [[ $line == ended\ * ]] || continue
    code=${line#ended }
    code=${code%% *}
    if [[ $code == 0 ]]; then
      ended=$((ended + 1))
    else
      verdict=$code
      return
    fi
  done < <(gcloud storage cat "$(reports)/*.status" 2> /dev/null || true)
  if ((count && ended == count)); then verdict=0; fi
}

show_failure() {
  say "$program: training has ended with exit code $verdict; the last lines of each worker's log, from $(reports)/*.log:"
  gcloud storage cat --display-url "$(reports)/*.log" >&2 || true
}

forget_reports() {
  note "Reports of an earlier attempt."
  if [[ $dry_run ]]; then
    show gcloud storage rm --recursive "$(reports)"
  else
    gcloud storage rm --recursive "$(reports)" > /dev/null 2>&1 || true # There may be none.
  fi
}

wait_active() {
  note "Wait until the slices are there, looking every $poll s."
  if [[ $dry_run ]]; then
    show_polls
    return
  fi
  local before=""
  while :; do
    now=$(state)
    [[ $now == "$before" ]] || say "$program: $name is $now"
    before=$now
    [[ $now != ACTIVE ]] || return 0
    if is_taken "$now"; then return 1; fi
    sleep "$poll"
  done
}

# The slices were taken: give back what is left, which keeps its name and its quota, and ask again.
recreate() {
  while ((recreations > 0)); do
    recreations=$((recreations - 1))
    say "$program: the slices are gone; asking again ($recreations more times after this)"
    while delete || true && now=$(state) && [[ $now != GONE ]]; do sleep "$poll"; done
    if ask; then
      if wait_active && start; then return 0; fi
      if [[ $now == GONE ]]; then stop_for_deleted; fi
    fi
    sleep "$poll"
  done
  say "$program: the slices were taken too often (--recreations); the checkpoints are in the bucket, the same command goes on"
  verdict=1
  finish
}

# What was taken stands there as taken; what is not there at all somebody has deleted, and did not want to pay for.
stop_for_deleted() {
  say "$program: $name has been deleted; nothing is asked for again. The checkpoints are in the bucket"
  exit 1
}

watch() {
  note "Look every $poll s at the slices and at the workers' reports. Taken slices: delete, ask, start again."
  if [[ $dry_run ]]; then
    show_polls
    show gcloud storage cat "$(reports)/*.status"
    return
  fi
  local doubts=0
  if [[ -f .cache/launch/$name.tar.gz ]]; then packed=yes; fi # By the command that began this run.
  while :; do
    now=$(state)
    read_reports
    if [[ $verdict != running ]] && ! worth_a_restart "$verdict"; then return; fi
    if [[ $now == GONE ]]; then
      stop_for_deleted
    elif is_taken "$now"; then
      recreate
      doubts=0
    elif [[ $verdict == running ]]; then
      doubts=0
      sleep "$poll"
    else
      # 143 and the like: machines that are being taken report it before the cloud says so. Else somebody stopped
      # the training, or it was started again too often.
      doubts=$((doubts + 1))
      ((doubts <= 5)) || return 0
      sleep "$poll"
    fi
  done
}

# What a finished or failed training leaves.
finish() {
  if [[ ! $dry_run ]]; then
    if [[ $verdict == 0 ]]; then say "$program: training has finished"; else show_failure; fi
  fi
  if [[ $keep ]]; then note "--keep: the slices go on costing money until: $program delete"; else
    delete || say "$program: COULD NOT DELETE $name; it goes on costing money"
  fi
  exit "${verdict:-0}"
}

# The first time, a request that is refused or fails is a mistake or a quota: asking again does not mend it.
run_all() {
  pack_code || exit # Before anything costs money.
  ask || exit
  if wait_active && start; then return; fi
  [[ $dry_run ]] || now=$(state)
  if [[ $now == GONE ]]; then
    stop_for_deleted
  elif is_taken "$now" && [[ $now != FAILED ]]; then
    recreate
  else
    say "$program: could not start; $name is $now"
    verdict=1
    finish
  fi
}

say_what_goes_on() {
  say "$program: interrupted here; the slices go on, and cost money. Take up again: $program watch; end them: $program delete"
  exit 130
}

verdict="" now=""
