#!/usr/bin/env bash
# accelerate 1.15.0: batches of an IterableDataset in channels_last reach all processes but the first scrambled.
#
# For an IterableDataset, `prepare` by default reads all batches in the main process and broadcasts them
# (dispatch_batches). The others receive into empty tensors in the contiguous format. torch.distributed copies memory
# as it lies, and compares neither strides nor formats. The bytes of a channels_last batch, pixel by pixel, are then
# read as channel by channel. Shapes and labels are right, so the training goes on, with noise on 7 of 8 GPUs.
# Validation through such a loader is wrong in the same way. Collate functions and loaders that store batches in
# channels_last save the conversion on the device.
#
# That the collectives ignore strides has been known since 2021 (https://github.com/pytorch/pytorch/issues/62283). No
# report about accelerate was found. Convert to channels_last after the loader, or use dispatch_batches=False.
#
# Expected: every process gets its half of the images as they are.
# Seen (64 images, two processes with gloo):
#   contiguous: right images of process 0: 32 of 32, of process 1: 32 of 32
#   channels_last: right images of process 0: 32 of 32, of process 1: 0 of 32
#   channels_last, dispatch_batches=False: right images of process 0: 32 of 32, of process 1: 32 of 32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6 accelerate==1.15.0
cd "$folder"
cat >dispatch.py <<'PYTHON'
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

images = torch.randint(0, 256, (64, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Numbered(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(images, range(len(images))))


def show(what, memory_format, **options):
    def collate(samples):
        batch, numbers = torch.utils.data.default_collate(samples)
        return batch.to(memory_format=memory_format), numbers

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    loader = accelerator.prepare(torch.utils.data.DataLoader(Numbered(), batch_size=4, collate_fn=collate))
    right = [torch.equal(image, images[number]) for batch, numbers in loader for image, number in zip(batch, numbers)]
    counts = [None] * accelerator.num_processes
    dist.all_gather_object(counts, f"{sum(right)} of {len(right)}")
    if accelerator.is_main_process:
        print(f"{what}: right images of process 0: {counts[0]}, of process 1: {counts[1]}")


show("contiguous", torch.contiguous_format)
show("channels_last", torch.channels_last)
show("channels_last, dispatch_batches=False", torch.channels_last, dispatch_batches=False)
dist.destroy_process_group()
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc_per_node=2 dispatch.py 2>errors | tee seen ||
    { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
contiguous: right images of process 0: 32 of 32, of process 1: 32 of 32
channels_last: right images of process 0: 32 of 32, of process 1: 0 of 32
channels_last, dispatch_batches=False: right images of process 0: 32 of 32, of process 1: 32 of 32
EXPECTED
