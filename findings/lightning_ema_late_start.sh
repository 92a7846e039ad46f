#!/usr/bin/env bash
# lightning 2.6.6, EMAWeightAveraging: before update_starting_at_step all results are of the random initial weights, and
# update_starting_at_epoch does not delay the average.
#
# The average begins as a copy of the model from before the training. Until the first update it is this copy, but the
# callback uses it in three places. Validation runs with it, which is known and open:
# https://github.com/Lightning-AI/pytorch-lightning/issues/21724. The `state_dict` of every checkpoint is it, so
# `load_from_checkpoint` of the best or last one returns weights that were never trained. And when fit ends before that step, the trained weights are replaced by it, and lost. Another run with
# fewer images or larger batches has fewer steps, and then returns its own start.
#
# update_starting_at_epoch has no such effect, because it has hardly any: the updates after each step begin at once. From
# the given epoch on, each epoch only adds one update more.
#
# Expected: results of the trained weights, and with update_starting_at_epoch=3 no update in the epochs 0, 1, 2.
# Seen (an epoch has 15 steps; accuracies in percent):
#   no delay: validation in epoch 5 86, checkpoint of epoch 5 86, model after fit 86
#   update_starting_at_step=1000: validation in epoch 5 10, checkpoint of epoch 5 10, model after fit 10
#   update_starting_at_step=1000: the model that was trained 86, checkpoint as the initial weights True
#   update_starting_at_epoch=3: updates up to each epoch 15 30 45 61 77 93
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6 lightning==2.6.6 \
    scikit-learn==1.9.1
cd "$folder"
cat >train.py <<'PYTHON'
import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from sklearn.datasets import load_digits

torch.set_num_threads(1)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
training, validation = (
    torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images[part], labels[part]), 100)
    for part in (slice(1500), slice(1500, None))
)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        self.logged = []

    def training_step(self, batch, number):
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, number):
        correct = (self.model(batch[0]).argmax(1) == batch[1]).float()
        self.log("accuracy", correct.mean(), batch_size=len(correct))

    def on_validation_epoch_end(self):
        self.logged.append(100 * self.trainer.callback_metrics["accuracy"].item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def accuracy(weights):
    model = Classifier()
    model.load_state_dict(weights)
    with torch.no_grad():
        return 100 * (model.model(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()


class AtEpochEnd(lightning.Callback):
    def __init__(self, average):
        self.average, self.updates = average, []

    def on_train_epoch_end(self, trainer, model):
        self.updates.append(int(self.average._average_model.n_averaged))
        trainer.save_checkpoint("last.ckpt")


def train(**options):
    lightning.seed_everything(0, verbose=False)
    model = Classifier()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    average = EMAWeightAveraging(decay=0.9, **options)
    noted = AtEpochEnd(average)
    trainer = lightning.Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[average, noted],
    )
    trainer.fit(model, training, validation)
    return initial, model, torch.load("last.ckpt", weights_only=True), noted.updates


for what, options in (("no delay", {}), ("update_starting_at_step=1000", {"update_starting_at_step": 1000})):
    initial, model, checkpoint, _ = train(**options)
    found = accuracy(checkpoint["state_dict"]), accuracy(model.state_dict())
    print(f"{what}: validation in epoch 5 {model.logged[-1]:.0f}, checkpoint of epoch 5 {found[0]:.0f}, "
          f"model after fit {found[1]:.0f}")
same = all(torch.equal(checkpoint["state_dict"][name], initial[name]) for name in initial)
print(f"{what}: the model that was trained {accuracy(checkpoint['current_model_state']):.0f}, "
      f"checkpoint as the initial weights {same}")
_, _, _, updates = train(update_starting_at_epoch=3)
print("update_starting_at_epoch=3: updates up to each epoch", *updates)
PYTHON
"$folder/venv/bin/python" -W ignore train.py 2>errors | grep -E "^(no delay|update)" | tee seen || { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
no delay: validation in epoch 5 86, checkpoint of epoch 5 86, model after fit 86
update_starting_at_step=1000: validation in epoch 5 10, checkpoint of epoch 5 10, model after fit 10
update_starting_at_step=1000: the model that was trained 86, checkpoint as the initial weights True
update_starting_at_epoch=3: updates up to each epoch 15 30 45 61 77 93
EXPECTED
