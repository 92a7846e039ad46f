"""What the documents say holds: commands and code run as printed, on small data in the place of ImageNet.

Of the commands of README.md and docs/ the first of each kind runs, in their order, in one folder that stands for a
clone. `SUBSTITUTIONS` are all that is changed in it. Of a kind that ran already (`MODES`), training commands run with
--dry_run, and of others the script's parser reads the arguments. What cannot run here is in `NOT_RUN` with the reason;
of that at least the files that are named, the flags and the settings must exist.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cv2
import pytest
import timm
import torch
import yaml
from betons import photographs
from documents import DOCUMENTS, ROOT, Block, Command, anchors, blocks, code_spans, commands, links, named_file
from torch.distributed.run import get_args_parser

import write_beton
from ffcv_ops.settings.collect import read_settings
from ffcv_ops.settings.declare import parameters_of
from imagenet_training import ModelCard
from imagenet_training.models.architectures import build_model
from imagenet_training.models.export import export_weights
from imagenet_training.planning.recipe import FLAGS, Recipe, read_recipe

pytestmark = pytest.mark.slow

# (what is printed, what runs, in commands)
SUBSTITUTIONS = [
    (r"(--split (train|val))(?!.*--source)", r"\1 --source {data}/\2"),  # instead of the default, /fsx/ns1
    (r"(?<![\w.])/(fsx/ns1|data/imagenet|data|scratch)(?=/|$)", "{data}"),  # the folder of train/ and val/
    (r"--nproc_per_node[= ]\d+", "--nproc_per_node=2"),
    (r"--epochs[= ]\d+", "--epochs 1"),
    (r"--batch_size[= ]\d+", "--batch_size 8"),
    (r"num_workers=\d+", "num_workers=1"),
    (r"(--resume[= ]\S+)", r"\1 --epochs 2"),  # one more than the run before it had
]
# Every training command also reads this file, behind its own: a network of a few thousand weights on small images.
SMALL_RUN = {
    "model": {"arch": "test_resnet", "num_classes": 4},
    "data": {"train_dataset": "{data}/train.beton", "val_dataset": "{data}/val.beton", "num_workers": 1},
    "resolution": {"min_res": 32, "max_res": 32, "start_ramp": 0, "end_ramp": 0},
    "lr": {"warmup_epochs": 0},
    "training": {"batch_size": 8, "epochs": 1},
    "validation": {"resolution": 32, "batch_size": 8},
    "wandb": {"enable": 0},
}
# (what is printed, what runs, in Python)
PYTHON_SUBSTITUTIONS = [
    (r"(?<=\")/(fsx/ns1|data)/", "{data}/"),
    (r"batch_size=\d+", "batch_size=8"),
    (r"num_workers=\d+", "num_workers=1"),
    (r"(RandomResizedCrop|CenterCrop)\(224", r"\1(32"),
    (r"skip=\d+", "skip=1"),
    (r"(range\(|max_epochs=)\d+", r"\g<1>2"),
    (r"\bresnet50\b(?!-)", "resnet18"),  # the function, not a file
]
# (commands, why they do not run here)
NOT_RUN = [
    (r"make ", "each target has a test of its own, or is what runs these tests; `make -n` shows that it is there"),
    (r"source |export |cd |trap ", "changes the shell that reads it"),
    (
        r"(sudo|apt|apt-get|conda|docker|pip|python -m pip|git|wandb|rsync|curl|wget) ",
        "changes the machine, or needs a network",
    ),
    (r"(sbatch|srun) ", "needs Slurm"),
    (r"'?(dask |openssl |file=|tls=)|python write_beton.py .*--cluster", "tests/test_cluster.py starts clusters"),
    (r"(until|while|for|if) ", "a loop of the shell around what is shown elsewhere"),
    (r"bash (launch|benchmarks)/", "needs a GPU, a terminal or other machines"),
    (r"python -m imagenet_training.doctor", "imports everything several times; tests/test_doctor.py runs it"),
    (r"torchrun .*(--nnodes[= ]|HEAD)", "needs two machines"),
    (r"torchrun ", "each process takes its seconds to start; `pytest -m soak` runs it"),
    (r"python benchmarks/", "minutes of measuring"),
]
SOAKED = r"torchrun (?!.*(--nnodes|HEAD))"
# The words by which commands with one script differ in what they do.
MODES = {"--dry_run", "--preview", "--eval_only", "--resume", "--inspect", "--verify", "--help", "train", "val"}
# Words in capitals that a reader replaces: {data} is the folder that stands for ImageNet.
PLACEHOLDERS = {"IMAGE_FOLDER": "{data}/train", "RUN_FOLDER": ".", "ANOTHER_RUN_FOLDER": "another_run"}
# What an installed package calls the scripts.
CONSOLE = {"write-beton": "python write_beton.py", "train-imagenet": "python train_imagenet.py"}
# Files of others that documents name.
FOREIGN_FILES = {
    "path/to/ffcv-imagenet/rn50_configs/rn50_16_epochs.yaml": "lr:\n  lr: 1.7\n  lr_schedule_type: cyclic\n"
    "training:\n  epochs: 16\n  bn_wd: 0.0\n  use_blurpool: 1\n  distributed: 0\nlogging:\n  log_level: 1\n",
}
# Flags of others that documents name, by their owner.
FOREIGN_FLAGS = {
    "sbatch": {"nodes", "time", "partition", "account", "cpus-per-task", "gpus-per-node", "requeue", "signal"},
    "srun": {"exclusive", "ntasks-per-node"},
    "dask": {"host", "interface", "no-dashboard", "nworkers"},
    "docker": {"device", "ipc", "network", "shm-size", "ulimit"},
    "pip": {"no-deps", "no-build-isolation", "upgrade"},
    "timm": {"mixup", "cutmix", "aa", "remode", "sched-on-updates", "warmup-prefix"}
    | {"warmup-lr", "min-lr", "opt", "no-prefetcher", "train-interpolation"},
    "torchvision": {"ra-sampler"},
    "anybody": {"section.key"},
    "wandb": {"append"},
}
# What the tests of a command share: a process that has imported everything forks for each.
SERVER = """
import gc, json, os, runpy, sys
sys.path.insert(0, sys.argv[1])
import cv2, matplotlib.pyplot, timm, torch, torchvision
import train_imagenet, write_beton, imagenet_training.preview
gc.freeze()  # or each process, as it ends, would look at all that was imported: 2 s
def run(kind, target, argv):
    sys.argv = [target, *argv]
    if kind == "module":
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    elif kind == "script":
        sys.path[0] = os.getcwd()
        runpy.run_path(target, run_name="__main__")
    else:
        exec(compile(target, "<document>", "exec"), {"__name__": "__main__"})
