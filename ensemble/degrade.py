"""What happens to an image on its way through the web, for augmentation and robustness tests."""

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from ensemble.recipe import Augment  # what only looks at images needs no recipe


def jpeg(image: Image.Image, quality: int, subsampling: int = 2) -> Image.Image:
    """An RGB image after one JPEG compression.

    quality: 1..100. subsampling: 0 for 4:4:4, 1 for 4:2:2, 2 for 4:2:0.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, subsampling=subsampling)
    return Image.open(buffer).convert("RGB")


def degrade(image: Image.Image, augment: "Augment", rng: np.random.Generator) -> Image.Image:
    """An image after the random degradations of `augment`, the same draws for both classes.

    Transparency is kept: the background comes later, with the contract.
    """
    if augment.jpeg is not None and rng.random() < augment.chance:
        low, high = augment.jpeg
        degraded = jpeg(image.convert("RGB"), int(rng.integers(low, high + 1)), int(rng.choice([0, 2])))
        if image.mode == "RGBA":
            degraded.putalpha(image.getchannel("A"))
        return degraded
    return image


def turn(pixels: np.ndarray, augment: "Augment", rng: np.random.Generator) -> np.ndarray:
    """uint8 [K, S, S, 3] after a random flip and quarter turns; every view turns alike."""
    if augment.flip and rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    if augment.quarter_turns:
        pixels = np.rot90(pixels, int(rng.integers(4)), axes=(1, 2))
    return np.ascontiguousarray(pixels)
