#!/usr/bin/env bash
# PyTorch 2.14.1: DistributedDataParallel with static_graph=True fails at the first backward pass under no_sync().
#
# static_graph saves time where every step has the same graph, and no_sync() is how gradients of several batches are
# accumulated. Together they end in an internal assertion, which asks for a bug report and does not name either of them.
# Without static_graph the gradients are the sums that they should be.
#
# Output seen (torch 2.14.1, two processes with gloo):
#   static_graph=False, no_sync for 0 of 1 batches: gradients right
#   static_graph=False, no_sync for 1 of 2 batches: gradients right
#   static_graph=True, no_sync for 0 of 1 batches: gradients right
#   static_graph=True, no_sync for 1 of 2 batches: RuntimeError of an internal assertion
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$folder"
cat >accumulate.py <<'PYTHON'
import contextlib
import copy

import torch
import torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()


def images(number, of_rank):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * number + of_rank))


def try_out(static_graph, num_batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    expected = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model, static_graph=static_graph)
    for number in range(num_batches):
        for of_rank in range(world_size):
            (expected(images(number, of_rank)).square().sum() / world_size).backward()
        with wrapped.no_sync() if number < num_batches - 1 else contextlib.nullcontext():
            wrapped(images(number, rank)).square().sum().backward()
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5) for a, b in pairs)


for static_graph in (False, True):
    for num_batches in (1, 2):
        try:
            result = "gradients right" if try_out(static_graph, num_batches) else "gradients wrong"
        except RuntimeError as error:
            result = "RuntimeError" + " of an internal assertion" * ("INTERNAL ASSERT" in str(error))
        if rank == 0:
            print(f"static_graph={static_graph}, no_sync for {num_batches - 1} of {num_batches} batches: {result}", flush=True)
        dist.barrier()
dist.destroy_process_group()
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --nproc_per_node=2 accumulate.py 2>errors | tee seen || { cat errors; exit 1; }
diff seen - <<'EXPECTED'
static_graph=False, no_sync for 0 of 1 batches: gradients right
static_graph=False, no_sync for 1 of 2 batches: gradients right
static_graph=True, no_sync for 0 of 1 batches: gradients right
static_graph=True, no_sync for 1 of 2 batches: RuntimeError of an internal assertion
EXPECTED
