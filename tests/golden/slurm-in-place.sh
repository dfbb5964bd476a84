#!/bin/bash
#SBATCH --job-name=demo
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=01:00:00
#SBATCH --output=/shared/runs/demo/logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --propagate=NONE
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
job_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # an element of a sweep's array
job_id=${job_id:-$SLURM_JOB_ID}
node_list=${SLURM_JOB_NODELIST-}
SFT_ATTEMPT=$job_id.${SLURM_RESTART_COUNT:-0}
given_pythonpath=${PYTHONPATH-}
# A restart in place runs this script again in the same shell, and tells it the attempt and its nodes.
[[ ${SFT_NEXT_ATTEMPT-} != "$SFT_ATTEMPT"-* ]] || { SFT_ATTEMPT=$SFT_NEXT_ATTEMPT node_list=${SFT_NODES-}; }
unset SFT_NEXT_ATTEMPT SFT_NODES SLURM_NO_KILL # with the last, a step would outlive the loss of its node
cluster_name=${SLURM_CLUSTER_NAME-}
export SFT_END_TIME=${SLURM_JOB_END_TIME-} # which some versions of Slurm do not set
for pause in 1 1 0; do
  [ -z "$SFT_END_TIME" ] || break
  end_time=$(squeue --noheader --jobs="$job_id" --format=%e 2>/dev/null) || { sleep "$pause"; continue; }
  [[ $end_time != [0-9]* ]] || SFT_END_TIME=$(date -d "$end_time" +%s 2>/dev/null)
  break
done
[ -n "$SFT_END_TIME" ] || unset SFT_END_TIME # no deadline is known, so none is assumed
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
started() { event attempt_started ",\"job_id\":\"$job_id\",\"scheduler\":\"slurm\",\"host\":\"${HOSTNAME-}\",\"nodes\":\"${node_list-}\"${cluster_name:+,\"cluster\":\"$cluster_name\"}"; }
ended() { # runs at every exit: record how the attempt ended, then do what the restart policy says
  local rc=$1 answer look
  if [ -z "$leased" ]; then # it failed before it had the lease of the run
    started
    how_ended
    return
  fi
  look=()
  [ "$rc" -eq 0 ] || look_at_nodes
  answer=$(light_process -m launcher.attempts.attempt end "$run_dir" --attempt "$SFT_ATTEMPT" --job-id "$job_id" --pid "$$" --cluster "${cluster_name-}" \
    --exit-code "$rc" --job "$(job_view)" "${look[@]}") || answer=''
  how_ended
  echo "attempt $SFT_ATTEMPT ended with exit code $rc"
  # shellcheck disable=SC2086 # an action and, for some, a list of nodes
  follow "$rc" $answer
}
trap 'ended $?' EXIT
echo "attempt $SFT_ATTEMPT of run demo started on ${HOSTNAME-} at $(date)"

export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=8
export CUDA_DEVICE_MAX_CONNECTIONS=1
python=(/opt/python)
srun_args=(--mpi=none)

