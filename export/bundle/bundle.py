"""Read, check and write a bundle: members as ONNX, stacker and preprocessing, each file with its hash. No torch."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, join_limited
from ensemble.core.names import LABELS, is_member_name
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models import external, members
from ensemble.stacking.stack import read_stacker
from ensemble.stacking.stacker import Stacker, read_stacker_values
from export.bundle import heldout_rows
from export.runtimes.settings import RuntimeConfig, parse_config

CONVERTER_VERSION = 4  # raised by hand when converting the same member would give another file or entry
PRECISION = "fp32"
POINT_FILE = "point.json"  # read and written by operating_point
LOW_PRECISION_KINDS = ("fp16", "int8", "int8-symmetric")  # files beside the fp32 one; the last is for TensorRT
NUMBERS = (int, float)  # JSON's, without bool
REMEDY = "make it anew with: python cli.py export --force (and its --member options, if it has no run)"


def open_bundle(folder: Path) -> dict[str, Any]:
    """bundle.json, after a check of every file's hash; ArtifactError where one differs or a member is missing."""
    values = read_contents(folder)
    members.check_files(folder, values["files"], REMEDY)
    names = bundle_stacker(folder).members
    if missing := [n for n in names if n not in values["members"] and external_file(n) not in values["files"]]:
        raise ArtifactError(f"{folder} lacks members of its own stacker ({join_limited(missing)}); {REMEDY}")
    return values


def read_contents(folder: Path) -> dict[str, Any]:
    """bundle.json, if its digest is right and it names no file outside the bundle; the files are not read."""
    values = artifacts.read_json(folder / "bundle.json", REMEDY)
    digest = values.pop("digest", None)
    if digest != artifacts.json_sha256(values):
        raise ArtifactError(f"{folder / 'bundle.json'} is damaged: its digest differs; {REMEDY}")
    if error := _format_error(values):
        raise ArtifactError(f"{folder / 'bundle.json'} lacks what one has, or holds what none has ({error}); {REMEDY}")
    if not _names_only_own_files(values):
        raise ArtifactError(
            f"{folder / 'bundle.json'} names files that no bundle has, which may lie outside its folder; "
            f"do not use it, or {REMEDY}"
        )
    return values


def _format_error(values: Mapping[str, Any]) -> str:
    """The part that is not as `write_bundle` writes it; "" if all is. A stranger may have written the file."""
    files, entries, precisions = values.get("files"), values.get("members"), values.get("precisions", {})
    if not isinstance(files, dict) or not all(
        isinstance(sha, str) and name.isprintable() for name, sha in files.items()
    ):
        return "files"
    if not isinstance(entries, dict):
        return "members"
    if wrong := [name for name, entry in entries.items() if not _is_entry(entry)]:
        return f"members: {join_limited(wrong)}"
    if not isinstance(precisions, dict) or not all(_is_allowance(*item) for item in precisions.items()):
        return "precisions"
    return ""


def _is_entry(entry: Any) -> bool:
    try:
        PreprocessConfig.from_dict(entry["contract"])
        gflop, kinds = entry.get("gflop", 0), [kind for kind in LOW_PRECISION_KINDS if kind in entry]
        return (
            all(isinstance(entry[key], str) for key in ("file", "precision", "source", *kinds))
            and all(isinstance(entry["made"][kind], dict) for kind in kinds)
            and type(gflop) in NUMBERS
            and 0 <= gflop < 1e9
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _is_allowance(key: str, value: Any) -> bool:
    """Whether a value of `precisions` is as `write_bundle` says."""
    try:
        parse_config(key)
        return isinstance(value["certified"], bool) and all(isinstance(name, str) for name in value["members"])
    except (KeyError, TypeError, ValueError):
        return False


def _names_only_own_files(values: Mapping[str, Any]) -> bool:
    """Whether all file names lie below the bundle's folder, and entries name only their own files.

    A digest does not prove who wrote it, and an export replaces files by these names.
    """
    files = values["files"]
    return not any(_escapes_folder(name) for name in files) and all(
        is_member_name(name)
        and set(model_files(entry))
        <= {f"members/{name}.{kind}.onnx" for kind in (PRECISION, *LOW_PRECISION_KINDS)} & set(files)
        for name, entry in values["members"].items()
    )


def _escapes_folder(name: str) -> bool:
    """Whether a name is no plain relative path of one file on every system; the Hub's client reads "x/" as a folder."""
    return bool(PureWindowsPath(name).anchor) or "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/"))


