"""Traps that the files carry: format, size, JPEG settings, metadata, names, polarity, for planted.py."""

import uuid

from planted_set import Kind, Planted, Rng, Sizes, Style, any_of, between

PNG = ("png",)
WEBP = ("webp",)
MIXED = ("jpeg", "png", "webp")


def _shaped(width: float, height: float, low: int = 100, high: int = 160, turned: bool = True) -> Sizes:
    """Sizes of this aspect, or half of them upright if `turned`, of the area of a square of `low` to `high` pixels."""

    def draw(rng: Rng) -> tuple[int, int]:
        side = rng.uniform(low, high)
        ratio = (width / height) ** (0.5 * (1 if not turned or rng.random() < 0.5 else -1))
        return round(side * ratio), round(side / ratio)

    return draw


FORMAT = Kind(
    "the null blocks, led by the file format (or its colour mode, lossless coding, or a suffix that is not its format)",
    [
        Planted("ai PNG, real JPEG", Style(PNG), Style()),
        Planted("ai JPEG, real PNG", Style(), Style(PNG), counts=(100, 160)),
        Planted("ai WebP, real JPEG", Style(WEBP), Style()),
        Planted("70 % of ai PNG, else JPEG", Style(PNG), Style(), ai_share=0.7),
        Planted("ai AVIF, real WebP, as a CSV", Style(("avif",)), Style(WEBP), table=True),
        Planted("ai PNG, real TIFF", Style(PNG), Style(("tiff",))),
        Planted("ai PNG data, and all are named .jpg", Style(PNG, suffix=".jpg"), Style()),
        Planted("82 % of ai PNG and of real JPEG", Style(PNG), Style(), ai_share=0.82, real_share=0.82),
        Planted("all PNG, ai RGBA without transparency", Style(PNG, mode="RGBA"), Style(PNG)),
        Planted("all WebP, ai lossless", Style(("webp-lossless",)), Style(WEBP)),
    ],
)

SIZE = Kind(
    "the null blocks, led by width, height, area, aspect or divisibility of the sides",
    [
        Planted("ai all 128x128, real of any size", Style(), Style(sizes=between(96, 192))),
        Planted(
            "ai larger, both square, PNG",
            Style(PNG, sizes=any_of((144, 144)), scale=(0.4, 1.2)),
            Style(PNG, sizes=any_of((112, 112)), scale=(0.3, 0.9)),
        ),
        Planted("real all 160x120, ai of any size", Style(sizes=between(96, 176)), Style(sizes=any_of((160, 120)))),
        Planted(
            "70 % of ai 128x128, else of any size",
            Style(WEBP),
            Style(WEBP, sizes=between(96, 176)),
            ai_share=0.7,
            table=True,
        ),
        Planted("ai square, real 4:3", Style(sizes=_shaped(1, 1)), Style(sizes=_shaped(4, 3))),
        Planted("ai 16:9, real 3:2, of the same areas", Style(sizes=_shaped(16, 9)), Style(sizes=_shaped(3, 2))),
        Planted(
            "sides of ai are multiples of 32, between the same bounds",
            Style(PNG, sizes=between(96, 192, 32)),
            Style(PNG, sizes=between(96, 192)),
            counts=(100, 100),
        ),
        Planted(
            "ai upright, real across, 3:2",
            Style(sizes=_shaped(2, 3, turned=False)),
            Style(sizes=_shaped(3, 2, turned=False)),
        ),
        Planted(
            "sides overlap: ai 136 to 184, real 112 to 160 pixels, as squares",
            Style(sizes=_shaped(1, 1, 136, 184)),
            Style(sizes=_shaped(1, 1, 112, 160)),
            counts=(100, 100),
        ),
        Planted(
            "60 % of real lack one row or column",
            Style(PNG),
            Style(PNG, sizes=any_of((127, 128), (128, 127))),
            real_share=0.6,
        ),
    ],
)

JPEG_QUALITY = Kind(
    "the null blocks, led by quantisation tables or quality, subsampling, or progressive coding",
    [
        Planted("ai quality 95, real 75", Style(quality=(95, 95)), Style(quality=(75, 75))),
        Planted("ai quality 90 to 98, real 60 to 85", Style(quality=(90, 98)), Style(quality=(60, 85)), table=True),
        Planted(
            "overlapping: ai quality 75 to 95, real 60 to 85",
            Style(quality=(75, 95)),
            Style(quality=(60, 85)),
            counts=(150, 150),
        ),
        Planted("one step: ai quality 90, real 91", Style(quality=(90, 90)), Style(quality=(91, 91))),
        Planted(
            "ai quality 80, real 98, any size",
            Style(quality=(80, 80), sizes=between(96, 160)),
            Style(quality=(98, 98), sizes=between(96, 160)),
        ),
        Planted("70 % of ai quality 85, else 60 to 95", Style(quality=(85, 85)), Style(quality=(60, 95)), ai_share=0.7),
        Planted("ai 4:4:4, real 4:2:0", Style(subsampling=("4:4:4",)), Style()),
        Planted("70 % of real 4:2:2, else 4:2:0", Style(), Style(subsampling=("4:2:2",)), real_share=0.7),
        Planted(
            "tables: ai those of an image editor, real a library's of about that strength",
            Style(tables="web_high"),
            Style(quality=(74, 80)),
        ),
        Planted("ai progressive, real baseline", Style(progressive=True), Style()),
    ],
)

