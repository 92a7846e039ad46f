#!/usr/bin/env bash
# Train on all GPUs of this machine.
#
#   bash launch/single_node.sh --config-file rn50_configs/single_gpu_100ep.yaml [more settings]
#
# CUDA_VISIBLE_DEVICES=0,1 picks GPUs, NPROC=2 the number of processes, by default one a GPU. Everything after the
# script's name goes to train_imagenet.py.
#
# A process that dies is started again, three times at most, with all others and from the last save. SIGTERM, SIGUSR1
# and Ctrl-C save the run where it stands; the exit status is then 75, after Ctrl-C 130, and the same command with
# --resume auto goes on. A mistake in the settings ends with 2 before anything is started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[ -x $python ] || { echo "single_node.sh: there is no .venv: run make setup first." >&2; exit 1; }
$python -m imagenet_training.recipe "$@" # here, since torchrun would start what fails of a mistake again and again

processes=${NPROC:-$($python -c 'import torch; print(torch.cuda.device_count())')}
if [ "$processes" -eq 0 ]; then
    echo "single_node.sh: PyTorch sees no GPU here (nvidia-smi shows what the driver sees)." >&2
    exit 1
fi

# torchrun ends its processes with status 1 whatever theirs is, so what it was told is remembered here. It is told once:
# a second signal would make it leave them behind.
stopped=
stop() {
    [ -n "$stopped" ] || kill -TERM "$torchrun"
    stopped=$1
}
set -m # a process group of its own, so that Ctrl-C comes here alone
$python -m torch.distributed.run --standalone --nproc_per_node="$processes" --max-restarts=3 train_imagenet.py "$@" &
torchrun=$!
trap 'stop 75' TERM USR1
trap 'stop 130' INT

status=0
wait "$torchrun" || status=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal ended the waiting, not torchrun
    status=0
    wait "$torchrun" || status=$?
done
[ "$status" -eq 0 ] || exit "${stopped:-$status}"
