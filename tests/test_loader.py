"""The loader's guarantees: the same batches however they are made, errors that arrive, and nothing left behind."""

import gc
import hashlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from ffcv.fields.basics import IntDecoder
from ffcv.loader.loader import Loader as StockLoader
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.transforms import Squeeze, ToTensor
from ffcv.traversal_order.base import TraversalOrder
from PIL import Image

from ffcv_ops import UserError, read_beton, rng
from ffcv_ops.loading.graph import returned_batch
from ffcv_ops.loading.loader import Loader, OrderOption
from ffcv_ops.operations.base import BatchOperation, SampleError
from ffcv_ops.operations.crops import CenterCrop, RandomResizedCrop
from ffcv_ops.operations.normalize import Label, Normalize
from tests.betons import photographs, spoil, write_images, write_tables

NUM_SAMPLES = 61
ORDERS = list(OrderOption)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("loader") / "photographs.beton", photographs(NUM_SAMPLES), per_page=4)


def crops(size=24):
    return {"image": [RandomResizedCrop(size), ToTensor()], "label": [Label()]}


def labels():
    return {"image": None, "label": [Label()]}


def digests(batches):
    return [hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch)).hexdigest() for batch in batches]


def ids_of(batches):
    """The labels are the sample ids."""
    seen = [batch[-1].clone() for batch in batches]
    return torch.cat(seen).tolist() if seen else []


def our_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ffcv_ops")]


def threads_end(seconds=3.0):
    end = time.monotonic() + seconds
    while our_threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not our_threads()


