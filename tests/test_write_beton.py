"""write_beton.py as people run it: what it prints, what it leaves behind, its exit status."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from terminals import run_on_terminal, screen

from ffcv_ops.beton.reading import read_beton

SCRIPT = Path(__file__).parents[1] / "write_beton.py"
PHOTOGRAPHS = load_sample_images().images


def run(*arguments, status=0, **options):
    """Run the script; return what it printed."""
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    output = process.stdout + process.stderr
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two splits of small photographs, in four classes."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 24), ("val", 12)):
        for number in range(count):
            path = folder / split / f"class_{number % 4}" / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PHOTOGRAPHS[number % 2][number : number + 90, number : number + 120]).save(path)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Images whose decoding takes seconds, for runs to be interrupted."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "class").mkdir()
    for number in range(6):
        image = np.kron(PHOTOGRAPHS[number % 2][:400, number:500], np.ones((4, 4, 1), np.uint8))
        Image.fromarray(image).save(folder / "class" / f"{number}.jpg")
        for copy in range(1, 10):
            shutil.copy(folder / "class" / f"{number}.jpg", folder / "class" / f"{number}_{copy}.jpg")
    return folder


@pytest.fixture
def written(data, tmp_path):
    """A train file that has been written, its folder for others."""
    run("--split", "train", "--source", data / "train", "--target", tmp_path / "train.beton", "--num_workers=2")
    return tmp_path / "train.beton"


def test_both_splits_and_the_check_of_their_files(data, written):
    output = run("--split=val", f"--source={data / 'val'}", f"--target={written.parent / 'val.beton'}")
    assert "12 images of about" in output and "12 images, " in output and "4 classes of 3 images" in output
    assert "digest sha256:" in output
    both = f"--data.train_dataset={written} --data.val_dataset={written.parent / 'val.beton'}"
    assert f"train_imagenet.py --config-file rn50_configs/finetune.yaml {both}\n" in output
    assert read_beton(written).num_samples == 24
    assert read_beton(written.parent / "val.beton").classes == [f"class_{number}" for number in range(4)]
    assert "sound" in run("--verify", written, "--num_workers=1")


def test_the_target_is_beside_the_folder(data, tmp_path):
    shutil.copytree(data / "val", tmp_path / "val")
    output = run("--split=val", "--source", "val", cwd=tmp_path)
    assert "train.beton.json: not there, so the classes are not numbered" in output
    assert read_beton(tmp_path / "val.beton").num_samples == 12


def test_workers_run_the_code_of_the_script(data, tmp_path):
    """Though packages of the same name are installed, and lie in the current folder."""
    (tmp_path / "here").mkdir()
    for name in ("installed", "here") if sys.version_info >= (3, 11) else ("installed",):
        (tmp_path / name / "ffcv_ops").mkdir(parents=True)
        (tmp_path / name / "ffcv_ops" / "__init__.py").touch()
    paths = ["--source", data / "val", "--target", tmp_path / "val.beton"]
    run(*paths, cwd=tmp_path / "here", env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")})


def test_settings_come_from_a_file_too(data, tmp_path):
    recipe = tmp_path / "write.yaml"
    recipe.write_text(f"write:\n  source: {data / 'train'}\n  mode: raw\n  max_side: 64\n  subset: 10\n")
    run("--config-file", recipe, "--target", tmp_path / "train.beton", "--max_side=32")
    found = read_beton(tmp_path / "train.beton")
    assert found.num_samples == 10
    assert (found.metadata["f0"]["mode"] == 1).all() and (found.metadata["f0"]["width"] == 32).all()


def test_help_explains_every_setting():
    output = run("--help")
    for name in ("split", "source", "target", "mode", "max_side", "quality", "num_workers", "raw_share", "subset"):
        assert f"--{name}" in output
    for name in ("seed", "page_size", "on_error", "overwrite", "verify", "smart_threshold", "train_manifest"):
        assert f"--{name}" in output


def test_mistakes_are_named_before_any_work(data, written, tmp_path):
    source = data / "train"
    before = sorted(tmp_path.rglob("*"))
    mistakes = [
        ([], "--split train"),
        (["--source", tmp_path / "missing"], "no such folder"),
        (["--source", tmp_path / "neither" / "there"], "there: no such folder; --source names the one"),
        (["--source", data], f"use --source {data / 'train'}"),
        (["--source", source, "--target", written], "use --overwrite"),
        (["--source", source, "--qualty=3"], "did you mean --quality"),
        (["--source", source, "--mode=png"], "one of jpg, raw, proportion, smart"),
        (["--source", source, "--target", tmp_path / "new.beton", "--page_size=1000000"], "power of two"),
        (["--verify", tmp_path / "missing"], "no such file"),
        (["--verify", written, "--num_workers=0"], "num_workers must be -1 (all CPUs) or at least 1"),
        (["--split=val", "--source", source, "--target", tmp_path / "v", "--train_manifest", SCRIPT], "not a readable"),
    ]
    for arguments, message in mistakes:
        assert message in run(*arguments, status=2)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_val_folder_with_other_classes_is_refused(data, written, tmp_path):
    shutil.copytree(data / "val", tmp_path / "other")
    (tmp_path / "other" / "class_2").rename(tmp_path / "other" / "class_9")
    arguments = ["--split=val", "--source", tmp_path / "other", "--target", tmp_path / "val.beton"]
    assert "it lacks class_2; has also class_9" in run(*arguments, status=2)
    assert not (tmp_path / "val.beton").exists()


def test_a_val_folder_without_some_classes_is_written_and_described(data, written, tmp_path):
    shutil.copytree(data / "val", tmp_path / "val")
    arguments = ["--split=val", "--source", tmp_path / "val", "--target", tmp_path / "val.beton"]
    for path in (tmp_path / "val" / "class_1").iterdir():
        path.unlink()
    assert "class_1: class folder without an image; remove it" in run(*arguments, status=2)
    (tmp_path / "val" / "class_1").rmdir()
    output = run(*arguments)
    assert "has no images of 1 of the training split's 4 classes: class_1; " in output
    assert read_beton(tmp_path / "val.beton").classes == read_beton(written).classes
    assert 1 not in read_beton(tmp_path / "val.beton").labels
    assert "4, each of 0 to 3 images, median 3: class_0, class_1" in run("--inspect", tmp_path / "val.beton")


def test_bad_images_stop_or_are_skipped(data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "train")
    bad = tmp_path / "train" / "class_1" / "5.JPEG"
    bad.write_bytes(bad.read_bytes()[:1000])
    message = run("--source", tmp_path / "train", status=2)
    assert str(bad) in message and "--on_error=skip" in message
    assert list(tmp_path.glob("train.beton*")) == []
    assert "skipped class_1/5.JPEG: OSError" in run("--source", tmp_path / "train", "--on_error=skip")
    assert read_beton(tmp_path / "train.beton").num_samples == 23


def test_a_bad_image_may_have_any_name(data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "train")
    (tmp_path / "train" / "class_1" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no image")
    output = run("--source", tmp_path / "train", "--on_error=skip", env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert "skipped class_1/caf\\udce9.jpg: UnidentifiedImageError" in output and "BytesIO" not in output


def test_the_check_of_a_damaged_file_lists_the_samples(written):
    entry = read_beton(written).alloc_table[9]
    with open(written, "r+b") as file:
        file.seek(int(entry["ptr"] + entry["size"]) - 50)
        file.write(bytes(50))
    output = run("--verify", written, status=1)
    assert "damaged: sample 9: " in output and "1 bad samples" in output
    os.truncate(written, written.stat().st_size - 1)
    assert "allocation table is cut" in run("--verify", written, status=1)


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted runs


def begin(large, target, *arguments, **options):
    """Start a run that takes seconds and makes many pages."""
    command = [sys.executable, SCRIPT, "--source", large, "--target", target, "--mode=raw", "--page_size=2097152"]
    command += ["--num_workers=1", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def wait_for(condition, process, limit_s=60):
    start_s = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - start_s < limit_s
        time.sleep(0.01)


def in_progress(target, num_bytes):
    partial = Path(f"{target}.partial")
    return lambda: partial.exists() and partial.stat().st_size >= num_bytes


def test_killed_runs_go_on_and_make_the_same_bytes(large, tmp_path):
    undisturbed = begin(large, tmp_path / "whole.beton")
    assert undisturbed.wait(60) == 0
    target = tmp_path / "killed.beton"
    journal = Path(f"{target}.partial.journal")
    moments = [
        in_progress(target, 1),
        lambda: journal.exists() and journal.read_bytes().count(b"\n") > 1,
        in_progress(target, 20 << 20),
    ]
    for moment in moments:
        process = begin(large, target)
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not target.exists()
    process = begin(large, target)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "resuming: " in output
    assert target.read_bytes() == (tmp_path / "whole.beton").read_bytes()
    digests = {json.loads(Path(f"{path}.json").read_text())["digest"] for path in (target, tmp_path / "whole.beton")}
    assert len(digests) == 1


@pytest.mark.soak
def test_twenty_kills_at_random_moments_change_no_byte(large, tmp_path):
    process = begin(large, tmp_path / "whole.beton")
    wait_for(in_progress(tmp_path / "whole.beton", 0), process)
    started = time.monotonic()
    assert process.wait(600) == 0
    duration_s = time.monotonic() - started
    draw = np.random.default_rng(0)
    num_killed = num_resumed = 0
    while num_killed < 20:
        target = tmp_path / f"killed_{num_killed}.beton"
        process = begin(large, target)
        wait_for(in_progress(target, 0), process)
        time.sleep(draw.uniform(0, duration_s))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if target.exists() and not Path(f"{target}.partial.journal").exists():  # through before its moment came
            target.unlink()
            continue
        num_killed += 1
        process = begin(large, target)
        output = process.communicate()[0]
        assert process.returncode == 0, output
        num_resumed += "resuming: " in output
        assert target.read_bytes() == (tmp_path / "whole.beton").read_bytes()
        target.unlink()
    print(f"{num_killed} runs killed, {num_resumed} went on where they were, all with the same bytes")
    assert num_resumed >= 2


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129)],
)
def test_a_signal_ends_the_run_in_seconds(large, tmp_path, number, name, status):
    """The signal reaches every process of the terminal, as when somebody presses the keys."""
    target = tmp_path / "file.beton"
    process = begin(large, target, start_new_session=True)
    wait_for(in_progress(target, 8 << 20), process)
    start_s = time.monotonic()
    os.killpg(process.pid, number)
    output = process.communicate(timeout=20)[0]
    assert time.monotonic() - start_s < 5
    assert process.returncode == status
    assert f"stopped by {name}; the same command goes on" in output and "Traceback" not in output
    assert not target.exists() and Path(f"{target}.partial.journal").exists()


def run_patched(patch, *arguments):
    """Run the command in a process whose module `write_beton` has been patched."""
    program = f"import sys, write_beton\n{patch}\nsys.exit(write_beton.main({[*map(str, arguments)]!r}))\n"
    return subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parent, capture_output=True, text=True)


def test_a_check_that_is_stopped_promises_nothing(written):
    patch = "def interrupt(*arguments):\n    raise KeyboardInterrupt\nwrite_beton.run_verify = interrupt"
    process = run_patched(patch, "--verify", written)
    assert process.returncode == 130 and process.stderr == "stopped by Ctrl-C\n"


@pytest.mark.parametrize("name", ["write", "verify", "describe"])
def test_a_bug_keeps_its_traceback(data, written, tmp_path, name):
    """Only a `UserError` is a user's mistake. NumPy raises ValueError too."""
    patch = f"import numpy as np\nwrite_beton.{name} = lambda *_, **__: np.zeros(2) + np.zeros(3)"
    arguments = {
        "write": ["--source", data / "train", "--target", tmp_path / "bug.beton"],
        "verify": ["--verify", written],
        "describe": ["--inspect", written],
    }
    process = run_patched(patch, *arguments[name])
    assert process.returncode == 1
    assert "Traceback" in process.stderr and "<lambda>" in process.stderr
    assert "ValueError: operands could not be broadcast" in process.stderr and "error: oper" not in process.stderr


