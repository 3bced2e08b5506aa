#!/usr/bin/env bash
# The main job under Slurm, on a Ray cluster that lives as long as the allocation. In the project's folder:
#
#   NANOCHAT_BASE_DIR=/shared/runs sbatch cluster/slurm.sh --preset d24      what follows goes to jobs/speedrun.py
#
# The folder, its .venv and NANOCHAT_BASE_DIR are on a file system that all nodes see. Before its time is over, or when it
# is preempted, the job saves and goes back into the queue; the next allocation goes on from there.
# JOB=jobs/sft.py runs another job. Edit the lines below.
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
#SBATCH --open-mode=append
#SBATCH --output=nanochat-%j.log
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"
: "${NANOCHAT_BASE_DIR:?set it to a folder that all nodes see, or to a bucket: s3://..., gs://...}"
export NANOCHAT_BASE_DIR

# All steps of this allocation get the environment, and with it the token; others on the same network do not.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
unset OMP_NUM_THREADS

# Names that another job's Ray on the same node does not use. `ray symmetric-run` would end that one too: it stops all Ray
# processes of the user on a node.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}
export SRUN_CPUS_PER_TASK=$cpus # srun does not take it from the allocation
port=$((20000 + SLURM_JOB_ID % 10000))
common=(--num-cpus="$cpus" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
        --temp-dir="/tmp/ray-$SLURM_JOB_ID" --dashboard-agent-listen-port=0 --block)
steps=()
finish() {
  if [ "${#steps[@]}" -gt 0 ]; then
    kill "${steps[@]}" 2>/dev/null || true
    wait "${steps[@]}" 2>/dev/null || true
  fi
}
trap finish EXIT

srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port="$port" \
  --dashboard-port="$((port + 10000))" "${common[@]}" &
steps+=("$!")
export RAY_ADDRESS="$head:$port"
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  others=$((SLURM_JOB_NUM_NODES - 1))
  # Each tries until the head is there.
  srun --nodes="$others" --ntasks="$others" --exclude="$head" bash -c '
    until ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; do sleep 2; done
    exec ray start --address="$RAY_ADDRESS" "$@"' ray "${common[@]}" &
  steps+=("$!")
fi

# A preset is chosen by the GPUs of the cluster, so all nodes must be there first.
python - "$SLURM_JOB_NUM_NODES" <<'END'
import sys, time
import ray

deadline = time.monotonic() + 600
while True:
    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        found = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        found = 0
    if found >= int(sys.argv[1]):
        break
    if time.monotonic() > deadline:
        sys.exit(f"error: after 600 s only {found} of {sys.argv[1]} nodes have joined; see the lines above")
    time.sleep(1)
END

python "${JOB:-jobs/speedrun.py}" "$@" &
driver=$!
asked=""
trap 'asked=1; kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do # the wait was interrupted by the signal; the job saves
  code=0
  wait "$driver" || code=$?
done
if [ -n "$asked" ] && [ "$code" -eq 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
