"""The text of ``--help``."""

import shutil
import textwrap

from ffcv_ops.settings.command_line import Flags
from ffcv_ops.settings.declare import parameters_of
from ffcv_ops.settings.fields import show


def help_text(declared: type, flags: Flags, description: str) -> str:
    """Return the description, then each key with its flags, kind of value, default and explanation."""
    width = max(80, shutil.get_terminal_size().columns)
    lines = [
        description.strip(),
        "",
        "--config-file FILE (or -C) reads settings from a YAML file, and may be repeated. If a setting is given",
        "several times, the last value counts: defaults, then files, then the command line, each in order.",
        "--section.key=VALUE and --section.key VALUE are the same. The value None restores a default. If anything",
        "is wrong, the program ends with exit status 2 before it does anything.",
    ]
    section = ""
    for key, param in parameters_of(declared).items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines += ["", f"{section}: {param.section.desc}"]
        names = [f"--{key}"]
        for flag, target in flags.items():
            if target == key:
                names.append(f"--{flag}")
            elif isinstance(target, tuple) and target[0] == key:
                names.append(f"--{flag} (sets {target[1]})")
        default = "required" if param.required else f"default {show(param.default)}"
        lines.append(f"  {', '.join(names)}: {param.checker.help()}; {default}")
        lines += textwrap.wrap(param.desc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
