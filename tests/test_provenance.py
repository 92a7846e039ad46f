"""The provenance of a run, and ranks that must have the same recipe and files with the same content."""

import pytest
import torch.distributed as dist
from betons import photographs, write_images

from ffcv_ops import UserError, read_beton
from imagenet_training.data.classes import ClassMatch
from imagenet_training.data.loaders import TrainingData
from imagenet_training.distributed import World, of_all_ranks
from imagenet_training.planning.plan import plan_run
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.run import provenance
from imagenet_training.run.provenance import check_ranks_agree, describe_run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("files"), photographs(4)
    labels = {"train": [0, 1, 0, 1], "copy": [0, 1, 0, 1], "other": [0, 1, 1, 0], "val": [0, 0, 1, 1]}
    return {
        name: read_beton(write_images(folder / f"{name}.beton", images, labels=chosen))
        for name, chosen in labels.items()
    }


@pytest.mark.parametrize(
    "argv, train, message",
    [
        (["--data.num_workers=3", "--data.train_dataset=copy.beton", "--no_wandb"], "copy", None),
        (
            ["--batch_size=8"],
            "train",
            "training.batch_size is 8 on rank 1, and 512 on rank 0: give all machines the same",
        ),
        ([], "other", "the content of data.train_dataset is 4 images, .* on rank 1, and 4 images, .* on rank 0"),
    ],
)
def test_ranks_of_other_settings_or_files_are_refused(files, monkeypatch, argv, train, message):
    facts = []
    monkeypatch.setattr(provenance, "of_all_ranks", lambda own: facts.append(own) or facts)
    check_ranks_agree(read_recipe([]), TrainingData(files["val"], ClassMatch(None), files["train"]))
    data = TrainingData(files["val"], ClassMatch(None), files[train])
    if message is None:
        check_ranks_agree(read_recipe(argv), data)
        return
    with pytest.raises(UserError, match=message):
        check_ranks_agree(read_recipe(argv), data)


def test_a_run_keeps_the_text_of_its_recipe_as_it_was_read(files, tmp_path):
    path, text = tmp_path / "recipe.yaml", "training: {batch_size: 2}  # a comment\n"
    path.write_text(text)
    recipe = read_recipe(["-C", str(path)])
    path.unlink()
    plan = plan_run(recipe, world_size=1, num_train=4, num_val=4)
    data = TrainingData(files["val"], ClassMatch(None), files["train"])
    assert describe_run(recipe, plan, data, World())["recipe_files"] == {str(path): text}


def test_values_come_from_all_ranks_in_their_order():
    assert of_all_ranks("alone") == ["alone"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert of_all_ranks({"a": 1}) == [{"a": 1}]
    finally:
        dist.destroy_process_group()
