"""What FFCV's loader gets wrong and what ours does instead: one table, the same probes run on both, each in a process.

Run as a script, ``python -m tests.test_faults stock|ours FOLDER``, this prints what every probe found, as JSON.
"""

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from ffcv_ops import beton
from tests.betons import photographs, spoil, write_images, write_tables

NUM_SAMPLES = 93

# Fault -> what is found with FFCV's loader, what is found with ours.
TABLE = {
    "an operation raises": ("hangs", "ZeroDivisionError"),
    "the file was never finished": ("opens", "ValueError"),
    "the file lacks its last 30 bytes": ("opens", "ValueError"),
    "a JPEG is corrupt": ("silent", "SampleError of sample 5"),
    "the same seed, once more": ("other pixels", "same pixels"),
    "an epoch is left 12 times": ("12 threads more", "0 threads more"),
    "12 batches are kept": ("5 different", "12 different"),
    "quasi-random order, distributed": ("NotImplementedError", "runs"),
    "validation of 93 samples on 4 ranks": ("96 seen, 93 different", "93 seen, 93 different"),
    "more workers than CPUs": ("ValueError", "runs"),
    "an epoch is resumed at batch 7": ("AttributeError", "same batches"),
    "an order of one's own, as a class": ("ValueError", "runs"),
    "an order of one's own, as an instance": ("TypeError", "runs"),
    "random order without the system's cache": ("holds 31 of 31 pages", "ValueError"),
    "memory for an image beside its result": ("12288 bytes a sample", "0 bytes a sample"),
    "the interpreter exits": ("numba's finalizers raise", ""),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    write_files(folder)
    root = Path(__file__).parent.parent
    processes = {
        which: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.test_faults", which, folder],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for which in ("stock", "ours")
    }
    findings = {}
    for which, process in processes.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        at_exit = "numba's finalizers raise" if "<finalize object" in err and "KeyError" in err else err
        findings[which] = {**json.loads(out.splitlines()[-1]), "the interpreter exits": at_exit}
    return findings


@pytest.mark.parametrize("fault", TABLE)
def test_fault(fault, found):
    assert (found["stock"][fault], found["ours"][fault]) == TABLE[fault]


def write_files(folder):
    images = photographs(NUM_SAMPLES)
    for name, per_page in (("good", 3), ("bad", 3), ("unfinished", None), ("cut", 3)):
        write_images(folder / f"{name}.beton", images, per_page=per_page)
    spoil(folder / "bad.beton", 5)
    with open(folder / "unfinished.beton", "r+b") as file:
        file.seek(beton.HEADER_TYPE.fields["alloc_table_ptr"][1])
        file.write(bytes(8))
    os.truncate(folder / "cut.beton", os.path.getsize(folder / "cut.beton") - 30)
    # 2 TiB that take no room on the disk: two samples in each page of 2 GiB, all else a hole.
    place = (1 + np.arange(2048) // 2) * (1 << 31) + 768 * (np.arange(2048) % 2)
    images = [np.zeros((16, 16, 3), np.uint8)] * len(place)
    write_tables(folder / "huge.beton", images, np.full(len(place), 768), place, True, None, page_size=1 << 31)


class Probes:
    """Questions to a loader; the answers are the table's words."""

    def __init__(self, which, folder):
        import torch
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader.loader import Loader as StockLoader
        from ffcv.transforms import Squeeze, ToTensor

        from ffcv_ops.crops import RandomResizedCrop
        from ffcv_ops.loader import Loader

        self.torch = torch
        self.ours = which == "ours"
        self.folder = folder
        self.loader = Loader if self.ours else StockLoader
        crop = (lambda: RandomResizedCrop(24)) if self.ours else (lambda: RandomResizedCropRGBImageDecoder((24, 24)))
        self.images = lambda: {"image": [crop(), ToTensor()], "label": None}
        self.labels = lambda *more: {"image": None, "label": [IntDecoder(), ToTensor(), Squeeze(1), *more]}

    def make(self, name="good", batch_size=8, num_workers=1, **arguments):
        return self.loader(str(self.folder / f"{name}.beton"), batch_size, num_workers, **arguments)

    def outcome(self, action):
        """Return what an action does within five seconds."""
        outcomes = ["hangs"]

        def act():
            try:
                outcomes[0] = action() or "runs"
            except Exception as error:
                samples = "".join(f" of sample {sample}" for sample, _ in getattr(error, "failures", ()))
                outcomes[0] = type(error).__name__ + samples

        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        thread.join(timeout=5)
        return outcomes[0]

    def answers(self):
        from ffcv.loader.loader import OrderOption

        order, instance = self.orders_of_ones_own()
        quasi = {"rank": 0, "world_size": 2} if self.ours else {}
        labels = self.labels
        return {
            "an operation raises": self.outcome(lambda: list(self.make(pipelines=labels(self.failing())))),
            "the file was never finished": self.outcome(lambda: self.make("unfinished") and "opens"),
            "the file lacks its last 30 bytes": self.outcome(lambda: self.make("cut") and "opens"),
            "a JPEG is corrupt": self.corrupt(),
            "the same seed, once more": self.seeds(),
            "an epoch is left 12 times": self.breaks(),
            "12 batches are kept": self.kept(),
            "quasi-random order, distributed": self.outcome(
                lambda: (
                    list(self.make(pipelines=labels(), order=OrderOption.QUASI_RANDOM, distributed=True, **quasi))
                    and None
                )
            ),
            "validation of 93 samples on 4 ranks": self.validation(),
            "more workers than CPUs": self.outcome(
                lambda: list(self.make(num_workers=os.cpu_count() + 1, pipelines=labels())) and None
            ),
            "an epoch is resumed at batch 7": self.outcome(self.resumed),
            "an order of one's own, as a class": self.outcome(
                lambda: list(self.make(pipelines=labels(), order=order)) and None
            ),
            "an order of one's own, as an instance": self.outcome(
                lambda: list(self.make(pipelines=labels(), order=instance)) and None
            ),
            "random order without the system's cache": self.outcome(self.pages),
            "memory for an image beside its result": self.scratch(),
        }

    def failing(self):
        from ffcv.transforms import ToTensor

        class Fail(ToTensor):
            def declare_state_and_memory(self, previous_state):
                return previous_state, None

            def generate_code(self):
                return lambda values, _: 1 / 0

        return Fail()

    def orders_of_ones_own(self):
        from ffcv.traversal_order.base import TraversalOrder

        class Backwards(TraversalOrder):
            def __init__(self, loader=None):
                if loader is not None:
                    super().__init__(loader)

            def sample_order(self, epoch):
                return np.arange(NUM_SAMPLES)[::-1]

        return Backwards, Backwards()

    def epoch_of_images(self, name="good"):
        return [batch[0].numpy().copy() for batch in self.make(name, pipelines=self.images(), seed=7)]

    def corrupt(self):
        try:
            self.epoch_of_images("bad")
        except Exception as error:
            return type(error).__name__ + "".join(f" of sample {sample}" for sample, _ in error.failures)
        return "silent"

    def seeds(self):
        first, again = self.epoch_of_images(), self.epoch_of_images()
        return "same pixels" if all(map(np.array_equal, first, again)) else "other pixels"

    def breaks(self):
        loader = self.make(batch_size=4, pipelines=self.labels())
        before = threading.active_count()
        for _ in range(12):
            for _ in loader:
                break
        deadline = threading.Event()
        for _ in range(20):
            if threading.active_count() <= before:
                break
            deadline.wait(0.05)
        return f"{threading.active_count() - before} threads more"

    def kept(self):
        copy = {"copy": True} if self.ours else {}
        loader = self.make(batch_size=7, pipelines=self.labels(), **copy)
        kept = [batch[0] for _, batch in zip(range(12), loader, strict=False)]
        return f"{len({tuple(batch.tolist()) for batch in kept})} different"

    def validation(self):
        from torch.testing._internal.distributed.fake_pg import FakeStore

        seen = []
        for rank in range(4):
            self.torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
            for (ids,) in self.make(pipelines=self.labels(), distributed=True, drop_last=False):
                seen += ids.tolist()
            self.torch.distributed.destroy_process_group()
        return f"{len(seen)} seen, {len(set(seen))} different"

    def resumed(self):
        loader = self.make(pipelines=self.labels(), seed=1)
        whole = [ids.tolist() for (ids,) in loader]
        return "same batches" if [ids.tolist() for (ids,) in loader.epoch(0, skip=7)] == whole[7:] else "other batches"

    def pages(self):
        from ffcv.loader.loader import OrderOption

        order = {"order": OrderOption.RANDOM, "seed": 0, "os_cache": False, "pipelines": self.labels()}
        if self.ours:
            return str(self.make("huge", batch_size=128, **order))
        iterator = iter(self.make(batch_size=31, **order))
        return f"holds {len(iterator.memory_context.memory)} of {-(-NUM_SAMPLES // 3)} pages"

    def scratch(self):
        loader = self.make(pipelines=self.images())
        if self.ours:
            list(loader)
            memory = loader._spare.memory
        else:
            memory = loader.graph.allocate_memory(8, 5)["operation"]
        parts = [part for parts in memory.values() for part in (parts if isinstance(parts, tuple) else (parts,))]
        total = sum(part.nbytes for part in parts if part is not None)
        return f"{total // (8 * 5) - 24 * 24 * 3} bytes a sample"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(Probes(sys.argv[1], Path(sys.argv[2])).answers()))
