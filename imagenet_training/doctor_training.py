"""What the doctor looks at on the way from batch to checkpoint.

A check yields (status, name, text) or (status, name, text, remedy).
"""

import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

Findings = Iterator[tuple[str, ...]]


def check_training(options: Any) -> Findings:
    """All checks of this file; together, because importing PyTorch is what takes them time."""
    yield from check_models()
    yield from check_network()
    yield from check_wandb()


def check_models() -> Findings:
    """torchvision's import, which fails where it was built for another PyTorch."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        text = f"torchvision {version('torchvision')} with PyTorch {version('torch')}: {error}".splitlines()[0]
        pip = f"{sys.executable} -m pip"
        yield "error", "models", text, f"{pip} install --force-reinstall torchvision torch=={version('torch')}"
        return
    yield "ok", "models", f"torchvision {version('torchvision')}, timm {version('timm')}"


def check_wandb() -> Findings:
    """Whether runs go to Weights & Biases or stay here."""
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode != "online":
        yield "ok", "W&B", f"WANDB_MODE={mode}"
        return
    from imagenet_training.logs import has_wandb_key

    if has_wandb_key():
        yield "ok", "W&B", "there is an API key"
    else:
        text = "no API key: runs are recorded offline, for `wandb sync` to upload later"
        yield "warning", "W&B", text, "bash launch/setup_wandb.sh, or --no_wandb to record nothing"


def check_network() -> Findings:
    """NCCL, and Amazon's EFA beneath it, where there are several GPUs."""
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    apart = [number for number in range(1, num_gpus) if not torch.cuda.can_device_access_peer(0, number)]
    if apart:
        text = f"{version}; GPU 0 cannot reach the memory of GPU {', '.join(map(str, apart))}: they exchange slower"
        yield "warning", "NCCL", text, "nvidia-smi topo -p2p r  # in a virtual machine: have ACS turned off"
    else:
        yield "ok", "NCCL", f"{version}; {num_gpus} GPUs reach each other's memory"
    adapters = efa_adapters(Path("/sys/class/infiniband"))
    if adapters and not has_efa_plugin():
        text = f"{len(adapters)} adapters, but NCCL's plugin for them is not found: it would use TCP"
        yield "warning", "EFA", text, "install aws-ofi-nccl, and have LD_LIBRARY_PATH name its lib folder"
    elif adapters:
        yield "ok", "EFA", f"{len(adapters)} adapters, and NCCL's plugin for them"


def efa_adapters(devices: Path) -> list[str]:
    """Names of the network devices in a folder such as /sys/class/infiniband that EFA's driver drives."""
    links = [device / "device" / "driver" for device in sorted(devices.glob("*"))]
    return [link.parents[1].name for link in links if link.exists() and link.resolve().name == "efa"]


def has_efa_plugin() -> bool:
    """Whether NCCL would find aws-ofi-nccl: on LD_LIBRARY_PATH, or where Amazon's images have it."""
    folders = [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), "/opt/amazon/ofi-nccl/lib", "/opt/aws-ofi-nccl/lib"]
    return any(list(Path(folder).rglob("libnccl-net*.so*")) for folder in folders if folder and Path(folder).is_dir())
