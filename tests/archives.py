"""Small images as folders, and as the archives that GNU tar and the package webdataset make of them."""

import subprocess
from hashlib import sha256
from io import BytesIO

from PIL import Image
from sklearn.datasets import load_sample_images

from ffcv_ops.sources.kinds import open_source
from ffcv_ops.sources.spec import SourceSpec

PHOTOGRAPHS = load_sample_images().images


def jpeg(number):
    """A small JPEG, another one for every number."""
    content = BytesIO()
    Image.fromarray(PHOTOGRAPHS[number % 2][number : number + 24, number : number + 32]).save(content, "JPEG")
    return content.getvalue()


NAMES = [
    *("n01/n01_10.JPEG", "n01/n01_9.JPEG", "n01/n01-2.JPEG", "n01/n01_a.JPEG"),
    *("n02/n02_1.JPEG", "n02/caf\u00e9.JPEG", "n02/" + "long" * 30 + ".JPEG"),
    *("n03/n03_1.JPEG", "n03/n03_10.JPEG", "n03/n03_2.JPEG"),
]
CONTENTS = {name: jpeg(number) for number, name in enumerate(NAMES)}


def make_folder(root, contents=CONTENTS):
    """Write files under their names."""
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def tar(path, *arguments, folder):
    """Make an archive with GNU tar from within a folder."""
    subprocess.run(["tar", "-cf", path, *arguments], cwd=folder, check=True)
    return path


def tar_of_tars(path, folder):
    """Make an archive of one archive a class, as ILSVRC's training images are."""
    inner = path.parent / f"{path.name}.classes"
    inner.mkdir()
    names = sorted(entry.name for entry in folder.iterdir())
    for name in names:
        tar(inner / f"{name}.tar", *sorted(entry.name for entry in (folder / name).iterdir()), folder=folder / name)
    return tar(path, *(f"{name}.tar" for name in names), folder=inner)


def listed(address, **options):
    """Return the class and a hash of each image of a source, in its order. They decide the bytes of a file."""
    return contents_of(open_source(SourceSpec(str(address), **options)))


def contents_of(source):
    return [
        (source.classes[label], sha256(source.reader.read(key, place)).hexdigest())
        for key, label, place in zip(source.keys, source.labels.tolist(), source.places.tolist(), strict=True)
    ]
