"""Files as an enemy or a bad disk would hand them in: real pictures mutated by seed, and bombs."""

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from pictures import encoded
from PIL import Image

from ensemble.data.files import IMAGE_SUFFIXES

SUFFIXES = sorted(IMAGE_SUFFIXES)
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM")
Kind = Callable[[random.Random, Image.Image], bytes]


@dataclass(frozen=True)
class Mutated:
    """A file's name, whose suffix need not fit, and its bytes."""

    name: str
    data: bytes


def mutated(seed: int, pictures: Sequence[Image.Image], kinds: Sequence[str] = ()) -> Mutated:
    """The seed's own file: the kinds in turn, everything else drawn."""
    rng = random.Random(seed)  # noqa: S311 - files, not secrets
    names = list(kinds or KINDS)
    kind = names[seed % len(names)]
    return Mutated(f"{seed:05}-{kind}{rng.choice(SUFFIXES)}", KINDS[kind](rng, _part(rng, pictures)))


def _part(rng: random.Random, pictures: Sequence[Image.Image]) -> Image.Image:
    picture = rng.choice(pictures)
    width, height = rng.randint(1, 120), rng.randint(1, 120)
    left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    return picture.crop((left, top, left + width, top + height))


def _any(rng: random.Random, picture: Image.Image) -> bytes:
    options = {"JPEG": {"progressive": rng.random() < 0.5}, "AVIF": {"speed": 10}}
    return encoded(picture, name := rng.choice(FORMATS), **options.get(name, {}))


# ---- damage to a good file


