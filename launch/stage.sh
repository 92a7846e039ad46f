#!/usr/bin/env bash
# Copy a .beton file and its manifest from a shared file system to a local disk, checked by the manifest's digest.
#
#   bash launch/stage.sh /fsx/ns1/train.beton /scratch
#   srun --ntasks-per-node=1 bash launch/stage.sh /fsx/ns1/train.beton /scratch     # on every node of a Slurm job
#
# The copy gets its name when it is whole. Killed at any moment, the same command goes on where it was; where the copy is
# there already, it says so and is done. Several at once on one machine wait for each other. Prints the setting that
# makes a run read the copy, --data.train_dataset=/scratch/train.beton, on stdout, and all else on stderr.
#
# Exit status: 0 the copy is there; 1 stopped under way, by a damaged page too; 2 something to put right first; 130
# Ctrl-C; 143 SIGTERM.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || { echo "stage.sh: there is no .venv: run make setup first." >&2; exit 2; }
PYTHONPATH=$root exec "$python" "$root/launch/stage.py" "$@"
