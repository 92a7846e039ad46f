"""The text of ``--help``."""

import shutil
import textwrap

from fastargs import Config

from ffcv_ops.settings.command_line import Flags
from ffcv_ops.settings.fields import default_of, parameters_of, show, strict


def help_text(config: Config, flags: Flags, description: str) -> str:
    """What ``--help`` prints: the description, then every key with its flag, type, default and explanation."""
    parameters = parameters_of(config)
    width = max(80, shutil.get_terminal_size().columns)
    lines = [
        description.strip(),
        "",
        "--config-file FILE (or -C) reads settings from a YAML file and may be repeated. Later wins: defaults, files",
        "in order, command line in order. --section.key=VALUE and --section.key VALUE are the same; the value None",
        "restores a default. Any mistake ends with exit status 2 before anything is done.",
    ]
    section = ""
    for key, param in parameters.items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines += ["", f"{section}: {param.section.desc}"]
        names = [f"--{key}"]
        for flag, target in flags.items():
            if target == key:
                names.append(f"--{flag}")
            elif isinstance(target, tuple) and target[0] == key:
                names.append(f"--{flag} (sets {target[1]})")
        default = "required" if param.required else f"default {show(default_of(key, param))}"
        lines.append(f"  {', '.join(names)}: {strict(param.checker).help()}; {default}")
        lines += textwrap.wrap(param.desc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
