#!/usr/bin/env bash
# Train on all GPUs of this machine.
#
#   bash launch/single_node.sh --config-file rn50_configs/single_gpu_100ep.yaml [more settings]
#
# CUDA_VISIBLE_DEVICES=0,1 picks GPUs. Everything after the script's name goes to train_imagenet.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[ -x $python ] || { echo "single_node.sh: there is no .venv: run make setup first." >&2; exit 1; }

num_gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
if [ "$num_gpus" -eq 0 ]; then
    echo "single_node.sh: PyTorch sees no GPU here (nvidia-smi shows what the driver sees)." >&2
    exit 1
fi
exec $python -m torch.distributed.run --standalone --nproc_per_node="$num_gpus" train_imagenet.py "$@"
