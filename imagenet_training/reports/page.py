"""Pages that need no other file: HTML with style, charts and images inside. A page has no script and loads nothing.

The templates are in ``templates/``. Jinja escapes all text.
"""

import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ops.files import replace_text
from ffcv_ops.units import show_duration
from imagenet_training.reports import charts


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template with values into a page. An earlier page is replaced whole."""
    import jinja2

    loader = jinja2.PackageLoader("imagenet_training.reports")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "duration": show_duration, "moment": show_moment}
    environment.filters |= {"setting": show_setting, "image_url": image_url, "svg": charts.draw_svg}
    text = environment.get_template(f"{template}.html.jinja").render(colors=charts.COLORS, now=time.time(), **values)
    replace_text(path, text.encode("utf-8", "replace").decode("utf-8"))  # a file's name can hold bytes that are no text


def percent(share: float | None, decimals: int = 2) -> str:
    """Return a share in [0, 1] as text, such as ``76.15 %``; ``-`` if there is none."""
    return "-" if share is None else f"{100 * share:.{decimals}f} %"


def show_moment(time_s: float) -> str:
    """Return seconds since 1970 as local time, such as ``2026-01-31 12:00``."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time_s))


def show_setting(value: Any) -> str:
    """Return the value of a recipe's key as text."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def image_url(image: np.ndarray) -> str:
    """Return an image, uint8 (H, W, 3) in RGB, as the URL of a JPEG inside the page."""
    from PIL import Image

    picture, buffer = Image.fromarray(image), io.BytesIO()
    factor = -(-96 // min(picture.size))  # browsers blur what they enlarge
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
