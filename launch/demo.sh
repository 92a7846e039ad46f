#!/usr/bin/env bash
# The whole job on handwritten digits, from image folder to accuracy: make demo
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

run python launch/make_digits.py demo
run python write_beton.py --split train --source demo/train --target demo/train.beton --overwrite
run python write_beton.py --split val --source demo/val --target demo/val.beton --overwrite
run python train_imagenet.py --config-file rn50_configs/demo.yaml

cat <<'EOT'

Made in demo/: the digits as image folders (train/, val/), as .beton files with their manifests, and the run:
its log, record and curve (logs/), its checkpoints and exported weights (checkpoints/).

Next, on ImageNet:
  source .venv/bin/activate
  python write_beton.py --split train --source /data/imagenet/train --target /data/imagenet/train.beton
  python write_beton.py --split val   --source /data/imagenet/val   --target /data/imagenet/val.beton
  python train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml \
      --data.train_dataset=/data/imagenet/train.beton --data.val_dataset=/data/imagenet/val.beton
EOT