def _flipped(rng: random.Random, picture: Image.Image) -> bytes:
    data = bytearray(_any(rng, picture))
    for _ in range(rng.choice((1, 3, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _cut(rng: random.Random, picture: Image.Image) -> bytes:
    data = _any(rng, picture)
    return data[: rng.randrange(len(data))]


def _shuffled(rng: random.Random, picture: Image.Image) -> bytes:
    """A piece blanked, doubled or left out."""
    data = _any(rng, picture)
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:start] + rng.choice((bytes(end - start), data[start:end] * 2, b"")) + data[end:]


def _noise_behind_header(rng: random.Random, picture: Image.Image) -> bytes:
    return _any(rng, picture)[: rng.choice((12, 32, 64, 200))] + rng.randbytes(rng.randrange(3000))


def _joined(rng: random.Random, picture: Image.Image) -> bytes:
    return _any(rng, picture) + _any(rng, picture)


def _missing_scans(rng: random.Random, picture: Image.Image) -> bytes:
    scans = encoded(picture, "JPEG", progressive=True).split(b"\xff\xda")
    return b"\xff\xda".join(scans[: rng.randint(1, len(scans))]) + rng.choice((b"", b"\xff\xd9"))


def _no_image(rng: random.Random, picture: Image.Image) -> bytes:
    return rng.choice((b"", b"id,label\n1,0\n", b"<svg/>", b"\0" * 500, rng.randbytes(500)))


# ---- sizes


def _claimed(rng: random.Random, picture: Image.Image) -> bytes:
    """The width and height in the header replaced."""
    name = rng.choice(("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"))
    width, height = (rng.choice((0, 1, 300, 5000, 13_000, 16_383, 60_000, 65_535)) for _ in range(2))
    return claiming(name, picture, width, height)


def claiming(name: str, picture: Image.Image, width: int, height: int) -> bytes:
    """A picture encoded as `name` whose header claims another size, each below 65,536."""
    data = bytearray(encoded(picture, name))
    if name == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif name == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif name == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif name == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif name == "WEBP":  # VP8, lossy: 14 bits each
        data[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    else:  # TIFF: its first two tags
        at = int.from_bytes(data[4:8], "little") + 2
        data[at : at + 24] = struct.pack("<HHIIHHII", 256, 4, 1, width, 257, 4, 1, height)
    return bytes(data)


def _thin(rng: random.Random, picture: Image.Image) -> bytes:
    size = (1, rng.choice((2, 500, 4000, 70_000)))
    return encoded(Image.new("RGB", size[:: rng.choice((1, -1))], "red"), "PNG")


# ---- unusual, and good


def _whole(rng: random.Random, picture: Image.Image) -> bytes:
    return _any(rng, picture)


def _cmyk(rng: random.Random, picture: Image.Image) -> bytes:
    data = encoded(picture.convert("CMYK"), "JPEG")
    at = data.index(b"Adobe") + 11  # the transform: 0 CMYK, 2 YCCK
    return data[:at] + bytes([rng.choice((0, 2))]) + data[at + 1 :]


def _sixteen_bits(rng: random.Random, picture: Image.Image) -> bytes:
    values = np.asarray(picture.convert("L")).astype(rng.choice(("<u2", ">u2"))) * 257
    return encoded(Image.fromarray(values), rng.choice(("PNG", "TIFF")))


def _transparent(rng: random.Random, picture: Image.Image) -> bytes:
    name = rng.choice(("PNG", "GIF", "WEBP", "TIFF"))
    if name in ("WEBP", "TIFF") or rng.random() < 0.3:
        picture.putalpha(picture.convert("L"))
        return encoded(picture, name)
    return encoded(picture.convert("P"), name, transparency=rng.randrange(256))


def _animated(rng: random.Random, picture: Image.Image) -> bytes:
    frames = [picture.rotate(90 * turn) for turn in range(1, rng.choice((2, 20)))]
    name = rng.choice(("GIF", "WEBP", "AVIF", "PNG", "TIFF", "MPO"))
    return encoded(picture, name, save_all=True, append_images=frames)


# ---- metadata


def _garbage_profile(rng: random.Random, picture: Image.Image) -> bytes:
    name = rng.choice(("JPEG", "PNG", "WEBP", "TIFF"))
    return encoded(picture, name, icc_profile=rng.randbytes(rng.choice((1, 100, 100_000))))


def _exif(rng: random.Random, picture: Image.Image) -> bytes:
    """Turned, with directories that lie in themselves, and sometimes damaged."""
    tags = [(0x0112, 3, 1, rng.randrange(10)), *((tag, 4, 1, 8) for tag in (0x8769, 0x8825, 0xA005))]
    tags += [(0xC000 + number, 7, 4, rng.getrandbits(32)) for number in range(rng.choice((0, 50, 3000)))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    data = bytearray(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 8))
    for _ in range(rng.choice((0, 0, 5, 50))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return encoded(picture, rng.choice(("JPEG", "PNG", "WEBP")), exif=b"Exif\0\0" + data)


def _looping_tiff(rng: random.Random, picture: Image.Image) -> bytes:
    """The next directory is this one."""
    data = bytearray(encoded(picture, "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0]
    end = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    data[end : end + 4] = struct.pack("<I", rng.choice((start, end, 2**32 - 1)))
    return bytes(data)


def _text_bomb(rng: random.Random, picture: Image.Image) -> bytes:
    texts = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0"}
    kind = rng.choice(list(texts))
    part = png_chunk(kind, texts[kind] + _squeezed(rng.choice((1000, 900_000, 50_000_000))))
    png = encoded(picture)
    at = rng.choice((33, len(png) - 12))  # behind the header, or before the end
    return png[:at] + part * rng.choice((1, 100)) + png[at:]


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    """A PNG chunk with its length and checksum."""
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


@cache
def _squeezed(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


# ---- bombs: small files that ask for much memory or time


def png_of_zeros(width: int, height: int) -> bytes:
    """A whole grey PNG, all black; its height a multiple of 100."""
    packer, count = zlib.compressobj(9, wbits=-15), height * (width + 1)
    rows = packer.compress(bytes(100 * (width + 1))) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = struct.pack(">HH", count % 65_521, 1)  # Adler-32 of so many zeros
    pixels = b"\x78\x9c" + rows * (height // 100) + b"\3\0" + checksum
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def scanned_jpeg(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG, grey, with scans of a few bytes each that add nothing."""
    huffman = [(0x00, 0x00), (0x10, 0xE0)]  # DC: no difference; AC: no more in 16,384 blocks
    tables = [b"\xff\xc4" + struct.pack(">HB16sB", 20, kind, b"\1" + bytes(15), symbol) for kind, symbol in huffman]
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"
    blocks = -(-width // 8) * -(-height // 8)
    first = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0\0\0\0" + bytes(-(-blocks // 8))
    empty = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0\1\x3f\0" + bytes(-(-blocks // 16_384) * 2)
    quality = b"\xff\xdb" + struct.pack(">HB", 67, 0) + b"\1" * 64
    return b"\xff\xd8" + quality + frame + b"".join(tables) + first + empty * scans + b"\xff\xd9"


def tiled_tiff(side: int, tile: int) -> bytes:
    """A grey TIFF of `side` pixels whose one tile claims to have sides of `tile`."""
    pixels = zlib.compress(bytes(side * side))
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 0, 325: len(pixels)}
    tags[324] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def tag_bomb(count: int, size: int) -> bytes:
    """EXIF of `count` tags that all point at the same `size` bytes."""
    start = 8 + 2 + 12 * count + 4
    tags = b"".join(struct.pack("<HHII", 1000 + number, 7, size, start) for number in range(count))
    return b"II*\0" + struct.pack("<IH", 8, count) + tags + bytes(4 + size)


def _bomb(rng: random.Random, picture: Image.Image) -> bytes:
    return rng.choice(
        (
            lambda: png_of_zeros(60_000, 60_000),
            lambda: scanned_jpeg(12_000, 12_000, 200),
            lambda: tiled_tiff(16, 30_000),
            lambda: tiled_tiff(16, 5000),
            lambda: encoded(picture, "PNG", exif=tag_bomb(3000, 1_000_000)),
            lambda: encoded(picture, "JPEG", exif=b"Exif\0\0" + tag_bomb(2500, 30_000)),
        )
    )()


KINDS: dict[str, Kind] = {
    "whole": _whole,
    "flipped": _flipped,
    "cut": _cut,
    "shuffled": _shuffled,
    "noise": _noise_behind_header,
    "joined": _joined,
    "scans": _missing_scans,
    "text": _no_image,
    "claimed": _claimed,
    "thin": _thin,
    "cmyk": _cmyk,
    "16-bit": _sixteen_bits,
    "alpha": _transparent,
    "animated": _animated,
    "profile": _garbage_profile,
    "exif": _exif,
    "loop": _looping_tiff,
    "texts": _text_bomb,
    "bomb": _bomb,
}
