"""Pages and cards: templates of this repository filled with text of which nothing becomes markup."""

import base64
import io
import re
from functools import cache
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from utils import ROOT, printable


def escaped_markdown(text: str) -> str:
    """Text in which nothing is markup: no cell ends, no link, picture or tag begins."""
    return re.sub(r"([\\`*|\[\]<>])", r"\\\1", text)


@cache
def _environment(*, markup: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT),
        autoescape=markup,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["md"] = lambda value: escaped_markdown(_folded(value))
    environment.filters["code"] = lambda value: f"`{_folded(value).replace('`', chr(39))}`"
    return environment


def _folded(value: object) -> str:
    return " ".join(printable(value).split())


def render(template: str, **values: Any) -> str:
    """Fill a template.

    Args:
        template: path in this repository. In `.html.j2` every value is escaped. In `.md.j2` words go through the filter
            `md`, which escapes markup and folds white space, or `code`, which puts them between backticks.
        values: for it. One that the template needs and does not get is an error.
    """
    return _environment(markup=template.endswith(".html.j2")).get_template(template).render(values)


def picture_uri(pixels: np.ndarray, *, width: int, quality: int = 70) -> str:
    """A picture (H, W, 3) uint8, at most `width` pixels wide, as a URI that holds it; WebP."""
    picture = Image.fromarray(pixels)
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