trap 'echo "asked to stop"' TERM # Slurm signals the ranks itself; this shell stays to record how they ended
mapfile -t allocated < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[[ $SFT_ATTEMPT == *-* ]] || node_list=$(IFS=,; echo "${allocated[*]:0:2}") # the others are spare
IFS=, read -ra hosts <<<"$node_list"
host_args=(--mpi=none) # for what needs no container
process_on() { # NODE: one task that may use all of its CPUs
  local node=$1
  shift
  env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK \
    srun --export=ALL "${srun_args[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$node" --overlap "${python[@]}" "$@"
}
one_process() { process_on "${hosts[0]}" "$@"; }
light_process() { "${python[@]}" "$@"; }
job_view() { scontrol show job -o "$job_id" 2>/dev/null; }
holder_state() { # state of the job that holds the run's lease, if it is another one
  local lease holder cluster=''
  lease=$(cat "$run_dir/lease.json" 2>/dev/null)
  [[ "$lease" =~ \"job_id\":\ \"([0-9]+(_[0-9]+)?)\" ]] || return
  holder=${BASH_REMATCH[1]}
  if [[ "$lease" =~ \"cluster\":\ \"([^\"]+)\" ]] && [ "${BASH_REMATCH[1]}" != "${cluster_name-}" ]; then
    cluster=${BASH_REMATCH[1]}
  fi
  if [ "$holder" != "$job_id" ] || [ -n "$cluster" ]; then
    squeue --noheader ${cluster:+--clusters="$cluster"} --states=all --jobs="$holder" --format=%T 2>/dev/null | grep -v '^CLUSTER:'
  fi
}
nodes_down() { # nodes of the last attempt that Slurm has lost
  local nodes
  nodes=$(sed -n 's/.*"event":"attempt_started".*"nodes":"\([^"]*\)".*/\1/p' "$run_dir/events.jsonl" 2>/dev/null | tail -n 1)
  [ -z "$nodes" ] || sinfo --noheader --Node --nodes="$nodes" --states=down,fail --format=%N 2>/dev/null | sort -u | paste -sd,
}
# Ends what is left of a job's ranks on a node, and says the node's name once nothing is.
sweep='for ((tries = 0; tries < 100; tries++)); do
  mapfile -t left < <(grep -lszxF "SFT_RANKS_OF=$1" /proc/[0-9]*/environ | xargs -r grep -lszxF "SLURMD_NODENAME=$SLURMD_NODENAME")
  [ -n "${left[*]-}" ] || { echo "$SLURMD_NODENAME"; exit; }
  left=("${left[@]#/proc/}")
  kill -KILL "${left[@]%/environ}" 2>/dev/null
  sleep 0.2
done
exit 1'
nodes_in() { sinfo --noheader --Node --nodes="$(IFS=,; echo "${allocated[*]}")" --states="$1" --format=%N 2>/dev/null | sort -u | paste -sd,; }
look_at_nodes() { # set `look` to what Python must know of the nodes: those with ranks, and those that answer and are free of them
  local down usable node
  [[ "$(job_view)" == *JobState=RUNNING* ]] || return
  down=,$(nodes_in down,fail),
  usable=$(for node in "${allocated[@]}"; do
    [[ $down != *",$node,"* ]] || continue
    env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK timeout --kill-after=5 20.0 \
      srun --export=ALL "${host_args[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$node" --overlap --input=none \
      bash -c "$sweep" bash "$job_id" &
  done; wait)
  usable=$(paste -sd, <<<"$usable")
  look=(--nodes "$(IFS=,; echo "${allocated[*]}")" --nodes-used "$node_list" --nodes-usable "$usable" --nodes-draining "$(nodes_in drain)")
  echo "nodes on which ranks may start: ${usable:-none}"
}
start_again() { # ATTEMPT NODES: run this script for them, in this shell, so that the job and its process stay the same
  unchanged job.sh || { echo "job.sh is not what was submitted, so the run does not go on"; return; }
  trap - EXIT TERM
  kill "$guards"
  SFT_NEXT_ATTEMPT=$1 SFT_NODES=$2 PYTHONPATH=$given_pythonpath exec "$BASH" "$run_dir/job.sh"
}
follow() { # CODE [ACTION [NODES TO AVOID]], or CODE in_place ATTEMPT NODES
  local action=${2-} avoid=${3-} view tries=0
  trap '' TERM # a requeue ends every process of the job, even the command that asks for it
  if [ -z "$action" ] && [ "$1" -eq 75 ] && [[ "$(job_view)" == *JobState=RUNNING* ]]; then
    action=requeue # there is no decision to follow, and a cancelled job would not be RUNNING
  fi
  case $action in
    in_place) start_again "$3" "$4" ;;
    requeue)
      until scontrol requeue "$job_id"; do
        view=$(job_view)
        if [[ $view == *JobState=RUNNING* ]]; then
          echo "requeueing is not allowed here; a new job goes on"
          resubmit "$avoid"
          return
        fi
        [ -z "$view" ] || return 0 # it was cancelled in the meantime
        if [ $((tries += 1)) -ge 30 ]; then
          echo "Slurm's controller does not answer, so the job was not requeued; launcher resubmit resumes the run"
          return
        fi
        sleep 10
      done
      # Slurm accepts new exclusions only for a waiting job; this shell has a few seconds left after the requeue.
      [ -z "$avoid" ] || scontrol update JobId="$job_id" ExcNodeList="$avoid"
      ;;
    resubmit) resubmit "$avoid" ;;
    withdraw) scancel "$job_id" ;;
  esac
}
resubmit() { # [NODES TO AVOID]: submit the run's next job, without this job's variables in its environment
  local avoid=${1-} begun=$run_dir/submission.json name inherited=() said new token pause excluded=' ExcNodeList=([^ (]+)'
  unchanged job.sh || { echo "job.sh is not what was submitted, so the run does not go on"; return; }
  for name in $(compgen -e); do
    case $name in SLURM_CONF | SLURM_JWT) ;; SLURM* | SBATCH_* | SRUN_* | PMI* | *_VISIBLE_DEVICES | GPU_DEVICE_ORDINAL | SFT_ATTEMPT | SFT_END_TIME) inherited+=(-u "$name") ;; esac
  done
  if [ -z "$avoid" ] && [[ "$(job_view)" =~ $excluded ]]; then avoid=${BASH_REMATCH[1]}; fi
  # The new job is found by its token, whatever becomes of sbatch's answer: here, or later by `launcher resubmit`.
  token=sft-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  printf '{"token":"%s","scheduler":"slurm","written_at":%s,"host":"%s"}\n' "$token" "$(date +%s)" "${HOSTNAME-}" >"$begun.new" &&
    mv "$begun.new" "$begun" || echo "$begun could not be written; the new job's comment names it all the same"
  said=$(env "${inherited[@]}" timeout --kill-after=5 60 sbatch --parsable --comment="$token" ${avoid:+--exclude="$avoid"} \
    "$run_dir/job.sh")
  echo "$said"
  new=$(grep -Ex '[0-9]+(;[^[:space:]]+)?' <<<"$said" | tail -n 1) # sites wrap sbatch in scripts that print more
  new=${new%%;*}
  for pause in 0 4 8 12; do
    [ -z "$new" ] || break
    sleep "$pause"
    new=$(squeue --noheader --user="$(id -u)" --states=all --format='%F|%k' | grep -F -- "$token" | head -n 1)
    new=${new%%|*}
  done
  if [ -z "$new" ]; then
    echo "sbatch named no job, and the queue shows none; launcher resubmit goes on"
    return
  fi
  event submitted ",\"job_id\":\"$new\",\"scheduler\":\"slurm\",\"by\":\"$SFT_ATTEMPT\",\"token\":\"$token\"${cluster_name:+,\"cluster\":\"$cluster_name\"}"
  rm -f "$begun"
  wait_for_instead "$new"
}
wait_for_instead() { # JOB: have our jobs that wait for this one wait for that one, which goes on with the run
  local waiting clauses names=":$job_id(\$|[^0-9_])"
  squeue --noheader --user="$(id -u)" --states=PENDING --format='%i|%E' | sed 's/([^)]*)//g' | while IFS='|' read -r waiting clauses; do
    [[ $clauses =~ $names ]] || continue
    scontrol update JobId="$waiting" Dependency="$(sed -E "s/$names/:$1\\1/g" <<<"$clauses")"
  done
}
# With --no-kill, a job that loses the node of this script holds its other nodes to the end of its time. Two of them watch.
guard='while sleep 15; do
  view=$(scontrol show job -o "$1") || continue
  [[ $view == *" JobState=RUNNING "* && $view == *" Restarts=$2 "* ]] || continue
  [[ $view =~ " BatchHost="([^ ]+) ]] && batch=${BASH_REMATCH[1]} || continue
  [[ $view =~ " NodeList="([^ ]+) ]] && left=" $(scontrol show hostnames "${BASH_REMATCH[1]}" | paste -sd " ") " || continue
  [[ $left != *" $batch "* ]] || continue
  sleep "$((60 * SLURM_PROCID))" # the first is enough
  scontrol requeue "$1" || scancel "$1"
