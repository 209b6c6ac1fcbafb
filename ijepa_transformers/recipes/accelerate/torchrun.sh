#!/usr/bin/env bash
# Pretraining on several nodes without Slurm: DDP through torchrun, started on every node.
#
#     ijepa recipes copy accelerate/torchrun.sh
#     NODES=2 NODE=0 HEAD=10.0.0.1 bash torchrun.sh --recipe vit_base16_in1k --data ...
#
# NODE is the number of this node, HEAD the address of node 0. With one node leave both out.
set -euo pipefail
export ACCELERATE_MIXED_PRECISION=${PRECISION:-bf16}
exec torchrun --nnodes "${NODES:-1}" --node_rank "${NODE:-0}" --nproc_per_node "${GPUS:-gpu}" \
    --master_addr "${HEAD:-127.0.0.1}" --master_port "${PORT:-29500}" \
    -m ijepa_transformers.cli pretrain --resume true "$@"
