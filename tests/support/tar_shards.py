"""Tars of images as webdataset lays them out."""

import io
import tarfile

from pictures import encoded, noise

IMAGES = {f"{number:03}.bmp": encoded(noise(number), "BMP") for number in range(9)}


def member(name, size=0, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def write_tar(file, files, form=tarfile.PAX_FORMAT, mode="w"):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode, format=form) as tar:
        for name, data in files.items():
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
            else:
                tar.addfile(member(name, len(data)), io.BytesIO(data))
    return file


def write_shards(folder, cuts=(3, 3, 5)):
    """IMAGES with siblings, in shards that begin at these places."""
    for number, (start, stop) in enumerate(zip((0, *cuts), (*cuts, len(IMAGES)), strict=True)):
        files = {}
        for name, data in list(IMAGES.items())[start:stop]:
            files |= {name.replace("bmp", "json"): b"{}", name: data, name.replace("bmp", "cls"): b"1"}
        write_tar(folder / f"s-{number:02}.tar", files)
    return folder
