"""The strict front door to fastargs: settings from YAML files and the command line.

A program declares its settings as frozen dataclasses, one a section. The docstring of a section and the one below each
field are the explanations in ``--help``::

    @dataclass(frozen=True)
    class Training:
        \"\"\"Optimisation.\"\"\"

        epochs: int = setting(Integer(min=1), default=30)
        \"\"\"Passes over the training split.\"\"\"
        resume: str | None = setting(Text())
        \"\"\"Checkpoint to continue from.\"\"\"

    @dataclass(frozen=True, kw_only=True)
    class Recipe(Settings):
        training: Training

    recipe = read_settings(Recipe, sys.argv[1:], flags={"epochs": "training.epochs"}, description="Train a model.")
    recipe.training.epochs               # an int, for mypy too
    recipe.source("training.epochs")     # "default", the name of a file, or "command line"

The user then passes ``--config-file FILE``, ``--training.epochs=90`` or ``--epochs 90``. A wrong name or value ends the
program with exit status 2 and one line that names the place and the most similar name. `ffcv_ops.settings.fields` has
the kinds of values. fastargs' own way of collecting is not used: it ignores unknown keys, reads environment variables,
and exits with status 0 if a value is wrong.
"""

from ffcv_ops.settings.collect import Settings, read_settings
from ffcv_ops.settings.command_line import Flags
from ffcv_ops.settings.declare import setting
from ffcv_ops.settings.yaml_files import ShippedFiles

__all__ = ["Flags", "Settings", "ShippedFiles", "read_settings", "setting"]
