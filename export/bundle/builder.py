"""Build a bundle: convert members to ONNX in a work folder, record each with its hashes, certify, put it in place.

A kill leaves the older bundle whole, and the next export continues from the records in the work folder.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.core.log import Log
from export.bundle import allowed_precisions, bundle, operating_point
from export.bundle.allowed_precisions import CertifyOptions
from export.bundle.certificate import AUROC_LIMIT, DECISION_CHANGE_LIMIT, MIN_IMAGES, certify_fp32
from export.bundle.check_images import SampleImages
from export.bundle.operating_point import OperatingPoint
from export.runtimes.runner import open_runner, require_torch

if TYPE_CHECKING:
    from ensemble.models.backbone import Member


@dataclass(frozen=True)
class BundleBuild:
    """A bundle that is being built in `path` and will be moved to `folder`.

    older: certificates below fp32 of the bundle there now. point: the operating point there now.
    """

    path: Path
    folder: Path
    older: Mapping[str, Any]
    point: OperatingPoint | None = None


def open_workdir(path: Path, folder: Path, force: bool) -> BundleBuild:
    """Prepare the work folder; an older bundle's checked ONNX files are linked into it, unless `force`."""
    if force:
        shutil.rmtree(path, ignore_errors=True)
    artifacts.ensure_folder(path / "members")
    artifacts.restore_folder(folder)
    if force or not folder.is_dir() or not any(folder.iterdir()):
        return BundleBuild(path, folder, {})
    values = bundle.open_bundle(folder)
    entries, point = values["members"], None
    with suppress(ArtifactError):  # an invalid point is dropped
        point = operating_point.read(folder, values)
    certificates = bundle.read_certificate(folder)
    for name, entry in entries.items():
        if not _record_path(path, name).is_file():
            for file in bundle.model_files(entry):
                (path / file).unlink(missing_ok=True)
                try:
                    os.link(folder / file, path / file)
                except OSError:  # a file system without hard links
                    shutil.copyfile(folder / file, path / file)
            _write_record(path, name, entry, certificates["members"][name])
    return BundleBuild(path, folder, certificates.get("precisions", {}), point)


def export_member(
    work: Path, name: str, source: str, load: Callable[[], "Member"], samples: SampleImages, log: Log
) -> dict[str, Any]:
    """Convert a member, or take it over; returns its record: `entry`, `files` with hashes, `certificate`.

    source: a hash of all that its file depends on. load: opens its torch module. samples: to certify fp32 on.
    """
    path = _record_path(work, name)
    if path.is_file():
        record = read_record(work, name)
        if record["entry"]["source"] == source and record["files"] == _hashes(work, record["entry"]):
            log(f"{name}: unchanged, taken over")
            return record
        path.unlink()
    require_torch()
    from export.bundle.convert import convert, gflop

    log(f"{name}: converting")
    member = load()
    entry = {
        "file": f"members/{name}.{bundle.PRECISION}.onnx",
        "precision": bundle.PRECISION,
        "contract": member.preprocess_config.to_dict(),
        "source": source,
        "gflop": gflop(member),
    }
    file = work / str(entry["file"])
    file.unlink(missing_ok=True)  # it may be a link to the older bundle's
    convert(member, file)
    try:
        certified = _certify(name, member, file, samples)
    except ArtifactError:
        file.unlink()
        raise
    largest = ", ".join(f"{result['max_abs_difference']:.1e} in {name}" for name, result in certified["fp32"].items())
    log(f"{name}: largest difference of a logit {largest}, on {samples.description}")
    return _write_record(work, name, entry, certified)


def read_record(work: Path, name: str) -> dict[str, Any]:
    """A member's record in the work folder."""
    return artifacts.read_json(_record_path(work, name), bundle.REMEDY)


def finalize(
    work: BundleBuild, records: Mapping[str, Any], externals: Sequence[str], options: CertifyOptions, log: Log
) -> dict[str, Any]:
    """Certify, write bundle.json and put the work folder in place; returns the values of certificate.json.

    The work folder holds the records' files, stacker.json, and the scores of `externals`
    (members that were trained elsewhere).
    """
    entries = {name: record["entry"] for name, record in records.items()}
    entries, certificates, allowed = allowed_precisions.decide_precisions(work.path, entries, work.older, options, log)
    values = {
        "members": {name: record["certificate"] for name, record in records.items()},
        "precisions": certificates,
        "limits": {"images": MIN_IMAGES, "auroc": AUROC_LIMIT, "flips": DECISION_CHANGE_LIMIT},
    }
    artifacts.write_json(work.path / "certificate.json", values)
    used = {work.path / file for entry in entries.values() for file in bundle.model_files(entry)}
    for path in set((work.path / "members").iterdir()) - used:
        path.unlink()
    (work.path / bundle.POINT_FILE).unlink(missing_ok=True)
    hashes = {file: digest for record in records.values() for file, digest in record["files"].items()}
    if work.point and work.point.made_from == operating_point.identity(work.path, entries, hashes):
        artifacts.write_json(work.path / bundle.POINT_FILE, work.point.to_dict())
    else:
        with suppress(ArtifactError):  # no valid bundle yet; a point that it does not list does not count
            if bundle.POINT_FILE in bundle.read_contents(work.folder)["files"]:
                log(
                    "What frontier chose was for other members or another stack, and is dropped: all members run; "
                    f"{operating_point.RECHOOSE_HINT}"
                )
    bundle.write_bundle(work.path, entries, externals, allowed)
    artifacts.replace_folder(work.path, work.folder)
    return values


def _certify(name: str, member: "Member", file: Path, samples: SampleImages) -> dict[str, Any]:
    """Compare the file with the member, at fp32 in every runtime that this machine has."""
    pixels = samples.pixels(member.preprocess_config)
    from ensemble.models.torch_runner import torch_runner

    expected = torch_runner(name, member, "cpu").run(pixels)
    results = {}
    for config in allowed_precisions.runnable_configs(("fp32",)):
        exported = open_runner(f"{name} in {config.runtime}", file, member.preprocess_config, config)
        results[config.runtime] = certify_fp32(expected, exported, pixels)
    return {"checked_on": samples.description, "fp32": results}


def _record_path(work: Path, name: str) -> Path:
    return work / "members" / f"{name}.json"


def _hashes(work: Path, entry: Mapping[str, Any]) -> dict[str, str]:
    files = [file for file in bundle.model_files(entry) if (work / file).is_file()]
    return {file: artifacts.file_sha256(work / file) for file in files}


def _write_record(work: Path, name: str, entry: Mapping[str, Any], certified: Mapping[str, Any]) -> dict[str, Any]:
    record = {"entry": dict(entry), "files": _hashes(work, entry), "certificate": dict(certified)}
    artifacts.write_json(_record_path(work, name), record)
    return record
