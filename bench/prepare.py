"""What five members' pixels cost beside one's: decode and prepare, on JPEGs of two sizes.

    python bench/prepare.py [--rounds 41] [--images DIR]

Each round measures every way in turn, in seconds of this thread's processor. The five are
ViT (384, centre crop), Swin-T and Swin-B (224), SwinV2 (256) and ConvNeXt (384, squashed).
Without --images, JPEGs are made from photographs of scikit-image.
"""

import argparse
import ctypes
import io
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, features

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ensemble.core.preprocess_config import PreprocessConfig  # noqa: E402
from ensemble.data.files import list_images  # noqa: E402
from ensemble.images import decode, preprocess  # noqa: E402

HALF = (0.5, 0.5, 0.5)
SWIN = PreprocessConfig(size=224, mean=HALF, std=HALF)
MEMBERS = {
    "ViT 384 centre crop": PreprocessConfig(size=384, mean=HALF, std=HALF, geometry="center_crop"),
    "Swin-T 224": SWIN,
    "Swin-B 224": SWIN,
    "SwinV2 256": PreprocessConfig(size=256, mean=HALF, std=HALF),
    "ConvNeXt 384": PreprocessConfig(size=384, mean=HALF, std=HALF),
}
SIZES = ((512, 384), (256, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--images", type=Path, help="photographs, at least 512x384")
    options = parser.parse_args()
    print(
        f"{date.today()}; Pillow {PIL.__version__} (libjpeg-turbo {features.version_feature('libjpeg_turbo')}), "
        f"NumPy {np.__version__}; {options.rounds} rounds; milliseconds of one thread's processor an image"
    )
    jpegs = {size: [encoded(photo.resize(size)) for photo in photographs(options.images)] for size in SIZES}
    for kept in (False, True):
        if kept and not keep_freed_memory():
            break
        for (width, height), files in jpegs.items():
            kib = np.mean([len(data) for data in files]) / 1024
            print(f"\n{len(files)} JPEGs of {width}x{height}, {kib:.0f} KiB{', freed memory kept' if kept else ''}")
            report(measured(files, options.rounds))


def keep_freed_memory() -> bool:
    """Whether freed blocks can be kept for the next image, instead of being faulted in again."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(-4, 0) and libc.mallopt(-1, 2**31 - 1))  # M_MMAP_MAX, M_TRIM_THRESHOLD


def photographs(folder: Path | None) -> list[Image.Image]:
    """Sixteen of the folder's, or four of scikit-image's."""
    if folder is not None:
        return [decode.decode(folder / name).convert("RGB") for name in list_images(folder)[:16]]
    from skimage import data

    return [Image.fromarray(picture) for picture in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket())]


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measured(jpegs: list[bytes], rounds: int) -> dict[str, float]:
    """Milliseconds an image of each way, the median over rounds in which the ways alternate."""
    preprocess_configs = list(MEMBERS.values())
    ways: dict[str, Callable[[bytes], object]] = {"decode alone": decode.decode}
    for name, preprocess_config in MEMBERS.items():
        ways[name] = lambda data, preprocess_config=preprocess_config: preprocess.prepare(
            decode.decode(data), [preprocess_config]
        )
    ways["all five"] = lambda data: preprocess.prepare(decode.decode(data), preprocess_configs)
    ways["all five, each by itself"] = lambda data: [
        preprocess.to_pixels(decode.decode(data), c) for c in preprocess_configs
    ]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.thread_time()
            for data in jpegs:
                way(data)
            seconds[name].append((time.thread_time() - started) / len(jpegs))
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def report(found: dict[str, float]) -> None:
    for name, value in found.items():
        ratio = f"   all five: {found['all five'] / value:.2f} times" if name in MEMBERS else ""
        print(f"{name:25} {value:6.2f} ms{ratio}")
    mean = statistics.mean(found[name] for name in MEMBERS)
    print(f"all five against the mean of one: {found['all five'] / mean:.2f} times; ", end="")
    print(f"each by itself: {found['all five, each by itself'] / mean:.2f} times")


if __name__ == "__main__":
    main()
