#!/bin/bash
#SBATCH --job-name=demo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=01:00:00
#SBATCH --output=/shared/runs/demo/logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --requeue
# Run demo: prepare, train, export. Made from config.yaml; runs again by hand as it is.
# shellcheck disable=SC1090,SC1091,SC2016,SC2054,SC2064,SC2317 # values are data; traps and sourced files are meant
set -uo pipefail

run_dir=/shared/runs/demo
config=$run_dir/config.yaml
job_id=$SLURM_JOB_ID
SFT_ATTEMPT=$job_id.${SLURM_RESTART_COUNT:-0}
export SFT_ATTEMPT
log_dir=$run_dir/logs/$SFT_ATTEMPT
mkdir -p "$log_dir" /shared/runs/.cache || exit 74
exec >>"$log_dir/batch.log" 2>&1
cd "$run_dir" || exit 74

event() { # NAME [,"key":value]...
  printf '{"time":%s,"event":"%s","attempt":"%s"%s}\n' "$(date +%s)" "$1" "$SFT_ATTEMPT" "${2-}" >>"$run_dir/events.jsonl"
}
trap 'rc=$?; event attempt_ended ",\"exit_code\":$rc"; echo "attempt $SFT_ATTEMPT ended with exit code $rc"' EXIT
event attempt_started ",\"job_id\":\"$job_id\",\"host\":\"${HOSTNAME-}\""
echo "attempt $SFT_ATTEMPT of run demo started on ${HOSTNAME-} at $(date)"

export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=8
export CUDA_DEVICE_MAX_CONNECTIONS=1
python=(/opt/python)
srun_args=()

trap 'echo "asked to stop"' TERM # Slurm tells the ranks itself; this shell stays to record how they ended
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts[0]}
MASTER_PORT=$((20000 + (job_id * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000)) # below the kernel's range for clients
while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT

one_process() { # one task that may use all of the first node's CPUs
  env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK \
    srun --export=ALL "${srun_args[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 "${python[@]}" "$@"
}

rc=0
echo "prepare"
one_process -m sft prepare "$config" || exit
echo "preflight of 2 nodes"
# One task a node. Only the first one's exit code counts: it knows what all of them found, and which said nothing.
SFT_HOSTS="${hosts[*]}" env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK \
  srun --export=ALL "${srun_args[@]}" --nodes=2 --ntasks=2 --ntasks-per-node=1 \
  --kill-on-bad-exit=0 --wait=120 --unbuffered \
  bash -c '"$@"; code=$?; [ "$SLURM_PROCID" -ne 0 ] || exit "$code"' bash "${python[@]}" -m sft preflight "$config" || exit
echo "train: tp2 x pp2 x dp2 = 8 ranks + sequence parallel, rendezvous $MASTER_ADDR:$MASTER_PORT"
# srun answers with the highest code of all ranks, which is that of a rank it killed; the first to fail tells the cause.
rank_main='trap : TERM USR2; "$@"; code=$?
[ "$code" -eq 0 ] || (set -C; echo "$code" "$SLURM_PROCID" "$SLURMD_NODENAME" >"$SFT_FAILURE") 2>/dev/null
exit "$code"'
export SFT_FAILURE=$log_dir/failure
srun --export=ALL "${srun_args[@]}" --nodes=2 --ntasks=8 --ntasks-per-node=4 \
  --cpus-per-task=8 \
  --kill-on-bad-exit=1 --wait=60 --unbuffered --open-mode=append --output="$log_dir/rank-%t.log" \
  bash -c "$rank_main" bash "${python[@]}" -m sft train "$config" || rc=$?
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
