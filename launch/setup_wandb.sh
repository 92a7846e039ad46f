#!/usr/bin/env bash
# Store a Weights & Biases API key for this machine: bash launch/setup_wandb.sh
#
# Asks for the key (https://wandb.ai/authorize), which `wandb` keeps in ~/.netrc. Not needed where WANDB_API_KEY is set.
# Without a key runs are recorded offline; `wandb sync` uploads them later. For a server of your own: WANDB_BASE_URL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -x .venv/bin/wandb ] || { echo "setup_wandb.sh: there is no .venv: run make setup first." >&2; exit 1; }
if [ -n "${WANDB_API_KEY:-}" ]; then
    echo "setup_wandb.sh: WANDB_API_KEY is set, and runs use it; there is nothing to store."
    exit
fi
if [ ! -t 0 ]; then
    echo "setup_wandb.sh: there is no terminal to ask for the key: set WANDB_API_KEY instead." >&2
    exit 1
fi
exec .venv/bin/wandb login "$@"
