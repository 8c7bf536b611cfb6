"""HTML pages: templates that escape every value, and images as data URIs."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ensemble.images.canonical import WHITE
from ensemble.images.preprocess import flatten

SIDE = 256  # pixels; the longer side of a picture on a page


def render(template: str, **values: Any) -> str:
    """The template of this name in templates/, filled in; every value is escaped."""
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**values)


def picture(image: Image.Image) -> str:
    """A decoded image as the data URI of a small JPEG, what is transparent laid on white."""
    small = flatten(image, WHITE).copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return data_uri("image/jpeg", buffer.getvalue())


def data_uri(kind: str, data: bytes) -> str:
    """`data` as a URI that stands for a file of this MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
