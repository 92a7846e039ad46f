#!/usr/bin/env bash
# mosaicml (Composer) 0.32.1: with EMA in epochs, saving a checkpoint in the last batch of an epoch changes the training.
#
# For a checkpoint, EMA swaps its average into the model. It swaps back when the next batch begins. With an
# update_interval in epochs, the average is updated at the end of an epoch, which lies between the two if a checkpoint
# was saved in the last batch. Then the two have changed places: the weights that are trained move towards the average,
# and the average stays as it was. Training goes on from these weights. So the interval of checkpoints decides the model.
# An interval in epochs, such as 1ep, saves later and does no harm. With an update_interval in batches nothing changes.
#
# The documentation says that EMA "Maintains a set of weights that follow ... the training model weights".
#
# Expected: the same training, whenever checkpoints are saved.
# Seen (an epoch has 15 batches; distance: of the trained weights from those of the run without checkpoints, relative;
# loss: of the trained weights after seven epochs):
#   EMA(half_life="2ep", update_interval="1ep"), a checkpoint every epoch: distance 0.00, loss 1.03, without 1.03
#   EMA(half_life="2ep", update_interval="1ep"), a checkpoint every 15 batches: distance 0.34, loss 1.81, without 1.03
#   EMA(half_life="30ba", update_interval="15ba"), a checkpoint every 15 batches: distance 0.00, loss 1.03, without 1.03
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check mosaicml==0.32.1 torch==2.7.0 torchvision==0.22.0 \
    scikit-learn==1.7.2
cd "$folder"
cat >train.py <<'PYTHON'
import tempfile

import torch
from composer import Callback, Trainer
from composer.algorithms import EMA
from composer.models import ComposerClassifier
from sklearn.datasets import load_digits

torch.set_num_threads(1)
digits = load_digits()
images, labels = torch.tensor(digits.data[:1500], dtype=torch.float32) / 16, torch.tensor(digits.target[:1500])
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 100)


class Weights(Callback):
    """Notes the weights with which the last epoch begins to train."""

    def before_forward(self, state, logger):
        if state.timestamp.batch_in_epoch == 0:
            self.weights = torch.cat([part.detach().flatten().clone() for part in state.model.parameters()])
            with torch.no_grad():
                self.loss = torch.nn.functional.cross_entropy(state.model.module(images), labels).item()


def train(save_interval, **ema):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    noted = Weights()
    trainer = Trainer(
        model=ComposerClassifier(module, num_classes=10), optimizers=torch.optim.Adam(module.parameters(), lr=1e-3),
        train_dataloader=loader, max_duration="8ep", algorithms=[EMA(**ema)], callbacks=[noted], seed=0, device="cpu",
        save_folder=save_interval and tempfile.mkdtemp(dir="."), save_interval=save_interval or "1ep",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return noted


for what, interval, ema in (
    ("every epoch", "1ep", dict(half_life="2ep", update_interval="1ep")),
    ("every 15 batches", "15ba", dict(half_life="2ep", update_interval="1ep")),
    ("every 15 batches", "15ba", dict(half_life="30ba", update_interval="15ba")),
):
    without, saved = train(None, **ema), train(interval, **ema)
    distance = (saved.weights - without.weights).norm() / without.weights.norm()
    options = ", ".join(f'{name}="{value}"' for name, value in ema.items())
    losses = f"loss {saved.loss:.2f}, without {without.loss:.2f}"
    print(f"EMA({options}), a checkpoint {what}: distance {distance:.2f}, {losses}")
PYTHON
"$folder/venv/bin/python" -W ignore train.py 2>errors | tee seen || { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
EMA(half_life="2ep", update_interval="1ep"), a checkpoint every epoch: distance 0.00, loss 1.03, without 1.03
EMA(half_life="2ep", update_interval="1ep"), a checkpoint every 15 batches: distance 0.34, loss 1.81, without 1.03
EMA(half_life="30ba", update_interval="15ba"), a checkpoint every 15 batches: distance 0.00, loss 1.03, without 1.03
EXPECTED
