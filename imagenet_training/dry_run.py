"""Print the plan of a run without starting it."""

from ffcv_ops import machine
from imagenet_training.data.augmentation import build_augmentations
from imagenet_training.data.loaders import planned_data
from imagenet_training.data.normalization import settle_normalization
from imagenet_training.distributed import World, planned_world_size
from imagenet_training.models.architectures import drop_path_notices, model_size, recipe_meta_model
from imagenet_training.planning.plan import plan_run
from imagenet_training.planning.recipe import Recipe
from imagenet_training.run.changes import position_notices
from imagenet_training.run.resume import choose_checkpoint
from imagenet_training.run.summary import resolved_recipe, summary
from imagenet_training.training.loss import recipe_loss
from imagenet_training.training.trial import try_model


def show_plan(recipe: Recipe) -> None:
    """Print the resolved recipe and its arithmetic. This needs no GPU and no data, but checks data that exist."""
    if machine.rank():
        return  # torchrun starts this on every rank
    build_augmentations(recipe)  # an operation that does not exist is an error
    data = planned_data(recipe)
    point = choose_checkpoint(recipe, World())
    recipe = settle_normalization(recipe, point.content)
    plan = plan_run(
        recipe,
        world_size=planned_world_size(recipe),
        num_train=data.num_train,
        num_val=data.num_val,
        class_counts=data.class_counts,
        resumed=point.content,
        resumed_from=point.path,
    )
    model = recipe_meta_model(recipe)
    try_model(recipe, plan, model, recipe_loss(recipe))
    print(summary(recipe, plan, model_size(model, recipe.validation.resolution)))
    print(f"\n{resolved_recipe(recipe)}")
    notices = [*recipe.notices, *point.notices, *plan.notices, *data.notices, *drop_path_notices(recipe, model)]
    if point.content is not None:
        notices += position_notices(point.content, recipe, plan)
    for line in notices:
        print(f"note: {line}")
