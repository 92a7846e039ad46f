"""What FFCV's loader gets wrong and what ours does instead: one table, the same probes run on both, each in a process.

Run as a script, ``python -m tests.test_faults stock|ours FOLDER``, this prints what every probe found, as JSON.
"""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from ffcv_ops.beton import layout as beton
from tests.betons import photographs, spoil, write_images, write_tables

pytestmark = pytest.mark.slow

NUM_SAMPLES = 93


class Seen(str):
    """The behaviour of stock FFCV, seen by hand. These probes run with ours only.

    The versions were ffcv 1.0.2, numba 0.68, numpy 2.4, torch 2.14 and Python 3.11.
    """


# Fault -> what is found with FFCV, what is found with ours. Two of FFCV's faults are not here: FFCV's writer has no
# option to continue after a kill (ours: test_write_beton.py), and ffcv-imagenet's script has neither seed, nor resume,
# nor a training loss (ours: test_train.py). The script's rule for weight decay is written out below.
TABLE = {
    "files written by 1 and by 2 workers": ("different bytes", "same bytes"),
    "an image cannot be written": (Seen("its worker ends, and the writer waits for the worker for ever"), "BadImage"),
    "an operation raises": (Seen("the loader's thread ends, and the loop waits for ever"), "ZeroDivisionError"),
    "the file was never finished": ("opens", "UserError"),
    "the file lacks its last 30 bytes": ("opens", "UserError"),
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
    "random order without the system's cache": ("holds 31 of 31 pages", "UserError"),
    "memory for an image beside its result": ("12288 bytes a sample", "0 bytes a sample"),
    "mixup of two samples of one class": ("mass 0.3", "mass 1.0"),
    "mixup of a batch in another epoch": ("same lambda", "other lambda"),
    "CutMix": ("AttributeError", "runs"),
    "RandAugment": ("AttributeError", "runs"),
    "normalisation on a GPU, without cupy": ("ModuleNotFoundError", "runs"),
    "normalisation to bfloat16": ("TypeError", "runs"),
    "norm layers of ResNet-50 under weight decay": ("4 of 53", "0 of 53"),
    "a kernel calls one compiled before the loader was made": ("KeyError", "runs"),
    "Python has no distutils": ("ModuleNotFoundError", "runs"),
    "the interpreter exits": ("numba's finalizers raise", ""),
    "the interpreter exits after a fork on one CPU": (Seen("with TBB, the exit waits for ever"), "runs"),
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
            env={**os.environ, "PYTHONHASHSEED": "0"},  # on which it depends what goes wrong at FFCV's exit
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for which in ("stock", "ours")
    }
    findings = {}
    for which, process in processes.items():
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        at_exit = "numba's finalizers raise" if "<finalize object" in err and "KeyError" in err else err
        findings[which] = {**json.loads(out.splitlines()[-1]), "the interpreter exits": at_exit}
        findings[which]["Python has no distutils"] = without_distutils(which)
    findings["ours"]["the interpreter exits after a fork on one CPU"] = exit_after_fork()
    return findings


def without_distutils(which):
    """Import the loader where distutils is found by none but setuptools, as from Python 3.12 on."""
    script = """
        import sys

        class Without:
            def __init__(self, finder):
                self.finder = finder
            def find_spec(self, name, path=None, target=None):
                return None if name == "distutils" else self.finder.find_spec(name, path, target)

        # Installed, setuptools provides distutils before anybody imports it; FFCV does not ask for it to be installed.
        finders = [finder for finder in sys.meta_path if type(finder).__name__ != "DistutilsMetaFinder"]
        sys.meta_path = [Without(finder) for finder in finders]
        try:
            __import__({"stock": "ffcv.loader", "ours": "ffcv_ops.loading.loader"}[sys.argv[1]])
        except ModuleNotFoundError as error:
            assert error.name == "distutils", error
            print(type(error).__name__)
        else:
            print("runs")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), which],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def exit_after_fork():
    """Import our loader on one CPU, fork as many a library does, and exit within 8 seconds."""
    script = """
        import os

        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        import ffcv_ops.loading.loader

        if os.fork() == 0:
            os._exit(0)
        print("leaves", flush=True)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "leaves\n"
        try:
            assert process.wait(timeout=8) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            return "hangs"
    return "runs"


@pytest.mark.parametrize("fault", TABLE)
def test_fault(fault, found):
    stock, ours = TABLE[fault]
    assert found["ours"][fault] == ours
    if not isinstance(stock, Seen):
        assert found["stock"][fault] == stock