class Observe(BatchOperation):
    """Decoder of labels that shows them, and what the loader says of the batch, to a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.num_closed = 0

    def declare_state_and_memory(self, previous_state):
        return replace(previous_state, shape=(), dtype=np.dtype("i8")), AllocationQuery((), np.dtype("i8"))

    def generate_code(self):
        def observe(sample_ids, destination, field_metadata, batch):
            destination[:] = field_metadata[sample_ids]
            self.function(batch)
            return destination

        return observe

    def close(self):
        self.num_closed += 1


def observed(function):
    return {"image": None, "label": [Observe(function), ToTensor()]}


def test_a_tensor_becomes_no_tensor_again(path):
    pipelines = {"image": [RandomResizedCrop(8), ToTensor()], "label": [Label(), ToTensor()]}
    with pytest.raises(UserError, match=r'pipeline of "label" has tensors before ToTensor already: leave ToTensor out'):
        Loader(path, 8, 1, pipelines=pipelines)


# The same batches however they are made


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name.lower())
def test_batches_depend_on_seed_and_epoch_alone(path, order):
    def made(num_workers, os_cache=True, seed=5, epoch=1, skip=0):
        with Loader(path, 8, 1, os_cache, order, seed=seed, pipelines=crops(), drop_last=False) as loader:
            loader.num_workers = num_workers  # also above the CPUs of this machine
            return digests(loader.epoch(epoch, skip=skip))

    expected = made(1)
    assert len(set(expected)) == 8
    assert made(2) == made(4) == made(3, os_cache=False) == expected
    assert [made(2, skip=skip) for skip in (1, 5, 8)] == [expected[skip:] for skip in (1, 5, 8)]
    assert made(2, os_cache=False, skip=3) == expected[3:]
    assert not set(made(2, epoch=2)) & set(expected)
    assert not set(made(2, seed=6)) & set(expected)


def test_a_for_counts_epochs_and_goes_on_after_a_resumed_one(path):
    loader = Loader(path, 8, 2, order=OrderOption.RANDOM, seed=5, pipelines=crops())
    epochs = [digests(loader) for _ in range(3)]
    assert len(loader) == 7 and {len(epoch) for epoch in epochs} == {7}
    resumed = Loader(path, 8, 2, order=OrderOption.RANDOM, seed=5, pipelines=crops())
    iterator = resumed.epoch(1, skip=4)
    assert len(iterator) == 3
    assert digests(iterator) == epochs[1][4:]
    assert digests(resumed) == epochs[2]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name.lower())
@pytest.mark.parametrize("world_size", [2, 4, 70])
def test_ranks_share_the_samples(path, order, world_size):
    def seen(rank, drop_last):
        with Loader(
            path, 3, 1, order=order, seed=1, pipelines=labels(), drop_last=drop_last, rank=rank, world_size=world_size
        ) as loader:
            return ids_of(loader)

    validation = [i for rank in range(world_size) for i in seen(rank, False)]
    assert sorted(validation) == list(range(NUM_SAMPLES))
    if world_size < 70:
        training = [seen(rank, True) for rank in range(world_size)]
        assert {len(ids) for ids in training} == {NUM_SAMPLES // world_size // 3 * 3}
        assert len(set(sum(training, []))) == sum(map(len, training))


def test_under_torchrun_batches_depend_on_seed_epoch_and_rank_alone(path, tmp_path):
    """Two ranks, 1, 2 and 4 workers, resumed or not; and a sample looks as it does in a run of one process."""
    script = """
        import hashlib, sys, torch
        from ffcv_ops.operations.crops import RandomResizedCrop
        from ffcv_ops.loading.loader import Loader, OrderOption
        from ffcv_ops.operations.normalize import Label

        def sample_digests(order, num_workers, drop_last, skip=0, **distributed):
            pipelines = {"image": [RandomResizedCrop(24)], "label": [Label()]}
            with Loader(sys.argv[1], 4, 1, order=order, seed=2, drop_last=drop_last, pipelines=pipelines,
                        **distributed) as loader:
                loader.num_workers = num_workers  # also above the CPUs of this machine
                return [[(int(label), hashlib.sha256(image.tobytes()).hexdigest())
                         for image, label in zip(*batch, strict=True)] for batch in loader.epoch(1, skip=skip)]

        torch.distributed.init_process_group("gloo")
        for order in OrderOption:
            alone = dict(sum(sample_digests(order, 2, False), []))
            for drop_last in (False, True):
                mine = sample_digests(order, 1, drop_last, distributed=True)
                for num_workers in (2, 4):
                    assert sample_digests(order, num_workers, drop_last, distributed=True) == mine
                    assert sample_digests(order, num_workers, drop_last, skip=3, distributed=True) == mine[3:]
                both = [None, None]
                torch.distributed.all_gather_object(both, sum(mine, []))
                together = dict(both[0] + both[1])
                assert together.items() <= alone.items()
                assert len(together) == len(both[0]) + len(both[1]) == (56 if drop_last else 61)
                assert not drop_last or len(both[0]) == len(both[1])
        torch.distributed.destroy_process_group()
    """
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program), str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr


def test_copies_are_told_to_operations(path):
    seen = []
    for rank in range(3):
        pipelines = observed(
            lambda batch: seen.extend(zip(batch.sample_ids.tolist(), batch.copies.tolist(), strict=True))
        )
        with Loader(
            path, 7, 1, order=OrderOption.RANDOM, seed=1, pipelines=pipelines, repeats=3, rank=rank, world_size=3
        ) as loader:
            assert len(loader) == 3
            for _ in loader:
                pass
    assert len(set(seen)) == len(seen) == 63
    assert {copy for _, copy in seen} == {0, 1, 2}


def test_copies_of_a_sample_look_different(path):
    with Loader(path, 6, 1, seed=1, indices=range(12), pipelines=crops(), repeats=3) as loader:
        images, ids = next(iter(loader))
        assert ids.tolist() == [0, 0, 0, 1, 1, 1]
        assert len({image.numpy().tobytes() for image in images}) == 6


# Drop-in


class AddIndices(ToTensor):
    """A transform by FFCV's convention, not compiled, that wants the batch's indices."""

    def declare_state_and_memory(self, previous_state):
        return replace(previous_state, jit_mode=False), None

    def generate_code(self):
        def add(values, _, indices):
            # reshaped, for in the stock loader the values may have been squeezed by then: Squeeze works in place
            return values.reshape(-1, 1) + torch.from_numpy(np.asarray(indices).astype("i8"))[:, None]

        add.with_indices = True
        return add


def test_stock_operations_run_by_their_own_convention(path):
    def both(cls, **more):
        decoder, tensor = IntDecoder(), ToTensor()
        pipelines = {
            "image": None,
            "label": [decoder, tensor, AddIndices()],
            "again": PipelineSpec("label", IntDecoder(), [ToTensor(), Squeeze(1)]),
            "same": PipelineSpec(tensor, transforms=[Squeeze(1)]),
        }
        loader = cls(str(path), 9, 1, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines, **more)
        return [[part.clone() for part in batch] for batch in loader]

    stock, ours = both(StockLoader), both(Loader)
    assert len(stock) == len(ours) == 7
    for expected, found in zip(stock, ours, strict=True):
        assert [part.shape for part in expected] == [part.shape for part in found]
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def jpegs_of_all_kinds(image):
    """What JPEGs of others may be, by kind, and the least PSNR of their pixels, in dB, to OpenCV's."""

    def sampled(factor):
        return cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor])[1].reshape(-1)

    def saved(mode="RGB", **options):
        stream = io.BytesIO()
        Image.fromarray(image).convert(mode).save(stream, "jpeg", quality=95, **options)
        return np.frombuffer(stream.getvalue(), np.uint8)

    return {
        "4:4:4": (sampled(cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444), 70),
        "4:2:2": (sampled(cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422), 55),
        "4:2:0": (sampled(cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420), 50),
        "4:4:0": (sampled(cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440), 55),
        "4:1:1": (sampled(cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411), 45),
        "gray": (saved("L"), 70),
        "progressive": (saved(progressive=True), 50),
        "RGB": (saved(keep_rgb=True), 70),
        "CMYK": (saved("CMYK"), None),
    }


