#!/usr/bin/env bash
# Pretraining on several nodes under Slurm. The job is requeued until it is finished.
#
#     ijepa recipes copy accelerate/slurm.sh
#     sbatch --nodes 2 slurm.sh --recipe vit_huge14_in1k_300ep --data /data/imagenet --output_dir /shared/huge14
#
# Every argument goes to `ijepa pretrain`. The output directory must be on a file system that all nodes see.
#SBATCH --job-name=ijepa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Three minutes before the time limit Slurm sends SIGUSR1 to this script (B:). When Slurm preempts the job, it sends SIGTERM.
#SBATCH --signal=B:USR1@180
set -uo pipefail

# For another mode: ijepa recipes copy accelerate/fsdp2.yaml; CONFIG=fsdp2.yaml sbatch ...
CONFIG=${CONFIG:-$("${PYTHON:-python}" -c 'from ijepa_transformers.recipe_files import RECIPES; print(RECIPES / "accelerate" / "ddp.yaml")')}
[ -f "$CONFIG" ] || { echo "slurm.sh: there is no launch configuration '$CONFIG'" >&2; exit 2; }
GPUS=${SLURM_GPUS_ON_NODE:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

output_dir() {
    while [ $# -gt 0 ]; do
        case $1 in
        --output_dir) found=$2 ;;
        --output_dir=*) found=${1#*=} ;;
        esac
        shift
    done
    echo "${found:-}"
}
OUTPUT=$(output_dir "$@")
[ -n "$OUTPUT" ] || { echo "slurm.sh: give --output_dir" >&2; exit 2; }

# Launchers pass SIGTERM on. The processes agree on a step, save it and end within 30 seconds.
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1 TERM
rm -f "$OUTPUT/run_status.json" # left by the attempt before

# One launcher per node; all processes of a node are its children. With --resume a run that has no checkpoint starts new.
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} bash -c 'exec accelerate launch --config_file "$0" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$(($SLURM_NNODES * $1))" \
    --main_process_ip "$2" --main_process_port 29500 --rdzv_backend static \
    -m ijepa_transformers.cli pretrain --resume true "${@:3}"' "$CONFIG" "$GPUS" "$HEAD" "$@" &
step=$!

# A signal ends `wait`, not the step.
while true; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done
wait "$step" 2>/dev/null
last=$?
[ "$last" = 127 ] || code=$last # 127: the loop had waited for its end already

# A launcher has its own exit codes, so the run writes its status to a file.
if grep -q preempted "$OUTPUT/run_status.json" 2>/dev/null; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
