#!/usr/bin/env bash
# PyTorch 2.14.1: set_model_state_dict with broadcast_from_rank0 scrambles the weights of convolutions in channels_last.
#
# The option is the documented way to load a checkpoint that only rank 0 has read. The other ranks receive each tensor
# into an empty one in the contiguous format, and the broadcast copies memory as it lies. A checkpoint of a network
# that was trained in channels_last has these strides. Its convolution weights then come with their elements in another
# order, and all shapes are right. Of a plain module, or one in DistributedDataParallel, rank 0 has the right weights
# and the others do not. DDP broadcasts weights only when it is built, so the ranks train different networks from then
# on. Under FSDP2 each rank has a part of each weight, so the whole network is wrong, also on rank 0.
#
# That collectives ignore strides is known (https://github.com/pytorch/pytorch/issues/62283), and NVIDIA's PhysicsNeMo
# works around this case (https://github.com/NVIDIA/physicsnemo/pull/1614). No report to PyTorch was found. Make the
# tensors contiguous on rank 0 before: {name: value.contiguous() for name, value in state.items()}.
#
# Expected: the logits of the checkpoint on both ranks.
# Seen (a ResNet-18, two processes with gloo; "wrong" is a difference of more than 0.1 in a logit, of up to 2):
#   module, checkpoint contiguous: rank 0 right, rank 1 right
#   module, checkpoint in channels_last: rank 0 right, rank 1 wrong
#   DDP, checkpoint contiguous: rank 0 right, rank 1 right
#   DDP, checkpoint in channels_last: rank 0 right, rank 1 wrong
#   FSDP2, checkpoint contiguous: rank 0 right, rank 1 right
#   FSDP2, checkpoint in channels_last: rank 0 wrong, rank 1 wrong
#   FSDP2, made contiguous before: rank 0 right, rank 1 right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
cd "$folder"
cat >load.py <<'PYTHON'
import torch
import torch.distributed as dist
import torchvision
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def resnet(seed):
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=10)


def show(what, wrap, memory_format, prepare=lambda value: value):
    trained = resnet(0).to(memory_format=memory_format)
    if rank == 0:
        torch.save(trained.state_dict(), "checkpoint")
    state = {name: prepare(value) for name, value in torch.load("checkpoint").items()} if rank == 0 else {}
    model = wrap(resnet(1))
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    with torch.no_grad():
        difference = (model.eval()(images) - trained.eval()(images)).abs().max().item()
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, "right" if difference < 1e-4 else "wrong" if difference > 0.1 else str(difference))
    if rank == 0:
        print(f"{what}: rank 0 {found[0]}, rank 1 {found[1]}")


def shard(model):
    return fully_shard(model, mesh=mesh)


kinds = {"module": lambda model: model, "DDP": torch.nn.parallel.DistributedDataParallel, "FSDP2": shard}
for kind, wrap in kinds.items():
    show(f"{kind}, checkpoint contiguous", wrap, torch.contiguous_format)
    show(f"{kind}, checkpoint in channels_last", wrap, torch.channels_last)
show("FSDP2, made contiguous before", shard, torch.channels_last, torch.Tensor.contiguous)
dist.destroy_process_group()
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc_per_node=2 load.py 2>errors | tee seen ||
    { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
module, checkpoint contiguous: rank 0 right, rank 1 right
module, checkpoint in channels_last: rank 0 right, rank 1 wrong
DDP, checkpoint contiguous: rank 0 right, rank 1 right
DDP, checkpoint in channels_last: rank 0 right, rank 1 wrong
FSDP2, checkpoint contiguous: rank 0 right, rank 1 right
FSDP2, checkpoint in channels_last: rank 0 wrong, rank 1 wrong
FSDP2, made contiguous before: rank 0 right, rank 1 right
EXPECTED