def write_files(folder):
    images = photographs(NUM_SAMPLES)
    for name, per_page in (("good", 3), ("bad", 3), ("unfinished", None), ("cut", 3)):
        write_images(folder / f"{name}.beton", images, per_page=per_page)
    spoil(folder / "bad.beton", 5)
    with open(folder / "unfinished.beton", "r+b") as file:
        file.seek(beton.HEADER_TYPE.fields["alloc_table_ptr"][1])
        file.write(bytes(8))
    os.truncate(folder / "cut.beton", os.path.getsize(folder / "cut.beton") - 30)
    for number, image in enumerate(images[:12]):
        for name in ("images", "bad_images"):
            (folder / name / "class").mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(folder / name / "class" / f"{number:02d}.png"), image)
    (folder / "bad_images" / "class" / "07.png").write_bytes(b"no image")
    # 2 TiB that take no room on the disk: two samples in each page of 2 GiB, all else a hole.
    place = (1 + np.arange(2048) // 2) * (1 << 31) + 768 * (np.arange(2048) % 2)
    images = [np.zeros((16, 16, 3), np.uint8)] * len(place)
    write_tables(folder / "huge.beton", images, np.full(len(place), 768), place, True, None, page_size=1 << 31)


class Pictures:
    """The images of a folder, for FFCV's writer; each of its processes waits until all have begun."""

    def __init__(self, folder, num_workers):
        self.paths = sorted(folder.glob("class/*"))
        self.begin = multiprocessing.Barrier(num_workers)
        self.has_begun = False

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        if not self.has_begun:
            self.begin.wait()
            self.has_begun = True
        return cv2.imread(str(self.paths[index]))[:, :, ::-1], 0


class Probes:
    """Questions to a loader; the answers are the table's words."""

    def __init__(self, which, folder):
        import torch
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader.loader import Loader as StockLoader
        from ffcv.transforms import Squeeze, ToTensor

        self.torch = torch
        self.ours = which == "ours"
        self.folder = folder
        self.loader = self.stock_loader = StockLoader
        if self.ours:  # stock's faults are to be seen as they are without us
            from ffcv_ops.loading.loader import Loader
            from ffcv_ops.operations.crops import RandomResizedCrop

            self.loader = Loader
        crop = (lambda: RandomResizedCrop(24)) if self.ours else (lambda: RandomResizedCropRGBImageDecoder((24, 24)))
        self.images = lambda: {"image": [crop(), ToTensor()], "label": None}
        self.labels = lambda *more: {"image": None, "label": [IntDecoder(), ToTensor(), Squeeze(1), *more]}

    def make(self, name="good", batch_size=8, num_workers=1, **arguments):
        return self.loader(str(self.folder / f"{name}.beton"), batch_size, num_workers, **arguments)

    def outcome(self, action):
        """Return what an action returns, or the name of the exception that it raises."""
        try:
            return action() or "runs"
        except Exception as error:
            samples = "".join(f" of sample {sample}" for sample, _ in getattr(error, "failures", ()))
            return type(error).__name__ + samples

    def answers(self):
        from ffcv.loader.loader import OrderOption

        order, instance = self.orders_of_ones_own()
        quasi = {"rank": 0, "world_size": 2} if self.ours else {}
        labels = self.labels
        return {
            # First, so that FFCV's writer forks a process without threads.
            "files written by 1 and by 2 workers": self.written(),
            **(self.answers_of_ours() if self.ours else {}),
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
            "mixup of two samples of one class": self.mass(),
            "mixup of a batch in another epoch": self.lambdas(),
            "CutMix": self.outcome(lambda: self.operation("CutMix", cutmix_alpha=1.0) and None),
            "RandAugment": self.outcome(lambda: self.operation("RandAugment", config="rand-m7-mstd0.5-inc1") and None),
            "normalisation on a GPU, without cupy": self.outcome(lambda: self.normalize(np.float32) and None),
            "normalisation to bfloat16": self.outcome(lambda: self.normalize(self.torch.bfloat16) and None),
            "norm layers of ResNet-50 under weight decay": self.decayed(),
            "a kernel calls one compiled before the loader was made": self.outcome(self.kernels),
        }

    def answers_of_ours(self):
        """Ask what only our writer and loader are asked (see `Seen`)."""
        from ffcv_ops import ToTensor

        class Fail(ToTensor):
            def declare_state_and_memory(self, previous_state):
                return previous_state, None

            def generate_code(self):
                return lambda values, _: 1 / 0

        return {
            "an image cannot be written": self.outcome(lambda: self.write_ours("bad_images", 1) and "writes"),
            "an operation raises": self.outcome(lambda: list(self.make(pipelines=self.labels(Fail())))),
        }

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
        loader = self.make(batch_size=7, pipelines=self.labels())
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
            memory, num_slots = loader._spare.memory, loader._spare.num_slots
        else:
            num_slots = 5
            memory = loader.graph.allocate_memory(8, num_slots)["operation"]
        parts = [part for parts in memory.values() for part in (parts if isinstance(parts, tuple) else (parts,))]
        total = sum(part.nbytes for part in parts if part is not None)
        return f"{total // (8 * num_slots) - 24 * 24 * 3} bytes a sample"

    def write_ours(self, name, num_workers):
        from ffcv_ops.writing.writer import write

        target = self.folder / f"{name}-ours-{num_workers}.beton"
        write(self.folder / name, target, num_workers=num_workers, notice=lambda line: None)
        return target.read_bytes()

    def write_stock(self, name, num_workers):
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        target = self.folder / f"{name}-stock-{num_workers}.beton"
        fields = {"image": RGBImageField(), "label": IntField()}
        writer = DatasetWriter(str(target), fields, num_workers=num_workers, page_size=beton.MIN_PAGE_SIZE)
        writer.from_indexed_dataset(Pictures(self.folder / name, num_workers), chunksize=1)
        return target.read_bytes()

    def written(self):
        write = self.write_ours if self.ours else self.write_stock
        return "same bytes" if write("images", 1) == write("images", 2) else "different bytes"

    def mass(self):
        labels, lam = self.torch.tensor([4, 4]), 0.7
        targets = self.torch.empty(2, 10)
        if self.ours:
            from ffcv_ops.operations.mix import MixDraw, dense_targets_into

            box, no = np.tile([0, 8, 0, 8], (2, 1)), np.zeros(2, bool)
            dense_targets_into(labels, MixDraw(np.array([1, 0]), np.full(2, lam, np.float32), box, no), 0.0, targets)
        else:
            from ffcv.transforms import MixupToOneHot

            MixupToOneHot(10).generate_code()(self.torch.tensor([[4, 4, lam]] * 2), targets)
        return f"mass {float(targets[0].sum()):.1f}"

    def lambdas(self):
        ids, lam = np.arange(8), []
        for epoch in range(2):
            if self.ours:
                from ffcv_ops.operations.mix import draw_mix

                lam.append(float(draw_mix(0, epoch, ids, (8, 8), mixup_alpha=0.5, cutmix_alpha=0).lam[0]))
            else:
                from ffcv.transforms import LabelMixup

                mixed = LabelMixup(0.5, True).generate_code()(ids[:, None], np.empty((8, 3), np.float32), ids)
                lam.append(float(mixed[0, 2]))
        return "same lambda" if lam[0] == lam[1] else "other lambda"

    def operation(self, name, **arguments):
        import ffcv.transforms

        if not self.ours:
            return getattr(ffcv.transforms, name)(**arguments)
        import ffcv_ops

        return ffcv_ops.Mix(10, **arguments) if name == "CutMix" else getattr(ffcv_ops, name)(**arguments)

    def normalize(self, dtype):
        mean, std = np.full(3, 120.0), np.full(3, 60.0)
        if not self.ours:
            from ffcv.transforms import NormalizeImage

            return NormalizeImage(mean, std, dtype).generate_code_gpu()
        from ffcv_ops import Normalize

        dtype = self.torch.float32 if dtype is np.float32 else dtype
        images = self.torch.zeros(2, 4, 4, 3, dtype=self.torch.uint8)
        normalized = Normalize(mean, std, dtype).generate_code()(
            images, self.torch.empty(2, 4, 4, 3, dtype=dtype), None
        )
        assert normalized.dtype == dtype and bool((normalized == -2).all())
        return "runs"

    def decayed(self):
        from torchvision.models import resnet50

        from imagenet_training.training.optim import parameter_groups

        model = resnet50()
        norms = {name for name, part in model.named_modules() if isinstance(part, self.torch.nn.BatchNorm2d)}
        if self.ours:
            groups = parameter_groups(model, weight_decay=1e-4, bn_wd=0.0)
            decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
            found = [name for name in norms if id(model.get_submodule(name).weight) in decaying]
        else:
            found = [name for name in norms if "bn" not in name]  # the rule of ffcv-imagenet's script
        return f"{len(found)} of {len(norms)}"

    def kernels(self):
        """FFCV's loader is made also in the process of ours."""
        import numba as nb

        @nb.njit
        def first(data):
            return data[0]

        @nb.njit
        def second(data):
            return first(data[1:])

        first(np.ones(2, np.uint8))
        self.stock_loader(str(self.folder / "good.beton"), 8, 1, pipelines=self.labels())
        second(np.ones(2, np.uint8))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("ffcv_ops").setLevel(logging.ERROR)  # no word of kernels that are compiled
    print(json.dumps(Probes(sys.argv[1], Path(sys.argv[2])).answers()))