def write_bundle(
    folder: Path,
    entries: Mapping[str, Mapping[str, Any]],
    externals: Sequence[str] = (),
    precisions: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write bundle.json, the last file: the members' entries, every file's hash, and a digest of itself.

    The folder already holds stacker.json, certificate.json, the entries' files, the scores of
    `externals` (members that were trained elsewhere), and perhaps heldout.parquet and point.json. An entry:
    `file`, `precision` (fp32), `contract` (its preprocess config), `source`, `gflop` of one view; for each
    low-precision file its name under one of LOW_PRECISION_KINDS, and in `made` how it was made.
    precisions: {"openvino bf16": {"members": [...], "certified": true}}, as `certified_precisions` reads it.
    """
    scores = [external_file(name) for name in externals]
    exported = [file for entry in entries.values() for file in model_files(entry)]
    optional = [name for name in (heldout_rows.HELDOUT_FILE, POINT_FILE) if (folder / name).is_file()]
    names = ["stacker.json", "certificate.json", *exported, *scores, *optional]
    values = {
        "format_version": artifacts.FORMAT_VERSION,
        "labels": list(LABELS),
        "members": dict(entries),
        "precisions": dict(precisions or {}),
        "files": {name: artifacts.file_sha256(folder / name) for name in names},
    }
    write_contents(folder, values)


def write_contents(folder: Path, values: Mapping[str, Any]) -> None:
    """Write bundle.json with a digest of `values`, which are as `read_contents` gives them."""
    artifacts.write_json(folder / "bundle.json", {**values, "digest": artifacts.json_sha256(dict(values))})


def certified_precisions(values: Mapping[str, Any]) -> dict[tuple[str, str], frozenset[str]]:
    """Members that may run below fp32, by (runtime, precision): certified, or allowed by --uncertified.

    values: of `open_bundle`. A bundle from before there were certificates has none.
    """
    return {
        (config.runtime, config.precision): frozenset(value["members"])
        for key, value in values.get("precisions", {}).items()
        for config in [parse_config(key)]
    }


def model_files(entry: Mapping[str, Any]) -> list[str]:
    """An entry's ONNX files, relative to the bundle."""
    return [str(entry[key]) for key in ("file", *LOW_PRECISION_KINDS) if key in entry]


def model_file(entry: Mapping[str, Any], config: RuntimeConfig) -> str:
    """The entry's file that this config runs, relative to the bundle."""
    return str(entry[low_precision_kind(config) or "file"])


def low_precision_kind(config: RuntimeConfig) -> str | None:
    """Which of LOW_PRECISION_KINDS this config runs; None for the fp32 file."""
    if config.precision == "int8":
        return "int8-symmetric" if config.runtime == "tensorrt" else "int8"
    return "fp16" if (config.runtime, config.precision) == ("cuda", "fp16") else None


def has_model_file(entry: Mapping[str, Any], config: RuntimeConfig) -> bool:
    """Whether the entry has the file that this config runs."""
    return (low_precision_kind(config) or "file") in entry


def bundle_stacker(folder: Path) -> Stacker:
    """The stacker of a bundle."""
    return Stacker.from_dict(read_stacker_values(folder / "stacker.json", REMEDY))


def read_certificate(folder: Path) -> dict[str, Any]:
    """certificate.json of a bundle: its `members` at fp32, and the `precisions` below fp32."""
    values = artifacts.read_json(folder / "certificate.json", REMEDY)
    if not _is_certificate(values, read_contents(folder)["members"]):
        raise ArtifactError(f"{folder / 'certificate.json'} lacks what one has, or holds what none has; {REMEDY}")
    return values


def _is_certificate(values: Mapping[str, Any], names: Collection[str]) -> bool:
    try:
        fp32 = [record for name in names for record in values["members"][name].get("fp32", {}).values()]
        return all(type(record["max_abs_difference"]) in NUMBERS for record in fp32) and all(
            isinstance(record["made_from"], str)
            and parse_config(key) is not None
            and set(record["usable"]) <= set(names)
            and all(map(_is_change, [record["stack"], *record["members"].values()]))
            for key, record in values.get("precisions", {}).items()
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _is_change(change: Mapping[str, Any]) -> bool:
    """Whether it is as `certificate.ScoreChange.to_dict` gives it."""
    numbers = [change[key] for key in ("largest", "mean", "spearman", "auroc", "flips")]
    return all(number is None or type(number) in NUMBERS for number in numbers) and all(
        isinstance(limit, str) for limit in change["failed"]
    )


def external_file(name: str) -> str:
    """Where a bundle keeps the scores of a member that was trained elsewhere."""
    return artifacts.external_path(Path(), name).as_posix()


def is_current(run: Path) -> bool:
    """Whether the run's bundle was made from its members and stacker as they are now.

    Raises ArtifactError if there is no valid stacker, or if bundle.json is damaged. The other
    files are not checked; `open_bundle` does.
    """
    stacker, folder = read_stacker(run), artifacts.bundle_path(run)
    if not (folder / "bundle.json").is_file():
        return False
    values = read_contents(folder)
    entries = values["members"]
    externals = [name for name in stacker.members if external.is_external(run, name)]
    return (
        list(entries) == [name for name in stacker.members if name not in externals]
        and all(entry["source"] == source_sha256(run, name) for name, entry in entries.items())
        and all(
            values["files"].get(external_file(name)) == artifacts.file_sha256(artifacts.external_path(run, name))
            for name in externals
        )
        and values["files"]["stacker.json"] == artifacts.file_sha256(artifacts.stacker_path(run))
    )


def current_bundle(run: Path) -> Path:
    """The run's bundle; ArtifactError if it has to be exported first."""
    if not is_current(run):
        raise ArtifactError(
            f"the bundle of {run} is missing or older than its members; export it first: "
            f"python cli.py export --run {run}"
        )
    return artifacts.bundle_path(run)


def source_sha256(run: Path, name: str) -> str:
    """Hash of all that a member's ONNX file depends on; the stacker is not part of it."""
    info = members.read_info(run, name)
    return artifacts.json_sha256([info["files"], info["contract"], PRECISION, CONVERTER_VERSION])
