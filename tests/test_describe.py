"""What is told of a file: the truth of ours and of stock FFCV's, of odd fields and of damaged images."""

import cv2
import numpy as np
import pytest
from betons import photographs, spoil, write_images

from ffcv_ops.beton import describe as d
from ffcv_ops.sources.folder import scan
from ffcv_ops.writing.plan import WriteSettings
from ffcv_ops.writing.writer import write
from imagenet_training.data.file_sheet import choose_samples, decode_samples, fit_into_squares


@pytest.fixture
def folder(tmp_path):
    """Three classes of 1, 2 and 3 photographs, from 40 x 32 px up to 140 x 112 px."""
    for number, image in enumerate(photographs(6, side=160)):
        path = tmp_path / "images" / f"class_{min(number // 2, 2) if number else 0}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = 40 + 20 * number, 32 + 16 * number
        assert cv2.imwrite(str(path), cv2.resize(image, (width, height)))
    return tmp_path / "images"


def test_a_file_of_ours_is_described_from_tables_manifest_and_jpegs(folder, tmp_path):
    path = tmp_path / "train.beton"
    settings = WriteSettings(mode="proportion", raw_share=0.5, seed=3, max_side=0)
    manifest = write(folder, path, settings, num_workers=1)
    found = d.describe(path)
    counts = [len(list(sub.iterdir())) for sub in sorted(folder.iterdir())]
    assert found.class_counts.tolist() == counts == scan_counts(folder)
    assert sorted(found.heights.tolist()) == [40, 60, 80, 100, 120, 140]
    assert 0 < found.raw.sum() < 6
    np.testing.assert_array_equal(found.size_bytes[found.raw], 3 * (found.widths * found.heights)[found.raw])
    assert found.size_bytes.sum() == found.beton.alloc_table["size"].sum()
    assert found.restarts.num_jpegs == found.restarts.num_restarted == found.restarts.num_indexed == (~found.raw).sum()
    assert found.restarts.segments > 1 and 0 < found.restarts.index_share < 0.2
    text = "\n".join(d.lines(found))
    for part in (
        "class_0, class_1, class_2",
        f"{found.raw.sum() / 6:.1%} raw",
        manifest["digest"],
        "seed 3",
        "8,388,608",
    ):
        assert part in text, part
    assert "40 to 140 px, median 90" in text and str(folder) in text and "opencv" in text


def scan_counts(folder):
    return np.bincount(scan(folder).labels).tolist()


@pytest.mark.parametrize("raw", [False, True])
def test_a_file_without_manifest_or_restarts_is_described_too(tmp_path, raw):
    path = write_images(tmp_path / "stock.beton", photographs(7), labels=np.array([5, 5, 5, 9, 9, 9, 9]), raw=raw)
    found = d.describe(path)
    assert found.class_counts.tolist() == [3, 4] and found.raw.all() == raw
    text = "\n".join(d.lines(found))
    assert ("no JPEGs" if raw else "none in 7 JPEGs looked at") in text and "written by stock FFCV" in text
    assert "2, each of 3 to 4 images" in text and "width     64 px" in text
    for image, original in zip(decode_samples(found.beton, np.arange(7)), photographs(7), strict=True):
        assert np.abs(image.astype(int) - original).mean() < (1 if raw else 12)


def test_a_damaged_image_is_told_and_the_others_are_shown(tmp_path):
    path = write_images(tmp_path / "damaged.beton", photographs(3))
    spoil(path, 1)
    found = d.describe(path)
    first, second, third = decode_samples(found.beton, np.arange(3))
    assert "TurboJPEG" in str(second) and first.shape == third.shape == (64, 64, 3)


def test_samples_are_chosen_evenly_through_the_classes(tmp_path):
    labels = np.array([2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    found = d.describe(write_images(tmp_path / "a.beton", photographs(12), labels=labels)).beton
    chosen = choose_samples(found, 6)
    assert labels[chosen].tolist() == [0, 0, 1, 1, 2, 2] and len({*chosen.tolist()}) == 6
    assert sorted(choose_samples(found, 40).tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([32, 32], [32, 33]),
        ([1], [1, 2]),
        ([100, 500], [100, 150, 200, 250, 300, 350, 400, 450, 500, 550]),
        ([3, 900], [2, 5, 10, 20, 50, 100, 200, 500, 1000]),
        ([99, 65500], [50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000]),
    ],
)
def test_edges_are_round_and_hold_all_values(values, expected):
    assert d.edges(np.array(values)).tolist() == expected


def test_bars_fit_the_terminal():
    counts, bounds = np.array([1, 100, 0]), np.array([0, 10, 20, 30])
    assert d.histogram_lines("px", counts, bounds, 30) == [
        "px",
        "    0 to 9    1  #",
        "  10 to 19  100  #############",
        "  20 to 29    0",
    ]
    assert max(map(len, d.histogram_lines("px", counts, bounds, 5))) < 20


def test_images_are_shrunk_whole_into_squares():
    wide, small = np.zeros((50, 100, 3), np.uint8), np.full((10, 10, 3), 7, np.uint8)
    squares = fit_into_squares([wide, small], most_px=80)
    assert squares.shape == (2, 80, 80, 3)
    assert (squares[0, 20:60] == 0).all() and (squares[0, :20] == 255).all() and (squares[0, 60:] == 255).all()
    assert (squares[1] == 7).sum() == 300
