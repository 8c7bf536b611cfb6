"""Traps in the pixels: compression before the last, resampling, content, for planted.py."""

from collections.abc import Callable, Sequence

import numpy as np
import planted_steps as steps
from PIL import Image
from planted_set import Kind, Planted, Style, any_of

PNG = ("png",)
SMALL = any_of((96, 96))  # where photos are few or tiles wide
Filter = Image.Resampling


def _half(of: Callable[[np.ndarray], float], upper: bool) -> Callable[[Sequence[Image.Image]], Sequence[int]]:
    """Picks the photos in the upper or lower half by a measure of their pixels, uint8 [64, 64, 3]."""

    def pick(photos: Sequence[Image.Image]) -> Sequence[int]:
        order = np.argsort([of(np.asarray(photo.resize((64, 64)), dtype=float)) for photo in photos], kind="stable")
        middle = len(order) // 2
        return [int(index) for index in (order[middle:] if upper else order[:middle])]

    return pick


def _colour(pixels: np.ndarray) -> float:
    return float((pixels.max(axis=2) - pixels.min(axis=2)).mean())


HIDDEN_JPEG = Kind(
    "earlier compression differs by class: an 8x8 grid in lossless files, a first JPEG, or where its grid lies",
    [
        Planted("PNG, real were JPEG 75", Style(PNG), Style(PNG, steps=[steps.jpeg_before(75, 75)])),
        Planted("PNG, ai were JPEG 85", Style(PNG, steps=[steps.jpeg_before(85, 85)]), Style(PNG), counts=(160, 100)),
        Planted(
            "lossless WebP, real were JPEG 80",
            Style(("webp-lossless",)),
            Style(("webp-lossless",), steps=[steps.jpeg_before(80, 80)]),
        ),
        Planted(
            "PNG, 70 % of real were JPEG 60 to 85",
            Style(PNG),
            Style(PNG, steps=[steps.jpeg_before(60, 85)]),
            real_share=0.7,
        ),
        Planted(
            "JPEG 95, real were JPEG 60",
            Style(quality=(95, 95)),
            Style(quality=(95, 95), steps=[steps.jpeg_before(60, 60)]),
        ),
        Planted(
            "JPEG 92, ai were JPEG 70 and cropped",
            Style(quality=(92, 92), steps=[steps.jpeg_before(70, 70, shifted=True)]),
            Style(quality=(92, 92)),
        ),
        Planted(
            "PNG, ai were JPEG 95 and real JPEG 60",
            Style(PNG, steps=[steps.jpeg_before(95, 95)]),
            Style(PNG, steps=[steps.jpeg_before(60, 60)]),
            table=True,
        ),
        Planted(
            "PNG, real were JPEG 75 and cropped",
            Style(PNG),
            Style(PNG, steps=[steps.jpeg_before(75, 75, shifted=True)]),
        ),
        Planted("TIFF, real were WebP 30 to 50", Style(("tiff",)), Style(("tiff",), steps=[steps.webp_before(30, 50)])),
        Planted(
            "PNG, all were JPEG 75, real were cropped since",
            Style(PNG, steps=[steps.jpeg_before(75, 75)]),
            Style(PNG, steps=[steps.jpeg_before(75, 75, shifted=True)]),
        ),
    ],
)

RESAMPLING = Kind(
    "resampling history differs by class: the mean spectra part company, in files that are alike",
    [
        Planted("real enlarged 2x, bicubic", Style(PNG), Style(PNG, steps=[steps.enlarged(2, Filter.BICUBIC)])),
        Planted("ai enlarged 1.5x, bilinear", Style(steps=[steps.enlarged(1.5, Filter.BILINEAR)]), Style()),
        Planted("ai enlarged 4x, Lanczos", Style(PNG, steps=[steps.enlarged(4, Filter.LANCZOS)]), Style(PNG)),
        Planted(
            "70 % of real enlarged 2x, bicubic",
            Style(quality=(90, 95)),
            Style(quality=(90, 95), steps=[steps.enlarged(2, Filter.BICUBIC)]),
            real_share=0.7,
        ),
        Planted("ai as taken, real reduced to half", Style(PNG, scale=(1, 1)), Style(PNG, scale=(0.5, 0.5))),
        Planted(
            "ai enlarged 2x by repeating pixels", Style(PNG, steps=[steps.enlarged(2, Filter.NEAREST)]), Style(PNG)
        ),
        Planted(
            "real enlarged 1.25x, bicubic",
            Style(PNG, sizes=SMALL, scale=(0.3, 0.7)),
            Style(PNG, sizes=SMALL, scale=(0.3, 0.7), steps=[steps.enlarged(1.25, Filter.BICUBIC)]),
        ),
        Planted(
            "ai reduced without a filter, real with one",
            Style(PNG, sizes=SMALL, scale=(0.3, 0.6), filter=Filter.NEAREST),
            Style(PNG, sizes=SMALL, scale=(0.3, 0.6)),
        ),
        Planted(
            "ai enlarged 2x, bicubic, WebP",
            Style(("webp",), (88, 95), steps=[steps.enlarged(2, Filter.BICUBIC)]),
            Style(("webp",), (88, 95)),
            table=True,
        ),
        Planted(
            "75 % of ai enlarged 2x, bilinear, JPEG 80 to 95",
            Style(quality=(80, 95), steps=[steps.enlarged(2, Filter.BILINEAR)]),
            Style(quality=(80, 95)),
            ai_share=0.75,
        ),
    ],
)

CONTENT = Kind(
    "a probe on small blurred thumbnails tells the classes apart: they show other things",
    [
        Planted("ai dark", Style(steps=[steps.brighter(0.35)]), Style()),
        Planted("real under a blue sky", Style(), Style(steps=[steps.under_sky])),
        Planted(
            "ai from the colourful half of the photos, real from the other",
            Style(PNG, sizes=SMALL, pick=_half(_colour, True)),
            Style(PNG, sizes=SMALL, pick=_half(_colour, False)),
            counts=(100, 100),
        ),
        Planted(
            "ai all faces, real none",
            Style(sizes=SMALL, steps=[steps.patch(0)]),
            Style(sizes=SMALL, steps=[steps.patch(100)]),
            counts=(100, 100),
        ),
        Planted("70 % of ai without colour", Style(steps=[steps.grey]), Style(steps=[steps.tinted(12, 0, -12)]), 0.7),
        Planted("real warm, ai neutral", Style(), Style(steps=[steps.tinted(22, 4, -22)])),
        Planted("ai a sharp disc before a dim background", Style(steps=[steps.portrait_blur]), Style()),
        Planted("70 % of ai on white", Style(("webp",), steps=[steps.on_white]), Style(("webp",)), ai_share=0.7),
        Planted("real lit from above", Style(), Style(steps=[steps.lit_from_above]), table=True),
        Planted("75 % of ai bluish", Style(PNG, steps=[steps.tinted(-20, 0, 25)]), Style(PNG), ai_share=0.75),
    ],
)
