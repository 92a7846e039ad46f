#!/usr/bin/env bash
# Train on all GPUs of this machine.
#
#   bash launch/single_node.sh --config-file rn50_configs/single_gpu_100ep.yaml [more settings]
#
# CUDA_VISIBLE_DEVICES=0,1 chooses the GPUs. NPROC=2 sets the number of processes, by default one for each GPU. All
# arguments go to train_imagenet.py.
#
# If a process dies, all processes are started again from the last checkpoint, at most three times. SIGTERM, SIGUSR1 and
# Ctrl-C save the run and end it. The exit status is then 75, or 130 after Ctrl-C. The same command with --resume auto
# resumes the run. A mistake in the settings ends with status 2 before any process is started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[ -x $python ] || { echo "single_node.sh: there is no .venv: run make setup first." >&2; exit 1; }
$python -m imagenet_training.planning.recipe "$@" # checks the settings: torchrun would start a run with a mistake four times

processes=${NPROC:-$($python -c 'import torch; print(torch.cuda.device_count())')}
if [ "$processes" -eq 0 ]; then
    echo "single_node.sh: PyTorch sees no GPU here (nvidia-smi shows what the driver sees)." >&2
    exit 1
fi

# torchrun exits with status 1 whatever the status of its processes is, so the status is kept here. torchrun gets only
# the first signal: after a second one, it would exit before its processes.
stopped=
stop() {
    [ -n "$stopped" ] || kill -TERM "$torchrun"
    stopped=$1
}
set -m # gives torchrun a process group of its own, so that only this script gets Ctrl-C
$python -m torch.distributed.run --standalone --nproc_per_node="$processes" --max-restarts=3 train_imagenet.py "$@" &
torchrun=$!
trap 'stop 75' TERM USR1
trap 'stop 130' INT

status=0
wait "$torchrun" || status=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal has ended the wait, but not torchrun
    status=0
    wait "$torchrun" || status=$?
done
[ "$status" -eq 0 ] || exit "${stopped:-$status}"