for line in sys.stdin:
    kind, target, argv, folder, log, environment = json.loads(line)
    process = os.fork()
    if not process:
        for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY), (2, log, os.O_WRONLY)):
            os.dup2(os.open(path, mode | os.O_APPEND), number)
        os.chdir(folder)
        os.environ.update(environment)
        run(kind, target, argv)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class World:
    """A clone of the repository with small data in the place of ImageNet, and the process that runs commands in it."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder / "clone", folder / "data"
        self.folder.mkdir()
        for path in ROOT.iterdir():
            if path.name not in ("demo", "logs", "checkpoints", "runs"):
                (self.folder / path.name).symlink_to(path)
        names = ["n01440764", "n01443537", "n01484850", "n01491361"]
        for split, count in (("train", 24), ("val", 8)):
            for number, image in enumerate(photographs(count)):
                path = self.data / split / names[number % 4] / f"{split}_{number:08d}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(path.with_suffix(".jpg")), image[:, :, ::-1])
                path.with_suffix(".jpg").rename(path)
        self.write("small_run.yaml", yaml.safe_dump(SMALL_RUN))
        for name, text in FOREIGN_FILES.items():
            self.write(name, text)
        self.log = folder / "log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(ROOT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.substitute(text, SUBSTITUTIONS))

    def substitute(self, text: str, substitutions: list[tuple[str, str]]) -> str:
        for printed, run in substitutions:
            text = re.sub(printed, run, text, flags=re.MULTILINE)
        return text.replace("{data}", str(self.data))

    def run(
        self, kind: str, target: str, argv: list[str], folder: Path, environment: dict[str, str]
    ) -> tuple[int, str]:
        """Exit status and output of a script, a module or code."""
        self.log.write_text("")
        assert self.server.stdin and self.server.stdout
        print(
            json.dumps([kind, target, argv, str(folder), str(self.log), environment]),
            file=self.server.stdin,
            flush=True,
        )
        return int(self.server.stdout.readline()), self.log.read_text()

    def write_data(self) -> None:
        """Write the .beton files, unless a command has."""
        for split in ("train", "val"):
            if not (self.data / f"{split}.beton").exists():
                status, output = self.run(
                    "script", "write_beton.py", ["--source", f"{self.data}/{split}"], self.folder, {}
                )
                assert status == 0, output

    def write_model(self) -> None:
        """Write a picture, and weights of this project and of another, where documents name them."""
        classes = sorted(path.name for path in (self.data / "val").iterdir())
        card = ModelCard({"arch": "test_resnet", "library": "timm", "num_classes": 4}, classes=classes)
        cv2.imwrite(str(self.data / "dog.jpg"), photographs(1)[0])
        (self.data / "checkpoints").mkdir(exist_ok=True)
        weights = self.data / "checkpoints" / "resnet50-weights.safetensors"
        export_weights(weights, build_model(**card.model).state_dict(), card)
        theirs = {f"_{name}": value for name, value in timm.create_model("tf_efficientnet_lite0").state_dict().items()}
        torch.save(theirs, self.data / "efficientnet-lite0.pth")

    def close(self) -> None:
        self.server.communicate()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    for document in DOCUMENTS:
        for block in blocks(document):
            name = named_file(block)
            if name and not name.endswith(".py"):
                world.write(name, "\n".join(block.lines).split("\n\n")[0])
    yield world
    world.close()


def unique_commands() -> list[Command]:
    """The commands of all documents, each once, in order."""
    found: dict[str, Command] = {}
    for document in DOCUMENTS:
        for block in blocks(document):
            for command in commands(block):
                found.setdefault(re.sub("|".join(CONSOLE), lambda name: CONSOLE[name[0]], command.text), command)
    return list(found.values())


COMMANDS = unique_commands()
PYTHON_BLOCKS = [
    block
    for document in DOCUMENTS
    for block in blocks(document)
    if block.language == "python" and not named_file(block)
]


def reason_not_to_run(command: Command) -> str | None:
    return next((reason for pattern, reason in NOT_RUN if re.match(pattern, shlex.join(command.words))), None)


def target_of(command: Command) -> tuple[str, str, list[str]]:
    """What a command runs: "script" or "module", which one, and its arguments."""
    program, *rest = command.words
    if program in CONSOLE:
        return "script", CONSOLE[program].split()[1], rest
    if program in ("python", "python3") and rest[:1] == ["-m"]:
        return "module", rest[1], rest[2:]
    if program in ("python", "python3") and rest[0].endswith(".py"):
        return "script", rest[0], rest[1:]
    if program == "torchrun":
        options = get_args_parser().parse_args(rest)
        return "script", options.training_script + ".py" * options.module, options.training_script_args
    script = next((word for word in rest if (ROOT / word).is_file()), None)
    if program in ("bash", "sbatch") and script:
        return "shell", script, rest[rest.index(script) + 1 :]
    raise AssertionError(
        f"{command.where}: no rule of tests/test_docs.py runs `{command.text}`. If it is no command, fence it "
        "as what it is. If it can run on 24 images, teach `target_of` its program; else give it a line in NOT_RUN, "
        "with the reason, and check what can be checked in `check_what_is_named`"
    )


def check_what_is_named(command: Command) -> None:
    """That the files, flags and settings of a command exist, though it does not run."""
    program = command.words[0]
    if program == "make":
        made = subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert not made.returncode, f"{command.where}: `{command.text}`: {made.stderr}"
    if program not in ("python", "python3", "torchrun", "bash", "sbatch") or command.words[1:3] == ("-m", "pip"):
        return
    kind, target, argv = target_of(command)
    if kind == "module":
        target = target.replace(".", "/") + ".py"
    assert (ROOT / target).is_file(), f"{command.where}: there is no {target}"
    if kind == "shell":
        subprocess.run(["bash", "-n", ROOT / target], check=True)
        if "train_imagenet.py" not in (ROOT / target).read_text():
            return
        target = "train_imagenet.py"
    check_settings(command, target, argv)


def check_settings(command: Command, target: str, argv: list[str]) -> None:
    """That the script's own parser takes the arguments; of scripts with argparse, that it knows the flags."""
    if target in ("train_imagenet.py", "write_beton.py"):
        there = shlex.split(re.sub(r"--(resume|model\.weights)[= ]\S+", "", shlex.join(argv)))
        try:
            if target == "train_imagenet.py":
                read_recipe(there)
            else:
                read_settings(write_beton.WriteBeton, there, flags=write_beton.FLAGS, description="")
        except SystemExit as error:
            assert not error.code, f"{command.where}: {target} refuses `{command.text}`; its message is above"
        return
    known = argparse_flags(ROOT / target)
    unknown = {word.split("=")[0] for word in argv if word.startswith("--")} - known
    assert not unknown, f"{command.where}: {target} has no {', '.join(unknown)}, only {', '.join(sorted(known))}"


