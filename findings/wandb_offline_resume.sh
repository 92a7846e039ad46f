#!/usr/bin/env bash
# wandb 0.31.0: an offline run that is resumed begins at step 0 again, and resume="must" accepts an id that never was.
#
# Online, resume="must" raises an error if there is no run of that id, and run.step goes on behind the last step. Offline
# no error is raised, run.resumed is False, and run.step is 0, although the folder holds the earlier part with the same
# id. A script that counts with run.step records its first steps a second time. `wandb sync --append`, which joined such
# parts, is no option any more.
#
# Output seen:
#   never seen before: resumed False, step 0
#   after five steps: resumed False, step 0
#   wandb sync has no --append
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check wandb==0.31.0
cd "$folder"
cat >resume.py <<'PYTHON'
import wandb

for when in ("never seen before", "after five steps"):
    run = wandb.init(mode="offline", project="p", id="a1b2c3", resume="must", settings=wandb.Settings(silent=True))
    print(f"{when}: resumed {run.resumed}, step {run.step}", flush=True)
    for step in range(5):
        run.log({"loss": 1.0}, step=step)
    run.finish()
PYTHON
WANDB_SILENT=true "$folder/venv/bin/python" resume.py | tee seen
"$folder/venv/bin/wandb" sync --help | grep -q -- --append || echo "wandb sync has no --append" | tee -a seen
diff seen - <<'EXPECTED'
never seen before: resumed False, step 0
after five steps: resumed False, step 0
wandb sync has no --append
EXPECTED