def test_jpegs_of_all_kinds_give_their_pixels_or_are_named(tmp_path):
    (image,) = photographs(1, side=96)
    kinds = jpegs_of_all_kinds(image)
    encoded = iter([data for data, _ in kinds.values()])
    file = write_images(tmp_path / "kinds.beton", [image] * len(kinds), encode=lambda _: next(encoded))
    good = [i for i, (_, least_psnr) in enumerate(kinds.values()) if least_psnr is not None]

    def load(decoder, ids):
        with Loader(file, len(ids), 1, indices=ids, pipelines={"image": [decoder], "label": [Label()]}) as loader:
            return next(iter(loader))[0].astype(int)

    images = load(CenterCrop(96, ratio=1), good)
    for (kind, (data, least_psnr)), found in zip(kinds.items(), images, strict=False):
        expected = cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1]
        assert 10 * np.log10(255**2 / max(((found - expected) ** 2).mean(), 1e-3)) > least_psnr, kind
    (bad,) = set(range(len(kinds))) - set(good)
    with pytest.raises(SampleError, match=rf"kinds\.beton: sample {bad}: a JPEG of CMYK, "):
        load(CenterCrop(96, ratio=1), [bad])


def test_a_consumer_in_inference_mode_gets_the_same_batches(path):
    pipelines = crops()
    pipelines["image"].append(Normalize((120,) * 3, (60,) * 3, torch.float32))
    with Loader(path, 4, num_workers=2, seed=1, pipelines=pipelines) as loader:
        with torch.inference_mode():
            seen = digests(loader.epoch(0))
        assert seen == digests(loader.epoch(0))


def test_pipelines_are_not_consumed(path):
    pipelines = crops()
    lengths = [len(pipeline) for pipeline in pipelines.values()]
    with (
        Loader(path, 8, 1, seed=1, pipelines=pipelines) as first,
        Loader(path, 8, 2, seed=1, pipelines=pipelines) as second,
    ):
        # Two loaders share the operations, whose scratch serves one batch at a time.
        alone = digests(first.epoch(0))
        pairs = [digests(pair) for pair in zip(first.epoch(0), second.epoch(0), strict=True)]
        assert pairs == [[digest, digest] for digest in alone]
    assert [len(pipeline) for pipeline in pipelines.values()] == lengths


@pytest.mark.parametrize("os_cache", [True, False])
def test_an_epoch_leaves_the_batches_of_another_alone(path, os_cache):
    """Also those that are prepared, where nothing is left to prepare but the consumer has not asked for them yet."""
    with Loader(path, 8, 2, os_cache, OrderOption.RANDOM, seed=5, pipelines=crops()) as loader:
        expected = [digests(loader.epoch(epoch)) for epoch in range(2)]
        first = loader.epoch(0)
        begun = digests(next(first) for _ in range(4))
        first._producer.thread.join()
        assert digests(loader.epoch(1)) == expected[1]
        assert begun + digests(first) == expected[0]


def test_filter_keeps_ids_of_a_subset(path):
    with Loader(path, 4, 1, indices=range(1, 60, 2), pipelines=labels(), drop_last=False, seed=0) as loader:
        with loader.filter("label", lambda label: label % 3 == 0) as kept:
            assert ids_of(kept) == [i for i in range(1, 60, 2) if i % 3 == 0]
        with loader.filter("label", lambda label: False) as none, none.filter("label", bool) as again:
            assert ids_of(none) == ids_of(again) == []


