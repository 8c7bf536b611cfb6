"""Changes of a tile's pixels, for planted.py: steps (image, rng, number) -> image, of the same size unless said."""

import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps
from planted_set import Rng, Step

Filter = Image.Resampling


def chain(*steps: Step) -> Step:
    """One step after the other."""

    def run(image: Image.Image, rng: Rng, number: int) -> Image.Image:
        for step in steps:
            image = step(image, rng, number)
        return image

    return run


def sometimes(share: float, step: Step) -> Step:
    """The step on a share of the images, drawn for each."""
    return lambda image, rng, number: step(image, rng, number) if rng.random() < share else image


def jpeg_before(low: int, high: int, shifted: bool = False, subsampling: str = "4:2:0") -> Step:
    """A JPEG of quality `low` to `high` in its past; shifted: cropped since, so the 8x8 grid starts elsewhere."""
    return _coded_before("JPEG", low, high, shifted, subsampling=subsampling)


def webp_before(low: int, high: int) -> Step:
    """A lossy WebP in its past."""
    return _coded_before("WEBP", low, high, False)


def _coded_before(file_format: str, low: int, high: int, shifted: bool, **options: str) -> Step:
    def run(image: Image.Image, rng: Rng, number: int) -> Image.Image:
        left, top = (int(edge) for edge in rng.integers(1, 8, 2)) if shifted else (0, 0)
        pixels = np.pad(np.asarray(image), ((top, 0), (left, 0), (0, 0)), mode="reflect")
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, file_format, quality=int(rng.integers(low, high + 1)), **options)
        return Image.open(buffer).convert("RGB").crop((left, top, left + image.width, top + image.height))

    return run


def enlarged(factor: float, by: Filter) -> Step:
    """As if stored smaller by `factor` once and brought to this size."""

    def run(image: Image.Image, rng: Rng, number: int) -> Image.Image:
        small = image.resize((round(image.width / factor), round(image.height / factor)), Filter.LANCZOS)
        return small.resize(image.size, by)

    return run


def sharpened(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """A light unsharp mask."""
    return image.filter(ImageFilter.UnsharpMask(radius=1, percent=60, threshold=0))


def denoised(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """A light blur that leaves edges and shrinks the noise."""
    return Image.blend(image, image.filter(ImageFilter.MedianFilter(3)), 0.7)


def super_resolved(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """Halved, brought back by Lanczos and sharpened."""
    return sharpened(enlarged(2, Filter.LANCZOS)(image, rng, number), rng, number)


def noisy(deviation: float) -> Step:
    """Gaussian noise of this standard deviation, in 0..255."""

    def run(image: Image.Image, rng: Rng, number: int) -> Image.Image:
        values = np.asarray(image) + rng.normal(0, deviation, (image.height, image.width, 3))
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))

    return run


def brighter(factor: float) -> Step:
    """All values times `factor`."""
    return lambda image, rng, number: ImageEnhance.Brightness(image).enhance(factor)


def tinted(red: int, green: int, blue: int) -> Step:
    """A colour cast: so much more of each channel, in 0..255."""

    def run(image: Image.Image, rng: Rng, number: int) -> Image.Image:
        return Image.fromarray(
            (np.asarray(image, dtype=np.int16) + np.array([red, green, blue])).clip(0, 255).astype(np.uint8)
        )

    return run


def grey(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """Without colour."""
    return image.convert("L").convert("RGB")


def mirrored(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """Left and right exchanged."""
    return ImageOps.mirror(image)


def turned(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """By 90, 180 or 270 degrees; width and height may change places."""
    return image.rotate(90 * int(rng.integers(1, 4)), expand=True)


def halved(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """Half as wide and high."""
    return image.resize((image.width // 2, image.height // 2), Filter.BICUBIC)


def trimmed(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """Up to 4 % cut off each edge, then brought back to size."""
    left, top, right, bottom = (rng.uniform(0.01, 0.04, 4) * (*image.size, *image.size)).tolist()
    return image.resize(image.size, Filter.BICUBIC, box=(left, top, image.width - right, image.height - bottom))


def under_sky(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """A clear blue sky, a little noisy, over the upper part."""
    height = image.height * float(rng.uniform(0.35, 0.5))
    rows = np.arange(image.height)[:, None, None]
    sky = np.array([90, 150, 225]) + (rows / image.height) * (80, 60, 20) + rng.normal(0, 2, (*image.size[::-1], 3))
    weight = np.clip((height - rows) / 6 + 0.5, 0, 1)
    return Image.fromarray((np.asarray(image) * (1 - weight) + sky * weight).clip(0, 255).astype(np.uint8))


def lit_from_above(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """Brighter at the top, darker at the bottom, as outdoors."""
    light = np.linspace(1.5, 0.5, image.height)[:, None, None]
    return Image.fromarray((np.asarray(image) * light).clip(0, 255).astype(np.uint8))


def portrait_blur(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """A sharp disc before a blurred, darkened background."""
    rows, columns = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    mask = Image.fromarray((255 * np.clip((0.7 - np.hypot(rows, columns)) * 6, 0, 1)).astype(np.uint8))
    behind = ImageEnhance.Brightness(image.filter(ImageFilter.GaussianBlur(5))).enhance(0.5)
    return Image.composite(image, behind, mask)


def on_white(image: Image.Image, rng: Rng, number: int) -> Image.Image:
    """Small in the middle of a white page, as shops show products."""
    canvas = Image.new("RGB", image.size, (250, 250, 250))
    small = image.resize((image.width * 6 // 10, image.height * 6 // 10), Filter.LANCZOS)
    canvas.paste(small, (image.width * 2 // 10, image.height * 2 // 10))
    return ImageChops.darker(canvas, Image.new("RGB", image.size, (250, 250, 250)))


def patch(first: int) -> Step:
    """In the tile's place, one of scikit-image's 200 photographed patches: 0 to 99 are faces, 100 to 199 are not."""

    def run(image: Image.Image, rng: Rng, number: int) -> Image.Image:
        spec = importlib.util.find_spec("skimage")
        assert spec is not None
        assert spec.submodule_search_locations
        values = np.load(Path(spec.submodule_search_locations[0]) / "data" / "lfw_subset.npy")[first + number]
        return Image.fromarray((values * 255).astype(np.uint8)).resize(image.size, Filter.BICUBIC).convert("RGB")

    return run