METADATA = Kind(
    "the null blocks, led by EXIF, XMP, ICC, C2PA, PNG text or a JPEG comment",
    [
        Planted("all real have a camera's EXIF", Style(), Style(metadata=("camera",))),
        Planted(
            "all ai have Stable Diffusion parameters in PNG text", Style(PNG, metadata=("parameters",)), Style(PNG)
        ),
        Planted("70 % of real have an ICC profile", Style(), Style(metadata=("icc",)), real_share=0.7),
        Planted("ai have an editor's XMP", Style(metadata=("editor_xmp",)), Style(), table=True),
        Planted("ai have C2PA in JPEG", Style(metadata=("c2pa",)), Style()),
        Planted("60 % of ai have C2PA in PNG", Style(PNG, metadata=("c2pa",)), Style(PNG), ai_share=0.6),
        Planted(
            "all have EXIF: ai one tag of an editor, real a camera's",
            Style(metadata=("editor_exif",)),
            Style(metadata=("camera",)),
        ),
        Planted("real have a camera's EXIF and ICC in WebP", Style(WEBP), Style(WEBP, metadata=("camera", "icc"))),
        Planted("80 % of ai have a JPEG comment", Style(metadata=("comment",)), Style(), ai_share=0.8),
        Planted(
            "EXIF in 70 % of real and 10 % of ai, AVIF",
            Style(("avif",), metadata=("camera",), carry=0.1),
            Style(("avif",), metadata=("camera",), carry=0.7),
            counts=(140, 140),
        ),
    ],
)

NAMES = Kind(
    "the null blocks, led by patterns of the file names: words, length, digits, letter case, suffix or number range",
    [
        Planted(
            "ai numbered, real as a camera names them",
            Style(name=lambda serial, rng: f"{serial:05}"),
            Style(name=lambda serial, rng: f"IMG_{serial:04}"),
        ),
        Planted(
            "ai UUIDs, real as a camera names them",
            Style(PNG, name=lambda serial, rng: str(uuid.UUID(bytes=rng.bytes(16), version=4))),
            Style(PNG, name=lambda serial, rng: f"DSC{serial:05}"),
        ),
        Planted(
            "ai a prompt and a seed, real random",
            Style(name=lambda serial, rng: f"a_fox_in_the_snow_4k_{rng.integers(2**32)}"),
            Style(),
        ),
        Planted(
            "70 % of ai end in _gen", Style(name=lambda serial, rng: f"{rng.bytes(6).hex()}_gen"), Style(), ai_share=0.7
        ),
        Planted(
            "random, but ai of 8 and real of 16 digits, as a CSV",
            Style(name=lambda serial, rng: rng.bytes(4).hex()),
            Style(name=lambda serial, rng: rng.bytes(8).hex()),
            table=True,
        ),
        Planted("real end in .JPG, ai in .jpg", Style(), Style(suffix=".JPG")),
        Planted("ai end in .jpeg, real in .jpg", Style(suffix=".jpeg"), Style(), counts=(160, 100)),
        Planted(
            "the same pattern, but numbers of ai come before those of real",
            Style(name=lambda serial, rng: f"{serial:06}"),
            Style(name=lambda serial, rng: f"{10_000 + serial:06}"),
            table=True,
        ),
        Planted(
            "60 % of real as Flickr names them",
            Style(WEBP),
            Style(WEBP, name=lambda serial, rng: f"{rng.integers(10**9, 10**10)}_{rng.bytes(5).hex()}_b"),
            real_share=0.6,
        ),
        Planted(
            "ai img-0001, real img_0001, numbers of one range",
            Style(name=lambda serial, rng: f"img-{serial:04}"),
            Style(name=lambda serial, rng: f"img_{serial:04}"),
        ),
    ],
)

POLARITY = Kind(
    "a question whether the labels are swapped: a camera's EXIF on ai, or a generator's text or C2PA on real",
    [
        Planted("all ai have a camera's EXIF", Style(metadata=("camera",)), Style()),
        Planted("all real have Stable Diffusion parameters", Style(PNG), Style(PNG, metadata=("parameters",))),
        Planted("70 % of real have C2PA of a generator, JPEG", Style(), Style(metadata=("c2pa",)), real_share=0.7),
        Planted(
            "a camera's EXIF on ai, parameters in the EXIF of real",
            Style(metadata=("camera",)),
            Style(metadata=("parameters_exif",)),
        ),
        Planted("60 % of real have a ComfyUI workflow", Style(PNG), Style(PNG, metadata=("comfyui",)), real_share=0.6),
        Planted("real have XMP of trained media", Style(), Style(metadata=("trained_xmp",)), table=True),
        Planted(
            "EXIF Software of real is a generator, ai have a camera's EXIF",
            Style(WEBP, metadata=("camera",)),
            Style(WEBP, metadata=("generator_exif",)),
        ),
        Planted("half of real have C2PA of a generator, PNG", Style(PNG), Style(PNG, metadata=("c2pa",), carry=0.5)),
        Planted("a quarter of ai have a camera's EXIF", Style(metadata=("camera", "icc")), Style(), ai_share=0.25),
        Planted(
            "XMP of Firefly on real, a camera's EXIF on half of ai, mixed formats",
            Style(MIXED, metadata=("camera",), carry=0.5),
            Style(MIXED, metadata=("firefly_xmp",)),
        ),
    ],
)
