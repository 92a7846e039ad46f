#!/usr/bin/env bash
# Run the whole job on handwritten digits, from image folders to accuracy: make demo
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

run python launch/make_digits.py demo/digits
for split in train val; do
    run python write_beton.py --split $split --source demo/digits/$split --target demo/digits/$split.beton --overwrite
done
run python train_imagenet.py --config-file rn50_configs/demo.yaml

cat <<'END'

These folders are new:
  demo/digits/  the digits as image folders, and as .beton files with their manifests
  demo/run/     the run: report.html; log, record and curve in logs/; checkpoints and exported weights in checkpoints/

The same steps for ImageNet:
  source .venv/bin/activate
  python write_beton.py --split train --source /data/imagenet/train --target /data/imagenet/train.beton
  python write_beton.py --split val --source /data/imagenet/val --target /data/imagenet/val.beton
  python train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml \
      --data.train_dataset=/data/imagenet/train.beton --data.val_dataset=/data/imagenet/val.beton
END