def test_filter_names_what_it_cannot_do(path):
    with Loader(path, 4, 1, pipelines=labels()) as loader:
        for name in ("image", "lable"):
            with pytest.raises(ValueError, match=f"no pipeline is named {name}; there are label"):
                loader.filter(name, bool)
    with Loader(path, 2, 1, order=Chosen([3, 1, 2]), pipelines=labels()) as loader:
        with pytest.raises(ValueError, match="an order that is an instance"):
            loader.filter("label", bool)


class Backwards(TraversalOrder):
    def __init__(self, loader, step=1):
        super().__init__(loader)
        self.step = step

    def sample_order(self, epoch):
        return self.indices[:: -self.step]


class Chosen(TraversalOrder):
    def __init__(self, ids):
        self.ids = ids

    def sample_order(self, epoch):
        return self.ids


def test_custom_orders_pass_as_class_and_as_instance(path):
    with Loader(path, 5, 1, order=Backwards, order_kwargs={"step": 2}, pipelines=labels(), drop_last=False) as loader:
        assert ids_of(loader) == list(range(60, -1, -2))
    chosen = Chosen([3, 1, 2])
    with Loader(path, 2, 1, order=chosen, pipelines=labels(), drop_last=False) as loader:
        assert ids_of(loader) == [3, 1, 2] and chosen.loader is loader
        chosen.ids = [4, 61]
        with pytest.raises(ValueError, match="traversal order: sample 61 is not in .*61 samples"):
            iter(loader)


# Errors arrive


def failing_at(batch_number, error):
    calls = []

    def fail(batch):
        calls.append(1)
        if len(calls) > batch_number:
            raise error

    return observed(fail)


@pytest.mark.parametrize("batch_number", [0, 3])
@pytest.mark.parametrize("error", [KeyError("broken"), MemoryError("none"), SystemExit(3)])
def test_an_exception_in_an_operation_reaches_the_for(path, batch_number, error):
    with Loader(path, 8, 2, pipelines=failing_at(batch_number, error)) as loader:
        iterator, num_batches, started = iter(loader), 0, time.monotonic()
        with pytest.raises(type(error)) as caught:
            for _ in iterator:
                num_batches += 1
        assert time.monotonic() - started < 1
        assert num_batches == batch_number
        assert caught.value is error and "fail" in [entry.name for entry in caught.traceback]
        assert list(iterator) == [] and threads_end()


def test_an_operation_s_stop_iteration_does_not_pass_for_the_end(path):
    with Loader(path, 8, 2, pipelines=failing_at(3, StopIteration())) as loader:
        with pytest.raises(RuntimeError, match="an operation raised StopIteration") as caught:
            list(loader)
        assert isinstance(caught.value.__cause__, StopIteration)


def test_an_exception_in_a_stock_operation_reaches_the_for(path):
    class Fail(ToTensor):
        def generate_code(self):
            def fail_in_stock(values, _):
                raise KeyError("broken")

            return fail_in_stock

    with Loader(path, 8, 2, pipelines={"image": None, "label": [IntDecoder(), Fail()]}) as loader:
        with pytest.raises(KeyError) as caught:
            list(loader)
        assert "fail_in_stock" in [entry.name for entry in caught.traceback] and threads_end()


def test_a_file_cut_during_an_epoch_is_an_error(tmp_path):
    path = write_images(tmp_path / "cut.beton", photographs(30), per_page=1)
    with Loader(path, 2, 2, os_cache=False, pipelines={"image": [CenterCrop(16)], "label": [Label()]}) as loader:
        iterator = iter(loader)
        next(iterator)
        os.truncate(path, 12 * (1 << 21))
        with pytest.raises(OSError, match="cut or replaced"):
            list(iterator)
        with pytest.raises(ValueError, match="its size has changed"):
            iter(loader)


@pytest.mark.parametrize("os_cache", [True, False])
def test_a_file_that_replaces_the_one_in_use_is_not_read_with_its_tables(tmp_path, os_cache):
    path, other = tmp_path / "a.beton", tmp_path / "b.beton"
    for file, shift in ((path, 0), (other, 100)):
        write_images(file, [np.full((16, 16, 3), i + shift, np.uint8) for i in range(40)], raw=True)
    with Loader(path, 10, 1, os_cache, pipelines={"image": [CenterCrop(16, 1.0)], "label": [Label()]}) as loader:
        for _ in range(2):
            for images, labels in loader:
                assert images[:, 8, 8, 0].tolist() == labels.tolist()
            if other.exists():
                os.replace(other, path)  # of the same size


