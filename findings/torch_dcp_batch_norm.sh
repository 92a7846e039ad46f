#!/usr/bin/env bash
# PyTorch 2.14.1: a distributed checkpoint mixes the batch norms of the ranks: mean of one, variance of another.
#
# torch.distributed.checkpoint takes tensors that are no DTensors for equal on all ranks, and writes each of them from
# the rank that has the least to write. The running means and variances of a batch norm are not equal. FSDP2 never
# exchanges them. DDP does before a forward pass in training, so at a save they differ by the last step. With two ranks
# the file has layers of both. From three ranks on, the mean and the variance of one layer can come from two ranks. A
# network with such statistics never existed. The run was evaluated with others, and a resumed run is not the one that
# was interrupted.
#
# The difference counts where the ranks see different images, such as contiguous shares of a dataset that is sorted by
# class. No report was found. With planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True) all statistics are those
# of rank 0. Or broadcast the buffers before a save.
#
# Expected: the statistics of rank 0, and its accuracy.
# Seen (a network with four batch norms, three processes with gloo, each with its own classes of the digits):
#   DDP: statistics of ranks 0, 1, 2, mean and variance of different ranks in 1 of 4 layers
#   FSDP2: statistics of ranks 1, 2, mean and variance of different ranks in 4 of 4 layers
#   FSDP2: accuracy of rank 0 before the save 97, after loading 91
#   FSDP2, dedup_save_to_lowest_rank: statistics of ranks 0, mean and variance of different ranks in 0 of 4 layers
#   FSDP2, dedup_save_to_lowest_rank: accuracy of rank 0 before the save 97, after loading 97
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6 scikit-learn==1.9.1
cd "$folder"
cat >statistics_of.py <<'PYTHON'
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
sorted_ids = labels[:1500].sort(stable=True).indices
own_ids = sorted_ids.tensor_split(ranks)[rank]


def build(kind):
    """Return the plain network, and the network as it is trained."""
    torch.manual_seed(0)
    layers = []
    for i in range(4):
        conv = torch.nn.Conv2d(16 if i else 1, 16, 3, padding=1, bias=False)
        layers.append(torch.nn.Sequential(conv, torch.nn.BatchNorm2d(16), torch.nn.ReLU()))
    head = torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(64, 10)
    network = torch.nn.Sequential(*layers, *head)
    if kind == "DDP":
        return network, torch.nn.parallel.DistributedDataParallel(network)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return network, fully_shard(network, mesh=mesh)


def statistics(network):
    return {name: value.clone() for name, value in network.state_dict().items() if "running" in name}


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return 100 * (model(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()


def show(kind, option=None):
    network, model = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(200):
        batch = own_ids[torch.randint(len(own_ids), (32,), generator=generator)]
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    of_ranks = [None] * ranks
    dist.all_gather_object(of_ranks, statistics(network))
    before = accuracy(model) if kind == "FSDP2" else None  # DDP would exchange the statistics

    file = f"{kind} {option}"
    planner = dcp.DefaultSavePlanner(**{option: True}) if option else None
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=file, planner=planner)
    network, model = build(kind)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=file)
    set_model_state_dict(model, state["model"])

    sources = {}
    for name, value in statistics(network).items():
        (sources[name],) = (i for i in range(ranks) if torch.equal(value, of_ranks[i][name]))
    means = [name for name in sources if name.endswith("mean")]
    mixed = sum(sources[name] != sources[name.replace("mean", "var")] for name in means)
    after = accuracy(model) if kind == "FSDP2" else None
    if rank == 0:
        what = f"{kind}, {option}" if option else kind
        found = ", ".join(str(source) for source in sorted(set(sources.values())))
        layers = f"{mixed} of {len(means)} layers"
        print(f"{what}: statistics of ranks {found}, mean and variance of different ranks in {layers}")
        if before is not None:
            print(f"{what}: accuracy of rank 0 before the save {before:.0f}, after loading {after:.0f}")


show("DDP")
show("FSDP2")
show("FSDP2", "dedup_save_to_lowest_rank")
dist.destroy_process_group()
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc_per_node=3 statistics_of.py 2>errors | tee seen ||
    { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
DDP: statistics of ranks 0, 1, 2, mean and variance of different ranks in 1 of 4 layers
FSDP2: statistics of ranks 1, 2, mean and variance of different ranks in 4 of 4 layers
FSDP2: accuracy of rank 0 before the save 97, after loading 91
FSDP2, dedup_save_to_lowest_rank: statistics of ranks 0, mean and variance of different ranks in 0 of 4 layers
FSDP2, dedup_save_to_lowest_rank: accuracy of rank 0 before the save 97, after loading 97
EXPECTED
