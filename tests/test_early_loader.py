"""An epoch that begins before it is asked for: the same batches, ready earlier, and no error before its time."""

import time

import numpy as np
import pytest
from betons import photographs, write_images

from ffcv_ops import CenterCrop, Label, Loader, OrderOption, UserError
from imagenet_training.data.loaders import EarlyLoader

OPTIONS = {"num_workers": 1, "order": OrderOption.RANDOM, "seed": 3}


def pipelines():
    return {"image": [CenterCrop(32)], "label": [Label()]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("early") / "file.beton", photographs(64))


def labels(batches):
    return [np.asarray(batch[1]).tolist() for batch in batches]


def wait_until_prepared(loader, num_batches):
    (producer,) = loader._producers
    end_s = time.monotonic() + 60
    while producer.ready.qsize() < num_batches:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_an_epoch_that_has_begun_has_the_same_batches(path):
    with Loader(path, 16, pipelines=pipelines(), **OPTIONS) as plain:
        expected = [labels(plain) for _ in range(3)]
    with EarlyLoader(path, 16, pipelines=pipelines(), **OPTIONS) as loader:
        loader.begin()
        wait_until_prepared(loader, 4)
        assert loader.next_epoch == 0 and labels(loader) == expected[0]
        loader.begin(1)
        assert labels(loader.epoch(1)) == expected[1] and loader.next_epoch == 2
        loader.begin(2)
        assert labels(loader.epoch(2, skip_samples=32)) == expected[2][2:], "a resumed epoch is another one"
        loader.begin(2)
        assert labels(loader.epoch(1)) == expected[1]
        assert labels(loader.epoch(2)) == expected[2]
        loader.begin(5)
    assert not any(producer.thread.is_alive() for producer in loader._producers)


def test_an_epoch_that_cannot_begin_raises_its_error_when_it_is_asked_for(path, tmp_path):
    copy = tmp_path / "file.beton"
    copy.write_bytes(path.read_bytes())
    with EarlyLoader(copy, 16, pipelines=pipelines(), **OPTIONS) as loader:
        content = copy.read_bytes()
        copy.write_bytes(content + b"longer")
        loader.begin(0)
        with pytest.raises(UserError, match="its size has changed"):
            loader.epoch(0)
        copy.write_bytes(content)
        loader.begin(0)
        assert len(labels(loader.epoch(0))) == 4