@pytest.mark.parametrize("os_cache", [True, False])
def test_a_file_that_is_replaced_before_the_loader_opens_it_is_refused(tmp_path, os_cache):
    path = tmp_path / "a.beton"
    write_images(path, photographs(3))
    beton = read_beton(path)
    os.utime(path, (0, beton.modified_s + 2))
    with pytest.raises(UserError, match="a.beton: it was replaced or changed after its tables were read: read it"):
        Loader(beton, 1, 1, os_cache, pipelines={"label": [Label()]})


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system ends the process")
def test_a_mapped_file_cut_during_an_epoch_is_an_error_too(tmp_path):
    """With our decoder and with FFCV's; in a process of its own, which would be lost."""
    script = """
        import os, sys
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv_ops.operations.crops import RandomResizedCrop
        from ffcv_ops.loading.loader import Loader
        from ffcv_ops.operations.normalize import Label

        for path, decoder in zip(sys.argv[1:], (RandomResizedCrop(16), SimpleRGBImageDecoder()), strict=True):
            loader = Loader(path, 2, 2, True, on_error="skip", pipelines={"image": [decoder], "label": [Label()]})
            iterator = loader.epoch(0)
            next(iterator)
            os.truncate(path, 12 << 21)
            try:
                print(sum(1 for _ in iterator))
            except OSError as error:
                print(error)
            try:
                loader.epoch(1)
            except ValueError as error:
                print(error)
    """
    paths = [write_images(tmp_path / f"cut_{i}.beton", photographs(30), per_page=1) for i in range(2)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *paths], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert ["cut or replaced while in use" in line for line in told] == [True, False] * 2, done.stdout
    assert ["its size has changed" in line for line in told] == [False, True] * 2


@pytest.mark.parametrize("os_cache", [True, False])
def test_a_bad_sample_is_named(tmp_path, os_cache):
    path = write_images(tmp_path / "bad.beton", photographs(20), per_page=3)
    spoil(path, 13)
    with Loader(path, 4, 2, os_cache, pipelines=crops()) as loader:
        with pytest.raises(SampleError, match=r"bad\.beton: sample 13: ") as caught:
            list(loader)
        assert [sample_id for sample_id, _ in caught.value.failures] == [13]


@pytest.mark.parametrize("os_cache", [True, False])
def test_bad_samples_are_replaced_by_a_function_of_seed_epoch_and_id(tmp_path, os_cache):
    path = write_images(tmp_path / "bad.beton", photographs(40), per_page=3)
    for sample_id in (3, 7, 22):
        spoil(path, sample_id)

    def made(epoch, skip=0):
        with Loader(path, 4, 2, os_cache, pipelines=crops(), seed=9, on_error="skip") as loader:
            with pytest.warns(UserWarning, match=rf"bad\.beton: epoch {epoch}: others stood in for .* times") as told:
                batches = [[part.clone() for part in batch] for batch in loader.epoch(epoch, skip=skip)]
            (warning,) = (warning for warning in told if warning.category is UserWarning)
            assert warning.filename == __file__ and f", {loader.num_skipped} times" in str(warning.message)
            return batches, ids_of(batches), loader

    batches, ids, loader = made(2)
    replaced = [i for i in range(40) if ids[i] != i]
    assert replaced == [3, 7, 22] == sorted(loader.skipped) and loader.num_skipped == 3
    for i in replaced:
        draws = [int(rng.uniform(9, 2, i, 0, rng.REPLACEMENT, k) * 40) for k in range(20)]
        assert ids[i] == next(draw for draw in draws if draw not in replaced)
    assert digests(made(2)[0]) == digests(batches)
    assert digests(made(2, skip=5)[0]) == digests(batches)[5:]
    others = [made(epoch)[1] for epoch in range(3, 6)]
    assert len({tuple(other[i] for i in replaced) for other in others}) > 1