def argparse_flags(path: Path) -> set[str]:
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    words = (word for call in calls if getattr(call.func, "attr", "") == "add_argument" for word in call.args)
    return {word.value for word in words if isinstance(word, ast.Constant) and str(word.value).startswith("--")}


def repeated_commands() -> set[Command]:
    """The commands that do what one before them has done, with other settings."""
    kinds, repeated = set(), set()
    for command in COMMANDS:
        if not reason_not_to_run(command):
            _, target, argv = target_of(command)
            kind = target, frozenset(argv) & MODES
            if kind in kinds:
                repeated.add(command)
            kinds.add(kind)
    return repeated


REPEATED = repeated_commands()


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{c.where} {c.text}"[:100] for c in COMMANDS])
def test_the_command_runs(world: World, command: Command) -> None:
    if reason_not_to_run(command) or (command in REPEATED and target_of(command)[1] != "train_imagenet.py"):
        check_what_is_named(command)
        return
    kind, target, argv = target_of(command)
    argv = shlex.split(world.substitute(shlex.join(argv), SUBSTITUTIONS).replace("'", ""))
    argv = [world.substitute(PLACEHOLDERS.get(word, word), []) for word in argv if word != "..."]
    if target == "train_imagenet.py":
        argv += ["--config-file", "small_run.yaml", *["--dry_run"] * (command in REPEATED)]
    if target == "imagenet_training.compare":
        shutil.copytree(world.folder / "logs", world.folder / "another_run" / "logs")
    environment = dict(variable.split("=", 1) for variable in command.variables)
    status, output = world.run(kind, target, argv, world.folder, environment)
    assert status == 0, (
        f"{command.where}: `{command.text}`, run as\n{target} {shlex.join(argv)}\nin {world.folder}, ended with exit "
        f"status {status}. (Commands run in the documents' order and rest on those before.)\n{output[-3000:]}"
    )
    assert output, f"{command.where}: `{command.text}` says nothing"


