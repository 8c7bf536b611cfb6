"""What cameras, editors and generators write into files beside the pixels, for planted.py."""

import json
import struct
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin
from PIL.TiffImagePlugin import IFDRational

CAMERAS = [
    ("Canon", "Canon EOS 80D"),
    ("NIKON CORPORATION", "NIKON D750"),
    ("Apple", "iPhone 12"),
    ("SONY", "ILCE-7M3"),
]
TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACES = {
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
}
UUID_TAIL = bytes.fromhex("00110010800000AA00389B71")  # ISO 19566-5: a box type is four letters and these


def save_options(names: tuple[str, ...], file_format: str, rng: np.random.Generator) -> dict[str, Any]:
    """Pillow's options for saving an image with the named metadata; C2PA in JPEG goes in by `insert`.

    Names: camera, editor_exif, generator_exif, parameters_exif, icc, editor_xmp, trained_xmp, firefly_xmp,
    comment (JPEG), parameters, comfyui (PNG text), c2pa (JPEG, PNG).
    """
    options: dict[str, Any] = {}
    text = PngImagePlugin.PngInfo()
    for name in names:
        if name in EXIF:
            options["exif"] = EXIF[name](rng)
        elif name in XMP:
            packet = _xmp(**XMP[name])
            if file_format == "PNG":
                text.add_itxt("XML:com.adobe.xmp", packet.decode())
            else:
                options["xmp"] = packet
        elif name == "icc":
            options["icc_profile"] = _icc()
        elif name == "comment":
            options["comment"] = b"CREATOR: gd-jpeg v1.0 (using IJG JPEG v62), quality = 90\n"
        elif name == "parameters":
            text.add_text("parameters", _parameters(rng))
        elif name == "comfyui":
            text.add_text("prompt", _comfyui(rng))
            text.add_text("workflow", json.dumps({"last_node_id": 9, "last_link_id": 9, "version": 0.4}))
        elif name == "c2pa":
            if file_format == "PNG":
                text.add(b"caBX", _c2pa(rng))
        else:
            raise ValueError(f"no metadata called {name!r}")
    return options | ({"pnginfo": text} if text.chunks else {})


def insert(data: bytes, names: tuple[str, ...], file_format: str, rng: np.random.Generator) -> bytes:
    """The encoded image with what Pillow cannot write: C2PA in APP11 segments of a JPEG."""
    if "c2pa" not in names or file_format != "JPEG":
        return data
    store = _c2pa(rng)
    payload = b"JP" + struct.pack(">HI", 1, 1) + store
    segment = b"\xff\xeb" + struct.pack(">H", len(payload) + 2) + payload
    end = 4 + struct.unpack(">H", data[4:6])[0]  # after the first segment, JFIF's or EXIF's
    return data[:end] + segment + data[end:]


def _camera(rng: np.random.Generator) -> Image.Exif:
    exif = Image.Exif()
    make, model = CAMERAS[int(rng.integers(len(CAMERAS)))]
    day = f"20{rng.integers(10, 24)}:{rng.integers(1, 13):02}:{rng.integers(1, 29):02}"
    time = f"{day} {rng.integers(6, 22):02}:{rng.integers(60):02}:{rng.integers(60):02}"
    base = ExifTags.Base
    exif.update({base.Make: make, base.Model: model, base.DateTime: time, base.Software: "Ver.1.01"})
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {
            base.ExposureTime: IFDRational(1, int(rng.integers(30, 2000))),
            base.FNumber: IFDRational(int(rng.integers(18, 110)), 10),
            base.ISOSpeedRatings: int(100 * 2 ** rng.integers(0, 6)),
            base.DateTimeOriginal: time,
            base.FocalLength: IFDRational(int(rng.integers(18, 200)), 1),
        }
    )
    return exif


def _software(software: str) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = software
    return exif


def _parameters_exif(rng: np.random.Generator) -> Image.Exif:
    exif = Image.Exif()
    comment = b"UNICODE\0" + _parameters(rng).encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif


EXIF = {
    "camera": _camera,
    "editor_exif": lambda rng: _software("GIMP 2.10.34"),
    "generator_exif": lambda rng: _software("Stable Diffusion XL 1.0"),
    "parameters_exif": _parameters_exif,
}
XMP = {
    "editor_xmp": {"xmp:CreatorTool": "Adobe Photoshop Lightroom 6.0", "photoshop:City": "Lyon"},
    "trained_xmp": {"Iptc4xmpExt:DigitalSourceType": TRAINED},
    "firefly_xmp": {"xmp:CreatorTool": "Adobe Firefly", "Iptc4xmpExt:DigitalSourceType": TRAINED},
}


def _xmp(**properties: str) -> bytes:
    spaces = " ".join(f'xmlns:{name}="{uri}"' for name, uri in NAMESPACES.items())
    values = " ".join(f'{name}="{value}"' for name, value in properties.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" {spaces} {values}/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _icc() -> bytes:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2020, 1, 1, 0, 0, 0)  # the date of making, else now
    return bytes(profile)


def _parameters(rng: np.random.Generator) -> str:
    """As Stable Diffusion's web interface writes them."""
    subject = ("a lighthouse at dusk", "portrait of an old sailor", "a fox in the snow")[int(rng.integers(3))]
    return (
        f"{subject}, highly detailed\nNegative prompt: blurry, lowres\nSteps: {rng.integers(20, 50)}, "
        f"Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: {rng.integers(2**32)}, Size: 512x512, "
        "Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Version: v1.6.0"
    )


def _comfyui(rng: np.random.Generator) -> str:
    sampler = {"seed": int(rng.integers(2**32)), "steps": 20, "cfg": 8, "sampler_name": "euler", "denoise": 1}
    model = {"ckpt_name": "sd_xl_base_1.0.safetensors"}
    return json.dumps(
        {
            "3": {"class_type": "KSampler", "inputs": sampler},
            "4": {"class_type": "CheckpointLoaderSimple", "inputs": model},
        }
    )


def _c2pa(rng: np.random.Generator) -> bytes:
    """A C2PA manifest store as JUMBF boxes: assertion, claim, and random bytes for a signature."""
    actions = {"actions": [{"action": "c2pa.created", "digitalSourceType": TRAINED}]}
    assertion = _jumb(b"json", "c2pa.actions", _box(b"json", json.dumps(actions).encode()))
    claim = {"claim_generator": "image-generator/1.0 c2pa-rs/0.28", "dc:format": "image", "alg": "sha256"}
    manifest = _jumb(
        b"c2ma",
        f"urn:uuid:{rng.bytes(4).hex()}-0000-4000-8000-{rng.bytes(6).hex()}",
        _jumb(b"c2as", "c2pa.assertions", assertion),
        _jumb(b"c2cl", "c2pa.claim", _box(b"cbor", _cbor(claim))),
        _jumb(b"c2cs", "c2pa.signature", _box(b"cbor", b"\x59" + struct.pack(">H", 1500) + rng.bytes(1500))),
    )
    return _jumb(b"c2pa", "c2pa", manifest)


def _box(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


def _jumb(kind: bytes, label: str, *content: bytes) -> bytes:
    description = _box(b"jumd", kind + UUID_TAIL + b"\x03" + label.encode() + b"\0")
    return _box(b"jumb", description + b"".join(content))


def _cbor(texts: dict[str, str]) -> bytes:
    """RFC 8949 for a small map from text to text."""
    data = bytes([0xA0 + len(texts)])
    for text in (text for pair in texts.items() for text in pair):
        data += (bytes([0x60 + len(text)]) if len(text) < 24 else bytes([0x78, len(text)])) + text.encode()
    return data