@pytest.mark.filterwarnings("ignore:.* others stood in")
def test_a_sample_bad_in_one_epoch_is_used_in_the_next(path):
    def fail(batch):
        bad = [
            (sample_id, "bad today") for sample_id in batch.sample_ids.tolist() if (sample_id + batch.epoch) % 9 == 0
        ]
        if bad:
            raise SampleError(bad)

    def made(epochs):
        with Loader(path, 10, 2, pipelines=observed(fail), seed=4, on_error="skip", drop_last=False) as loader:
            return [ids_of(loader.epoch(epoch)) for epoch in epochs]

    in_a_row = made(range(4))
    assert in_a_row[3] == made([3])[0]
    assert [i for i in range(NUM_SAMPLES) if in_a_row[3][i] != i] == list(range(6, NUM_SAMPLES, 9))


def test_a_file_of_bad_samples_is_an_error_under_skip(tmp_path):
    path = write_images(tmp_path / "bad.beton", photographs(6))
    for sample_id in range(6):
        spoil(path, sample_id)
    with Loader(path, 3, 1, pipelines=crops(), on_error="skip") as loader:
        with pytest.raises(SampleError, match="sample [0-5]: .*; no good sample to replace it was found"):
            list(loader)


def test_memory_that_an_order_needs_is_computed_before_anything_is_read(tmp_path):
    # A file of 2 TiB that takes none: its pages of 2 GiB are holes, with two samples each.
    page_size, count = 1 << 31, 2048
    images = [np.zeros((16, 16, 3), np.uint8)] * count
    place = (1 + np.arange(count) // 2) * page_size + 768 * (np.arange(count) % 2)
    huge = tmp_path / "huge.beton"
    write_tables(huge, images, np.full(count, 768), place, True, None, page_size=page_size)
    with pytest.raises(ValueError, match=r"holds \d+ pages at a time, .* MiB are available: use order=.*QUASI_RANDOM"):
        Loader(huge, 128, 1, os_cache=False, order=OrderOption.RANDOM, seed=0, pipelines=labels())
    with Loader(huge, 128, 1, os_cache=True, order=OrderOption.RANDOM, seed=0, pipelines=labels()) as loader:
        assert len(ids_of(loader)) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batches_ahead": 0}, "batches_ahead is 0"),
        ({"order": "random"}, "order is 'random'"),
        ({"seed": -1}, "seed is -1"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"indices": [0, 61]}, "indices: sample 61 is not in"),
        ({"indices": [0.5]}, "indices: expected"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"rank": 0}, "go together"),
        ({"distributed": True}, "init_process_group"),
        ({"repeats": 2, "drop_last": False}, "repeats need"),
        ({"repeats": 2, "order": OrderOption.QUASI_RANDOM}, "repeats need"),
        ({"pipelines": {"image": 3}}, "pipeline of image must be"),
        ({"pipelines": {"picture": [Label()]}}, "reads the field picture; the file has image, label"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_named(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(**{"fname": path, "batch_size": 4, "num_workers": 1, **arguments})


def test_wrong_uses_are_named(path):
    loader = Loader(path, 8, 1, pipelines=labels())
    with pytest.raises(ValueError, match="skip is 8; epoch 0 has 7 batches"):
        loader.epoch(0, skip=8)
    with pytest.warns(UserWarning, match="no batch: this rank has 61 samples .* a batch is 62"):
        Loader(path, 62, 1, pipelines=labels())
    loader.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        iter(loader)


def test_workers_are_clamped_to_the_cpus_allowed(path):
    allowed = len(os.sched_getaffinity(0))
    with pytest.warns(UserWarning, match=f"num_workers is {allowed + 1}; {allowed} CPUs are allowed") as told:
        loader = Loader(path, 8, allowed + 1, pipelines=labels())
        assert loader.num_workers == loader.filter("label", lambda label: True).num_workers == allowed
    assert [warning.filename for warning in told if warning.category is UserWarning] == [__file__]
    assert Loader(path, 8, pipelines=labels()).num_workers == allowed


# Nothing is left behind


def leave_by_break(loader):
    for _ in loader:
        break


def leave_by_exception(loader):
    with pytest.raises(ZeroDivisionError):
        for _ in loader:
            1 / 0  # noqa: B018


def leave_by_dropping(loader):
    iterator = iter(loader)
    next(iterator)
    cycle = [iterator]
    cycle.append(cycle)
    del iterator, cycle
    gc.collect(0)


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_exception, leave_by_dropping])
@pytest.mark.parametrize("os_cache", [True, False])
def test_leaving_an_epoch_frees_threads_and_memory(path, leave, os_cache):
    process = psutil.Process()
    loader = Loader(path, 16, 2, os_cache, order=OrderOption.RANDOM, seed=0, pipelines=crops(160))
    before = threading.active_count()
    for _ in range(5):
        leave(loader)
    settled = process.memory_info().rss
    for _ in range(50):
        leave(loader)
    grown_mib = (process.memory_info().rss - settled) / 2**20
    assert threads_end() and threading.active_count() <= before
    # One epoch's buffers are 6 MiB and the pages of the file 32 MiB.
    assert grown_mib < 16
    loader.close()


