#!/bin/bash
# Run demo: prepare, train, export. Generated from config.yaml. It can be run again by hand, unchanged.
# shellcheck disable=SC1090,SC1091,SC2016,SC2054,SC2064,SC2317 # quoted values are data; traps and sourced files are intended
set -uo pipefail

begins() { # VARIABLE: tell the ranks when a phase of this script began (sft/runtime/start_clock.py)
  export "$1=$(date +%s.%N)"
}
begins SFT_BEGAN_SCRIPT
run_dir=/shared/runs/demo
config=$run_dir/config.yaml
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK NODE_RANK MASTER_ADDR MASTER_PORT # of a shell inside torchrun
number=1
mkdir -p "$run_dir/logs" || exit 74
until mkdir "$run_dir/logs/local-$number" 2>/dev/null; do
  [ -d "$run_dir/logs/local-$number" ] || exit 74
  number=$((number + 1))
done
SFT_ATTEMPT=local-$number
job_id=${SUBMITIT_LOCAL_JOB_ID:-$$}
node_list=''
cluster_name=''
if [ -n "${SUBMITIT_LOCAL_TIMEOUT_S-}" ]; then
  export SFT_END_TIME=${SFT_END_TIME:-$(($(date +%s) + SUBMITIT_LOCAL_TIMEOUT_S))} # one limit for all restarts together
fi
export SFT_ATTEMPT
log_dir=$run_dir/logs/$SFT_ATTEMPT
mkdir -p "$log_dir" /shared/runs/.cache || exit 74
exec >>"$log_dir/batch.log" 2>&1
cd "$run_dir" || exit 74

event() { # NAME [,"key":value]...
  printf '{"time":%s,"event":"%s","attempt":"%s"%s}\n' "$(date +%s)" "$1" "$SFT_ATTEMPT" "${2-}" >>"$run_dir/events.jsonl"
}
leased=''
detail=''
fail() { # CODE TEXT: end for a reason that people read in status and --why
  echo "$2"
  detail=$2
  exit "$1"
}
unchanged() { # FILE: whether a file of the run is what was submitted, by the digest in its manifest
  (cd "$run_dir" && sed -n "s|^ *\"$1\": \"\([0-9a-f]*\)\",*\$|\1  $1|p" manifest.json | sha256sum --check --status --strict -)
}
last_words() { tail -n 1 "$log_dir/batch.log" | tr -d '\000-\037' | cut -c 1-200; }
how_ended() {
  local text=${detail//\\/\\\\}
  event attempt_ended ",\"exit_code\":$rc${detail:+,\"detail\":\"${text//\"/\\\"}\"}"
}
started() { event attempt_started ",\"job_id\":\"$job_id\",\"scheduler\":\"local\",\"host\":\"${HOSTNAME-}\",\"nodes\":\"${node_list-}\"${cluster_name:+,\"cluster\":\"$cluster_name\"}"; }
ended() { # runs at every exit: record how the attempt ended, then do what the restart policy says
  local rc=$1 answer
  if [ -z "$leased" ]; then # it failed before it had the lease of the run
    started
    how_ended
    return
  fi
  answer=$(light_process -m launcher.attempts.attempt end "$run_dir" --attempt "$SFT_ATTEMPT" --job-id "$job_id" --pid "$$" --cluster "${cluster_name-}" \
    --exit-code "$rc" --job "$(job_view)") || answer=''
  how_ended
  echo "attempt $SFT_ATTEMPT ended with exit code $rc"
  # shellcheck disable=SC2086 # an action and, for some, a list of nodes
  follow "$rc" $answer
}
trap 'ended $?' EXIT
echo "attempt $SFT_ATTEMPT of run demo started on ${HOSTNAME-} at $(date)"

export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1
python=(apptainer exec --bind /scratch:/scratch --bind /data:/data --bind /models/llama:/models/llama --bind /shared/runs/.cache:/shared/runs/.cache --bind /shared/runs/demo:/shared/runs/demo /images/sft.sif python)

child='' stopped='' told=''
stop() {
  echo "asked to stop by $1"
  stopped=$1
  if [ -n "$child" ]; then told=1; kill -s "$1" "$child"; fi
}
for signal in TERM INT USR2; do trap "stop $signal" "$signal"; done
attended() { # run a command in the background, so that signals reach it while it runs
  [ -z "$stopped" ] || return 143
  "$@" &
  child=$!
  [ -z "$stopped" ] || [ -n "$told" ] || kill -s "$stopped" "$child" # asked before this shell knew the process
  local code
  while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break # a signal interrupts `wait`
  done
  child=
  return "$code"
}
one_process() { attended "${python[@]}" "$@"; }
light_process() { "${python[@]}" "$@"; }
job_view() { :; }
holder_state() { :; }
nodes_down() { :; }
follow() { # CODE [ACTION]: restart in the same process, whose id the launcher has recorded
  case ${2-} in requeue | in_place | resubmit) ;; *) return ;; esac
  unchanged job.sh || { echo "job.sh is not what was submitted, so the run does not go on"; return; }
  trap - EXIT
  exec "$BASH" "$run_dir/job.sh"
}
light_process -m launcher.attempts.attempt begin "$run_dir" --attempt "$SFT_ATTEMPT" --job-id "$job_id" --pid "$$" --cluster "${cluster_name-}" \
  --holder-state "$(holder_state)" --nodes-down "$(nodes_down)" || {
  rc=$?
  if [ "$rc" -eq 4 ] || [ "$rc" -eq 93 ]; then
    trap - EXIT # it has recorded why it does not start, and another attempt may be at work
    exit "$rc"
  fi
  fail "$rc" "the run could not be taken: $(last_words)"
}
leased=1
started

rc=0
echo "prepare"
begins SFT_BEGAN_PREPARE
one_process -m sft prepare "$config" || exit
begins SFT_BEGAN_RANKS
echo "train: tp4 = 4 ranks"
attended /opt/python -m launcher.contract.local_ranks --ranks 4 --log-dir "$log_dir" \
  -- "${python[@]}" -m sft train "$config" || rc=$?
if [ "$rc" -eq 0 ]; then
  echo "export"
  one_process -m sft export "$run_dir" || rc=$?
fi
exit "$rc"
