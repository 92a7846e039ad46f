"""Numba's cache on disk, told of what a kernel calls in other modules."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ffcv_ops
from ffcv_ops import _kernels as kernels
from ffcv_ops import rng

SCRIPT = """
    import numpy as np
    from ffcv_ops.operations.crops import draw_crops_into
    ids, boxes = np.arange(3), np.empty((3, 4))
    drawn, sides = (0, 0, ids, np.zeros(3, np.int64)), np.full(3, 500)
    draw_crops_into(drawn, sides, sides, (0.08, 1.0), (0.75, 1.5), 0.5, boxes, np.empty(3, np.bool_))
    print(sum(draw_crops_into.stats.cache_hits.values()), boxes.tolist())
"""


CROPS = """
    import hashlib
    import numpy as np
    from ffcv_ops import _kernels
    from ffcv_ops.operations.crops import CenterCrop, RandomResizedCrop, _crop_samples
    from tests.test_crops import Samples, photograph, stock_jpeg
    images = [photograph(90 + 23 * i, 260 - 19 * i, i) for i in range(8)]
    digest = hashlib.sha256()
    for encode in (None, stock_jpeg, np.asarray):
        samples = Samples(images) if encode is None else Samples(images, encode)
        for interpolation in ("bilinear", "bicubic"):
            for size in (16, 64, 224):
                for operation in (RandomResizedCrop(size, interpolation=interpolation), CenterCrop(size)):
                    digest.update(samples.decode(operation))
    hits = sum(_crop_samples.stats.cache_hits.values())
    print(_kernels.HAS_AVX2, hits, digest.hexdigest())
"""


def run_script(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(maxsplit=2)


@pytest.mark.soak
def test_crops_are_the_same_without_avx2_and_take_no_code_for_it_from_the_cache(tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    has_avx2, hits, digest = run_script(CROPS, **cache)
    assert (has_avx2, hits) == (str(kernels.HAS_AVX2), "0")
    assert run_script(CROPS, **cache) == [has_avx2, "1", digest]
    generic = {**cache, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert run_script(CROPS, **generic) == ["False", "0", digest]


@pytest.mark.soak
def test_a_change_in_a_module_that_a_kernel_calls_is_seen(tmp_path):
    package = tmp_path / "ffcv_ops"
    shutil.copytree(Path(ffcv_ops.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def run(module, old, new):
        source = (package / module).read_text()
        assert old in source
        (package / module).write_text(source.replace(old, new, 1))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        hits, boxes = done.stdout.split(maxsplit=1)
        return int(hits), boxes

    compiled, boxes = run("rng.py", "\nCROP = ", "\nCROP = 0 + ")
    assert compiled == 0
    assert run("units.py", '"""', '"""Not of any kernel. ') == (1, boxes)
    compiled, others = run("rng.py", "\nCROP = 0 + ", "\nCROP = 77 + ")
    assert compiled == 0 and others != boxes


def test_kernels_run_where_nothing_can_be_kept_on_disk():
    """As in a container whose files are read-only: Numba then refuses to be asked."""
    script = """
        from numba.core.caching import FunctionCache
        FunctionCache._impl_class._locator_classes = []
        from ffcv_ops import rng
        from ffcv_ops.operations import pillow_ops
        from ffcv_ops.codec import region
        from ffcv_ops.operations import resample, threads
        print(rng.uniform(0, 0, 0, 0, rng.CROP, 0))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == rng.uniform(0, 0, 0, 0, rng.CROP, 0)


def test_the_modules_that_a_kernel_uses_are_found():
    import ffcv_ops.operations.crops  # noqa: F401

    used = kernels._used_by("ffcv_ops.operations.crops", set())
    names = ("operations.crops", "codec.jpeg", "codec.region", "operations.resample", "rng", "operations.base")
    assert "ffcv_ops.operations.resample_avx2" in used and "ffcv_ops._kernels" in used
    assert {f"ffcv_ops.{name}" for name in names} <= used
    assert "ffcv_ops.loading.loader" not in used and all(name.startswith("ffcv_ops") for name in used)


@pytest.mark.parametrize("setting", ["NUMBA_CPU_NAME=generic", "NUMBA_DISABLE_JIT=1"])
def test_no_code_for_avx2_without_a_compiler_for_it(setting):
    name, value = setting.split("=")
    command = [sys.executable, "-c", "from ffcv_ops import _kernels; print(_kernels.HAS_AVX2)"]
    done = subprocess.run(command, env={**os.environ, name: value}, capture_output=True, text=True, timeout=600)
    assert done.stdout == "False\n", done.stderr


def test_a_long_compilation_is_logged_once(monkeypatch, caplog):
    import numba

    monkeypatch.setattr(kernels, "_LONG_S", 0)
    monkeypatch.setattr(kernels._compilation_notice, "logged", False)
    for module in ("another", "ffcv_ops.of_this_test", "ffcv_ops.of_this_test"):

        def increment(number):
            return number + 1

        increment.__module__ = module
        assert numba.njit(increment)(1) == 2
        assert len(caplog.records) == (module != "another")
    assert caplog.records[0].name == "ffcv_ops" and "takes about a minute" in caplog.text
