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

RIGHT_COLOR, WRONG_COLOR = "#00664B", "#B34700"  # Okabe and Ito's green and vermilion, darkened to read well as text
QUALITIES = (70, 50, 35, 20, 10)  # of a picture on a page, until it is small enough


def escaped_markdown(text: str) -> str:
    """Text in which nothing is markup: no cell ends, no link, picture or tag begins."""
    return re.sub(r"([\\`*_~&|\[\]<>])", r"\\\1", text)


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
    environment.filters["code"] = lambda value: f"`{_folded(value).replace('`', chr(39)) or ' '}`"
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # YAML knows no halves of characters
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


def shown_pixels(pixels: np.ndarray) -> np.ndarray:
    """What `load_images` returns for a model that sees, as (H, W, 3) uint8: black where no depth was measured."""
    return pixels if pixels.dtype == np.uint8 else np.rint(255 * np.nan_to_num(pixels)).astype(np.uint8)


def picture_uri(pixels: np.ndarray, *, width: int, most: int) -> str:
    """A picture (H, W, 3) uint8, at most `width` pixels wide, as a URI that holds it; WebP.

    Its quality is lowered until it has at most `most` characters, or is as low as can be looked at.
    """
    picture = Image.fromarray(pixels)
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    for quality in QUALITIES:
        stream = io.BytesIO()
        picture.save(stream, "WEBP", quality=quality)
        uri = f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
        if len(uri) <= most:
            break
    return uri