def test_dropping_the_loader_ends_its_epoch_and_closes_operations(path):
    pipelines = observed(lambda batch: time.sleep(0.01))
    operation = pipelines["label"][0]
    loader = Loader(path, 2, 2, pipelines=pipelines)
    iterator = iter(loader)
    del loader
    next(iterator)
    assert operation.num_closed == 0
    del iterator
    assert threads_end()
    gc.collect()
    assert operation.num_closed == 1


def test_an_operation_closes_with_its_last_loader(path):
    pipelines = observed(lambda batch: None)
    first, second = Loader(path, 2, 1, pipelines=pipelines), Loader(path, 2, 1, pipelines=pipelines)
    first.close()
    assert pipelines["label"][0].num_closed == 0
    second.close()
    second.close()
    assert pipelines["label"][0].num_closed == 1


def test_ctrl_c_interrupts_the_wait_and_threads_end(path):
    pipelines = observed(lambda batch: time.sleep(0.5))
    with Loader(path, 8, 2, pipelines=pipelines) as loader:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            for _ in loader:
                pass
    assert threads_end()


def test_buffers_are_kept_between_epochs_unless_shapes_change(path):
    crop = RandomResizedCrop(24)
    with Loader(path, 8, 1, pipelines={"image": [crop, ToTensor()], "label": [Label()]}) as loader:
        addresses = [{images.data_ptr() for images, _ in loader} for _ in range(3)]
        assert len(addresses[0]) == 6 and addresses[0] == addresses[1] == addresses[2]
        crop.size = 32
        assert {tuple(images.shape) for images, _ in loader} == {(8, 32, 32, 3)}


class Prefetcher:
    """Requests batches ahead of their use, over the ends of epochs, as the loops of other libraries do."""

    def __init__(self, loader, num_epochs, ahead):
        self.batches = (batch for epoch in range(num_epochs) for batch in loader.epoch(epoch))
        self.ahead = ahead

    def __iter__(self):
        waiting = []
        for batch in self.batches:
            waiting.append(batch)
            if len(waiting) > self.ahead:
                time.sleep(0.01)  # a step, while the loader prepares more
                yield waiting.pop(0)
        yield from waiting


@pytest.mark.parametrize("batches_ahead", [1, 3])
@pytest.mark.parametrize("ahead, copies", [(0, False), (1, False), (2, True), (4, True)])
def test_batches_are_not_overwritten_while_the_consumer_holds_them(path, ahead, copies, batches_ahead):
    with Loader(path, 4, 2, pipelines=crops(), seed=0, batches_ahead=batches_ahead) as loader:
        expected = [digests([batch]) for epoch in range(3) for batch in loader.epoch(epoch)]
        assert [digests([batch]) for batch in Prefetcher(loader, 3, ahead)] == expected
        assert loader.copy == copies


@pytest.mark.parametrize(
    "keep",
    [
        lambda images, labels: (images, labels),
        lambda images, labels: (images[1:], labels[:]),
        lambda images, labels: (images.permute(0, 3, 1, 2), labels.unsqueeze(1)),
        lambda images, labels: (images.numpy(), labels.numpy()),
        lambda images, labels: (images[0, :, :, 1].numpy()[::2], labels.tolist()),
        lambda images, labels: torch.utils.data.default_convert({"images": images, "labels": labels}),
    ],
)
def test_parts_of_batches_stay_as_they_are(path, keep):
    def content(kept):
        return [part.tolist() if hasattr(part, "tolist") else part for part in kept]

    with Loader(path, 4, 1, pipelines=crops(), seed=0) as loader:
        kept, expected = [], []
        for epoch in (0, 1):
            for batch in loader.epoch(epoch):
                kept.append(keep(*batch))
                expected.append(content(keep(*batch)))
        assert list(map(content, kept)) == expected