done'
watch_this_node() {
  local node others=()
  for node in "${hosts[@]}"; do [ "$node" = "${allocated[0]}" ] || others+=("$node"); done # these are known to be well
  [[ $SFT_ATTEMPT == *-* && -n ${others[*]-} ]] || others=("${allocated[@]:1}")
  others=("${others[@]:0:2}")
  env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK \
    srun --export=ALL "${host_args[@]}" --nodes="${#others[@]}" --ntasks="${#others[@]}" --ntasks-per-node=1 --nodelist="$(IFS=,; echo "${others[*]}")" \
    --overlap --input=none --no-kill --kill-on-bad-exit=0 --wait=0 bash -c "$guard" bash "$job_id" "${SLURM_RESTART_COUNT:-0}" &
  guards=$!
}
watch_this_node
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
generation=0 # each has a port of its own, which no rank before it knows
[[ $SFT_ATTEMPT != *-* ]] || generation=${SFT_ATTEMPT##*-}
MASTER_ADDR=${hosts[0]}
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} + generation) % 10000)) # below the kernel's range for client ports
while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT
echo "preflight of 2 nodes"
begins SFT_BEGAN_PREFLIGHT
# One task on each node. Only the exit code of the first counts: it knows what all of them found and which are silent.
SFT_HOSTS="${hosts[*]}" env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK \
  srun --export=ALL "${srun_args[@]}" --nodes=2 --ntasks=2 --ntasks-per-node=1 \
  --nodelist="$node_list" --overlap \
  --kill-on-bad-exit=0 --wait=120 --unbuffered \
  bash -c '"$@"; code=$?; [ "$SLURM_PROCID" -ne 0 ] || exit "$code"' bash "${python[@]}" -m sft preflight "$config" || exit
begins SFT_BEGAN_RANKS
echo "train: tp4 x dp2 = 8 ranks, rendezvous $MASTER_ADDR:$MASTER_PORT"
# srun exits with the highest code of all ranks, which is that of a rank it killed. The first to fail has the cause.
rank_main='trap : TERM USR2; "$@"; code=$?
[ "$code" -eq 0 ] || (set -C; echo "$code" "$SLURM_PROCID" "$SLURMD_NODENAME" >"$SFT_FAILURE") 2>/dev/null
exit "$code"'
export SFT_FAILURE=$log_dir/failure
srun --export=ALL "${srun_args[@]}" --nodes=2 --ntasks=8 --ntasks-per-node=4 \
  --cpus-per-task=8 \
  --nodelist="$node_list" --overlap \
  --kill-on-bad-exit=1 --wait=60 --unbuffered --open-mode=append --output="$log_dir/rank-%t.log" \
  env SFT_RANKS_OF="$job_id" bash -c "$rank_main" bash "${python[@]}" -m sft train "$config" || rc=$?
if [ "$rc" -ne 0 ] && [ -s "$SFT_FAILURE" ]; then
  read -r code rank host <"$SFT_FAILURE"
  echo "rank $rank on $host failed first, with exit code $code"
  rc=$code
fi
if [ "$rc" -eq 0 ]; then
  echo "export"
  one_process -m sft export "$run_dir" || rc=$?
fi
exit "$rc"