def test_torch_is_imported_for_a_sheet_alone(written, tmp_path):
    patch = "import atexit\natexit.register(lambda: print('torch' in sys.modules))"
    for sheet, expected in ((), "False"), (("--sheet", tmp_path / "sheet.png"), "True"):
        process = run_patched(patch, "--inspect", written, *sheet)
        assert process.stdout.splitlines()[-1] == expected, process.stderr


def test_no_process_outlives_a_killed_run(large, tmp_path):
    process = begin(large, tmp_path / "file.beton", start_new_session=True)
    wait_for(in_progress(tmp_path / "file.beton", 8 << 20), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # returns when the last process that could print has ended
    start_s = time.monotonic()
    while time.monotonic() - start_s < 10:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process of the killed run is still there")


def test_a_disk_that_takes_no_more_ends_the_run(large, tmp_path):
    """A limit on the size of files stands in for a full disk: both fail in the write."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12 << 20, 12 << 20))

    target = tmp_path / "file.beton"
    process = begin(large, target, preexec_fn=limit)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "writing stopped (File too large)" in output and "the same command goes on" in output
    assert not target.exists()


def test_inspect_tells_and_draws_only_what_it_is_asked_for(written, tmp_path):
    before = {*tmp_path.iterdir()}
    output = run("--inspect", written, env={**os.environ, "COLUMNS": "60"})
    assert {*tmp_path.iterdir()} == before
    assert "24, all JPEG" in output and "4, each of 6 images: class_0, class_1, class_2, class_3" in output
    assert "width     120 px" in output and "sha256:" in output and "shorter side (px)" in output
    bars = [line for line in output.splitlines() if line.endswith("#")]
    assert bars and max(map(len, bars)) <= 60
    run("--inspect", written, "--sheet", tmp_path / "sheet.png")
    assert {*tmp_path.iterdir()} - before == {tmp_path / "sheet.png"}
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    first = PHOTOGRAPHS[0][0:90, 0:120]  # the first image of the first class, in its square of 120 px magnified twice
    shown = sheet[40:280:2, 10:250:2][15:105]
    assert np.abs(shown.astype(int) - first).mean() < 12


def test_inspect_names_what_it_cannot_do(written, tmp_path):
    (tmp_path / "none.beton").write_bytes(b"no beton")
    for arguments, message in (
        (["--inspect", tmp_path / "missing.beton"], "no such file"),
        (["--inspect", tmp_path / "none.beton"], "damaged or not a .beton file"),
        (["--inspect", written, "--sheet", tmp_path / "nowhere" / "a.png"], "there is no folder"),
        (["--inspect", written, "--sheet", written], "this file exists and is no PNG: choose another name"),
        (["--inspect", written, "--sheet", "s.JPG"], "error: --sheet s.JPG: the file is a PNG: name it s.png"),
        (["--sheet", "a.png"], "--sheet needs --inspect"),
        (["--inspect", written, "--verify", written], "--verify and --inspect are two commands: pass one of them"),
        (["--inspect", written, "--split=train"], "--inspect and --split are two commands"),
    ):
        assert message in run(*arguments, status=2)


def test_a_terminal_shows_a_bar_and_piped_output_says_what_comes_next(data, tmp_path):
    target = tmp_path / "a b.beton"
    command = [
        sys.executable,
        str(SCRIPT),
        "--split",
        "train",
        "--source",
        str(data / "train"),
        "--target",
        str(target),
    ]
    status, text = run_on_terminal([*command, "--num_workers=1"], columns=50, env={**os.environ, "NO_COLOR": "1"})
    assert status == 0 and "24/24 [" in text and "\x1b[3" not in text
    assert max(len(part) for part in text.replace("\n", "\r").split("\r") if "/24 [" in part) <= 50
    lines = screen(text)
    assert any(line.startswith("settings  mode jpg, max_side 500, quality 90, seed 0") for line in lines)
    (check,) = (shlex.split(line)[1:] for line in lines if line.startswith("  check "))
    assert check == ["python", "write_beton.py", "--verify", str(target)]
    assert "sound" in run(*check[2:])


def test_a_reader_that_goes_away_ends_the_run(large, tmp_path):
    target = tmp_path / "file.beton"
    command = [sys.executable, SCRIPT, "--source", large, "--target", target, "--num_workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == (
        "stopped since the reader of the output is gone; the same command goes on from what is on disk\n"
    )
    assert process.wait(timeout=20) == 141 and not target.exists()


def test_output_on_a_full_disk_ends_no_run(data, tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, SCRIPT, "--source", data / "val", "--target", tmp_path / "file.beton"]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert process.returncode == 0 and process.stderr == b"", process.stderr
    assert read_beton(tmp_path / "file.beton").num_samples == 12


def test_a_script_without_its_guard_gets_the_right_message(data, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom ffcv_ops.writing.writer import write\nwrite(sys.argv[1], sys.argv[2], num_workers=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, script, data / "val", tmp_path / "file.beton"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert 'needs the guard `if __name__ == "__main__":` before the call' in done.stderr.splitlines()[-1], done.stderr
    assert "memory" not in done.stderr and list(tmp_path.iterdir()) == [script]
