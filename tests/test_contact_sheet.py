"""The contact sheet: what it shows is what the model gets."""

import cv2
import numpy as np
import pytest
import torch
from betons import photographs, write_images
from reference import PIXEL_MEAN, PIXEL_STD

from imagenet_training.data.contact_sheet import (
    NUM_IMAGES,
    caption,
    class_names,
    denormalized,
    draw_contact_sheet,
    take_images,
)
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.preview import draw_preview


def test_denormalizing_gives_the_bytes_back():
    pixels = torch.from_numpy(np.stack(photographs(3, side=32)))
    mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    for dtype in (torch.float32, torch.float16):
        images = ((pixels - mean) / std).to(dtype).permute(0, 3, 1, 2)
        np.testing.assert_array_equal(denormalized(images, PIXEL_MEAN, PIXEL_STD), pixels.numpy())


@pytest.mark.parametrize(("num_batches", "rows"), [(1, 1), (3, 3), (9, 4)])
def test_images_come_from_several_batches(num_batches, rows):
    buffer = torch.empty(40, 3, 4, 4)

    def batches():
        for number in range(num_batches):
            buffer[:] = number  # a batch is valid until the next is asked for
            yield buffer, buffer[:, :, 0, 0]

    images, targets = take_images(batches(), num_batches)
    assert len(images) == len(targets) == NUM_IMAGES // rows * rows
    assert images[:, 0, 0, 0].unique().tolist() == targets[:, 0].unique().tolist() == list(range(rows))


def test_captions_name_what_stands_out():
    names = class_names(["n01440764", "a class of a very long name", "cat"], 3)
    assert names == ["tench", "a class of a very long name", "cat"]
    assert class_names(None, 2) == ["class 0", "class 1"]
    assert caption(np.array([0.3, 0.65, 0.05]), names) == "0.650 a class of a very l…\n0.300 tench"
    assert caption(np.array([0.05, 0.05, 0.9]), names) == "0.900 cat"


@pytest.mark.parametrize("side", [48, 224])
def test_the_sheet_holds_each_image_pixel_for_pixel(tmp_path, side):
    images = np.stack(photographs(11, side=side))
    path = tmp_path / "sheet.png"
    draw_contact_sheet(images, class_names(None, 11), path, title="one\ntwo")
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
    sheet = cv2.imread(str(path))[:, :, ::-1]
    factor = -(-160 // side)
    for number, image in enumerate(images):
        shown = image.repeat(factor, axis=0).repeat(factor, axis=1)
        top, left = 60 + number // 8 * (len(shown) + 40), 10 + number % 8 * (len(shown) + 10)
        np.testing.assert_array_equal(sheet[top : top + len(shown), left : left + len(shown)], shown)


@pytest.mark.filterwarnings("error")
def test_any_name_can_be_drawn(tmp_path):
    images = np.stack(photographs(3, side=32))
    for text in ("$a_{b$ <b>&", "caf\udce9", "\u72ac"):
        draw_contact_sheet(images, [text] * 3, tmp_path / "sheet.png", title=text)
        assert cv2.imread(str(tmp_path / "sheet.png")).std() > 0


def test_a_preview_of_fewer_images_than_a_batch_shows_those_of_an_epoch(tmp_path, capsys):
    file, sheet = tmp_path / "train.beton", tmp_path / "sheet.png"
    write_images(file, photographs(300, side=16), labels=np.arange(300) % 10)
    argv = [f"--data.train_dataset={file}", "--model.num_classes=10", "--augmentation.repeats=3", "--batch_size=280"]
    argv += ["--resolution.min_res=16", "--resolution.max_res=16", f"--preview={sheet}"]
    draw_preview(read_recipe(argv))  # an epoch has 256 images
    assert sheet.exists() and f"{NUM_IMAGES} training images" in capsys.readouterr().out
