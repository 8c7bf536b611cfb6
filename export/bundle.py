"""The bundle: members as ONNX, stacker and contracts, each file listed by its hash. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ensemble import artifacts, external, members
from ensemble.contract import ImageContract
from ensemble.errors import ArtifactError
from ensemble.labels import LABELS
from ensemble.score import Runner
from ensemble.stack import Stacker
from ensemble.stack_run import read_stacker
from export.runtime import onnx_runner

CONVERTER_VERSION = 1  # raised by hand when converting the same member would give another file
PRECISION = "fp32"
REMEDY = "run: python cli.py export --force"


def open_bundle(folder: Path) -> dict[str, Any]:
    """bundle.json of a bundle whose every file is as it was written; else ArtifactError."""
    values = artifacts.read_json(folder / "bundle.json", REMEDY)
    digest = values.pop("digest", None)
    if digest != artifacts.json_sha256(values):
        raise ArtifactError(f"{folder / 'bundle.json'} is damaged: its digest differs; {REMEDY}")
    members.check_files(folder, values["files"], REMEDY)
    return values


def write_bundle(folder: Path, entries: Mapping[str, Mapping[str, Any]], externals: Sequence[str] = ()) -> None:
    """Write bundle.json last: the members' entries, every file's hash, and a digest of itself.

    The folder already holds stacker.json, certificate.json, the entries' files, and the scores
    of `externals`, members that were trained elsewhere.
    """
    scores = [external_file(name) for name in externals]
    names = ["stacker.json", "certificate.json", *(entry["file"] for entry in entries.values()), *scores]
    values = {
        "format_version": artifacts.FORMAT_VERSION,
        "labels": list(LABELS),
        "members": dict(entries),
        "files": {name: artifacts.file_sha256(folder / name) for name in names},
    }
    artifacts.write_json(folder / "bundle.json", {**values, "digest": artifacts.json_sha256(values)})


def load_bundle(folder: Path, device: str) -> tuple[list[Runner], Stacker]:
    """A checked bundle's members in ONNX Runtime, in the stacker's order, and the stacker."""
    values = open_bundle(folder)
    stacker = Stacker.from_dict(artifacts.read_json(folder / "stacker.json", REMEDY))
    # what has no entry was trained elsewhere: its scores are looked up
    entries = {name: values["members"][name] for name in stacker.members if external_file(name) not in values["files"]}
    return [_runner(folder, name, entry, device) for name, entry in entries.items()], stacker


def external_file(name: str) -> str:
    """Where a bundle keeps the scores of a member that was trained elsewhere."""
    return artifacts.external_path(Path(), name).as_posix()


def is_current(run: Path) -> bool:
    """Whether the run's bundle was made from its members and stacker as they are now.

    Raises ArtifactError if there is no valid stacker, or if the bundle is damaged.
    """
    stacker, folder = read_stacker(run), artifacts.bundle_path(run)
    if not (folder / "bundle.json").is_file():
        return False
    values = open_bundle(folder)
    entries = values["members"]
    elsewhere = [name for name in stacker.members if external.is_external(run, name)]
    return (
        list(entries) == [name for name in stacker.members if name not in elsewhere]
        and all(entry["source"] == source_sha256(run, name) for name, entry in entries.items())
        and all(
            values["files"].get(external_file(name)) == artifacts.file_sha256(artifacts.external_path(run, name))
            for name in elsewhere
        )
        and values["files"]["stacker.json"] == artifacts.file_sha256(artifacts.stacker_path(run))
    )


def source_sha256(run: Path, name: str) -> str:
    """Hash of all that decides a member's ONNX file; the stacker does not enter."""
    info = members.read_info(run, name)
    return artifacts.json_sha256([info["files"], info["contract"], PRECISION, CONVERTER_VERSION])


def _runner(folder: Path, name: str, entry: dict[str, Any], device: str) -> Runner:
    return onnx_runner(name, folder / entry["file"], ImageContract.from_dict(entry["contract"]), device)
