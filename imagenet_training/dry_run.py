"""Print the plan of a run without starting it."""

from imagenet_training.augmentation import build_augmentations
from imagenet_training.data import planned_data
from imagenet_training.distributed import planned_world_size
from imagenet_training.loss import recipe_loss
from imagenet_training.model import drop_path_notices, model_size, recipe_meta_model
from imagenet_training.normalization import planned_normalization
from imagenet_training.plan import plan_run
from imagenet_training.recipe import Recipe
from imagenet_training.summary import resolved_recipe, summary
from imagenet_training.trial import try_model


def show_plan(recipe: Recipe) -> None:
    """Print the resolved recipe and its arithmetic. This needs no GPU and no data, but checks data that exist."""
    build_augmentations(recipe)  # an operation that does not exist is an error
    data = planned_data(recipe)
    recipe = planned_normalization(recipe)
    plan = plan_run(
        recipe,
        world_size=planned_world_size(recipe),
        num_train=data.num_train,
        num_val=data.num_val,
        class_counts=data.class_counts,
    )
    model = recipe_meta_model(recipe)
    try_model(recipe, plan, model, recipe_loss(recipe))
    print(summary(recipe, plan, model_size(model, recipe.validation.resolution)))
    print(f"\n{resolved_recipe(recipe)}")
    for line in [*recipe.notices, *plan.notices, *data.notices, *drop_path_notices(recipe, model)]:
        print(f"note: {line}")