@pytest.mark.soak
@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(SOAKED, c.text)], ids=lambda c: c.text[:80])
def test_the_command_runs_with_several_processes(world: World, command: Command) -> None:
    world.write_data()
    text = world.substitute(command.text, SUBSTITUTIONS)
    text = re.sub(r"torchrun", f"{sys.executable} -m torch.distributed.run", text)
    text += " --config-file small_run.yaml" if "train_imagenet" in text else " --overwrite"
    done = subprocess.run(shlex.split(text), cwd=world.folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command.where}: {text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=[block.where for block in PYTHON_BLOCKS])
def test_the_code_runs(world: World, block: Block) -> None:
    code = "\n".join(block.lines)
    for name in sorted(set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    world.write_data()
    if "load_model" in code or "torch.load" in code:
        world.write_model()
    code = world.substitute(code, PYTHON_SUBSTITUTIONS)
    status, output = world.run("code", code, [], world.data, {})
    assert status == 0, f"{block.where}: this code ended with exit status {status}:\n{code}\n\n{output[-3000:]}"


def test_the_walkthrough_of_an_augmentation_works(tmp_path: Path) -> None:
    """Do in a copy of ffcv_ops what CONTRIBUTING.md describes, and run the test that the walkthrough ends with."""
    shutil.copytree(ROOT / "ffcv_ops", tmp_path / "ffcv_ops", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for name in ("betons.py", "image_operations.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    for block in blocks(ROOT / "CONTRIBUTING.md"):
        if name := named_file(block):
            with open(tmp_path / name, "a", encoding="utf-8") as file:
                file.write("\n" + "\n".join(block.lines) + "\n")
    public = tmp_path / "ffcv_ops" / "__init__.py"
    source = public.read_text(encoding="utf-8")
    source = source.replace('    "CenterCrop",\n', '    "CenterCrop",\n    "GaussianBlur",\n')
    source = source.replace("_HOMES = {\n", '_HOMES = {\n    "GaussianBlur": "operations.blur",\n')
    public.write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_blur.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in links(document):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name}: the link to {link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{document.name}: {target.name} has no heading #{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_that_is_named_exists(document: Path) -> None:
    ours = r"(ffcv_ops|imagenet_training|launch|docs|tests|benchmarks|rn50_configs|rn18_configs|\.ci)/[\w.*/-]+"
    created = {named_file(block) for block in blocks(document)}
    for span in code_spans(document):
        if re.fullmatch(ours, span) and span not in created:
            assert list(ROOT.glob(span)), f"{document.name} names {span}, which does not exist"
        elif re.fullmatch(r"[A-Z_]+\.md", span):
            assert any((folder / span).exists() for folder in (ROOT, ROOT / "docs")), f"{document.name}: no {span}"


def test_every_command_in_a_sentence_names_what_exists() -> None:
    for document in DOCUMENTS:
        spans = tuple(span for span in code_spans(document) if re.match(r"(make|bash|sbatch|python|torchrun) \S", span))
        for command in commands(Block(document, 0, "sh", spans)):
            if not re.search(r" -[ch]\b|[A-Z]{3,}$|\.\.\.", command.text):
                check_what_is_named(command)


@cache
def known_settings() -> set[str]:
    return {key for declared in (Recipe, write_beton.WriteBeton) for key in parameters_of(declared)}


@cache
def known_flags() -> set[str]:
    scripts = [
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("launch/*.py"),
        *ROOT.glob("ffcv_ops/**/*.py"),
        *ROOT.glob("imagenet_training/**/*.py"),
    ]
    torchrun = {word for action in get_args_parser()._actions for word in action.option_strings}
    ours = {f"--{name}" for name in (*FLAGS, *write_beton.FLAGS, *known_settings(), "config-file", "help")}
    others = {f"--{name}" for names in FOREIGN_FLAGS.values() for name in names}
    shell = {flag for path in ROOT.glob("*/*.sh") for flag in re.findall(r"(?m)^ +(--\w+)\)", path.read_text())}
    return ours | others | torchrun | shell | {flag for path in scripts for flag in argparse_flags(path)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_and_setting_that_is_named_exists(document: Path) -> None:
    flags, settings = known_flags(), known_settings()
    sections = "|".join(sorted({key.split(".")[0] for key in settings}))
    for span in code_spans(document):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", span):
            assert flag.rstrip(".") in flags, (
                f"{document.name} names {flag} (in `{span}`), which no script has. If it is another program's, add it "
                "to FOREIGN_FLAGS in tests/test_docs.py"
            )
        for section, name in re.findall(rf"(?<![\w./-])({sections})\.([a-z]\w*)(?![\w./]*\()", span):
            assert f"{section}.{name}" in settings, f"{document.name}: no setting {section}.{name} (`{span}`)"


def test_the_layers_in_contributing_are_those_of_the_linter() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    layers = re.findall(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    layers = [text for text in layers if "\n" in text.strip()]
    assert len(layers) == 2 and all("\n".join(re.findall(r'"(.+)"', text)) in contributing for text in layers)


def test_every_figure_of_the_readme_is_that_of_the_benchmarks() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    benchmarks = (ROOT / "docs" / "BENCHMARKS.md").read_text(encoding="utf-8")
    (row,) = (line for line in benchmarks.splitlines() if line.startswith("| jpg500-224 | stock |"))
    ratio = float(row.split("|")[5])
    (to_peer,) = (line for line in benchmarks.splitlines() if line.startswith("| to ffcv-imagenet's script |"))
    (from_file,) = (line for line in benchmarks.splitlines() if line.startswith("| `compiled-graph`, training from"))
    at_224, at_160 = (f"{float(cell):.1f}" for cell in to_peer.split("|")[3:5])
    expected = [f"{at_224} and {at_160}", f"{ratio:.1f}"]
    figures = re.findall(r"([\d.]+(?: and [\d.]+)?)\s+times", readme)
    assert figures == expected, f"README.md says {figures} times; docs/BENCHMARKS.md has {expected}"
    (rates,) = re.findall(r"at ([\d,]+) images/s of 224 px, and at ([\d,]+) of 160 px", readme)
    assert rates == tuple(f"{round(int(cell.replace(',', '')), -2):,}" for cell in from_file.split("|")[3:5])


def test_the_accuracies_of_the_readme_are_the_recipes_own() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    compared = 0
    for row in re.findall(r"^\| `.+\.yaml`.*$", readme, re.MULTILINE):
        names, epochs, _, stated = (cell.strip() for cell in row.strip("|").split("|"))
        first, *more = re.findall(r"`([\w.]+)`", names)
        if "..." in names:
            more = [first.replace("16ep", f"{number}ep") for number in epochs.split(", ")[1:]]
        figures = re.fullmatch(r"([\d., ]+) %", stated)
        if not figures:
            continue
        for name, figure in zip([first, *more], figures[1].split(", "), strict=True):
            (path,) = (path for folder in ("rn50_configs", "rn18_configs") for path in (ROOT / folder).glob(name))
            course = yaml.safe_load(path.read_text())["expected"]["val_acc1"]
            assert f"{max(course.items())[1]:.1f}" == figure or name == "resnet_strikes_back.yaml", name
            compared += 1
    assert compared >= 17