def normalised(dtype):
    image = [RandomResizedCrop(24), ToTensor(), Normalize((127,) * 3, (64,) * 3, dtype)]
    return {"image": image, "label": [Label()]}


def test_parts_of_any_kind_are_returned():
    weight = torch.nn.Parameter(torch.ones(3))
    parts = (torch.arange(3), torch.zeros(2, dtype=torch.float8_e5m2), torch.ones(2, dtype=torch.complex128),
             torch.tensor([True, False]), torch.eye(2).to_sparse(), weight * 2, np.arange(4))  # fmt: skip
    result, batch = returned_batch(0, parts)
    for part, expected in zip(result, parts, strict=True):
        assert type(part) is type(expected) and part.dtype == expected.dtype and part.shape == expected.shape
    assert result[5].requires_grad and batch.is_held
    view = result[0][1:]
    del result, parts, part, expected
    assert batch.is_held
    del view
    assert not batch.is_held


class Pixels(torch.Tensor):
    """A class of tensors, as torchvision's `tv_tensors` are."""


def test_parts_of_other_classes_are_returned_as_they_are():
    conjugate = torch.ones(3, dtype=torch.complex64).conj()
    parts = (torch.ones(3).as_subclass(Pixels), torch.nn.Parameter(torch.ones(3), requires_grad=False), conjugate,
             [1, 2], 3)  # fmt: skip
    result, batch = returned_batch(0, parts)
    for part, expected in zip(result, parts, strict=True):
        assert part is expected
    assert batch.is_held
    del result, parts, part, expected, conjugate
    assert not batch.is_held


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalised_batches_stay_as_they_are(path, dtype):
    with Loader(path, 4, 1, pipelines=normalised(dtype), seed=0) as loader:
        kept = [(images[:2], images[:2].clone()) for images, _ in loader]
        assert all(part.dtype == dtype and torch.equal(part, copy) for part, copy in kept)
        assert kept[0][0].is_contiguous(memory_format=torch.channels_last)


def test_a_graph_keeps_the_batch_that_its_gradient_needs(path):
    weight = torch.ones(3, 24, 24, requires_grad=True)
    with Loader(path, 4, 1, pipelines=normalised(torch.float32), seed=0) as loader:
        losses, expected = [], []
        for images, _ in loader:
            losses.append((images * weight).sum())
            expected.append(images.sum(0))
        for loss, gradient in zip(losses, expected, strict=True):
            weight.grad = None
            loss.backward()
            assert torch.equal(weight.grad, gradient)


def test_one_batch_that_is_kept_does_not_cost_copies(path):
    with Loader(path, 4, 1, pipelines=crops(), seed=0) as loader:
        first = next(iter(loader))
        expected = digests([first])
        for epoch in (1, 2):
            for _ in loader.epoch(epoch):
                pass
        assert digests([first]) == expected and not loader.copy


def test_waiting_is_accounted_for(path):
    with Loader(path, 8, 1, pipelines=observed(lambda batch: time.sleep(0.03))) as loader:
        list(loader)
        assert 0.15 < loader.take_wait_s() < 2
        assert loader.take_wait_s() == 0


@pytest.mark.soak
def test_the_interpreter_exits_without_a_word(path):
    script = """
        import sys
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.transforms import ToTensor
        from ffcv_ops.operations.crops import CenterCrop
        from ffcv_ops.loading.loader import Loader
        # FFCV's decoder is compiled with the loader's way of reading: that is where numba's words at exit come from.
        for os_cache in (True, False):
            pipelines = {"image": [SimpleRGBImageDecoder(), ToTensor()], "label": None}
            for _ in Loader(sys.argv[1], 4, 1, os_cache, pipelines=pipelines):
                pass
        ours = Loader(sys.argv[1], 4, 2, pipelines={"image": [CenterCrop(64), ToTensor()]})
        iterator = iter(ours)
        next(iterator)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), path], capture_output=True, text=True, timeout=180
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python has distutils")
def test_a_missing_setuptools_is_named():
    script = """
        import sys
        class Without:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "setuptools":
                    raise ModuleNotFoundError(name)
        # setuptools' own finder provides distutils without being asked
        sys.meta_path = [Without(), *(f for f in sys.meta_path if type(f).__name__ != "DistutilsMetaFinder")]
        import ffcv_ops.operations.base
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert "ImportError: ffcv imports distutils" in done.stderr and "pip install setuptools" in done.stderr
