"""Which precisions below fp32 a bundle's members may run at: certified on labelled images, or by the user's word."""

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.core import artifacts
from ensemble.core.errors import DataError, UnavailableError, join_limited
from ensemble.core.log import Log
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models import external
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle, check_images, member_logits, precision_search
from export.bundle.certificate import LEAST_IMAGES, MOST_IMAGES, judge
from export.bundle.check_images import LEAST_CALIBRATION, LabelledImages, Training
from export.bundle.member_logits import Column
from export.runtimes import capabilities, devices
from export.runtimes.settings import ON_CPU, ON_GPU, PRECISIONS, RuntimeConfig, parse_config

Entries = Mapping[str, Mapping[str, Any]]
LOWER = tuple(precision for precision in PRECISIONS if precision != "fp32")
FP32 = RuntimeConfig("onnxruntime")  # what the others are compared with
GPU_BATCH = 64  # as infer runs them: TensorRT builds an engine for each batch size


@dataclass(frozen=True)
class CertifyOptions:
    """What a bundle's precisions are to rest on.

    evidence: None where nobody gave labelled images. again: certify also what is certified.
    uncertified: allow what has no passing certificate. int8: make int8 files. training: None
    where there is no run, or one of few images.
    """

    evidence: LabelledImages | None = None
    again: bool = False
    uncertified: bool = False
    int8: bool = False
    training: Training | None = None


NOTHING = CertifyOptions()


@dataclass(frozen=True)
class Decision:
    """The members' entries, certificates by "runtime precision", and what bundle.json says of precisions."""

    entries: dict[str, dict[str, Any]]
    certificates: dict[str, Any]
    precisions: dict[str, Any]


def computed(precisions: Collection[str]) -> list[RuntimeConfig]:
    """What runs exported members at these precisions, as far as this machine computes them."""
    unsupported = capabilities.available().unsupported
    every = [RuntimeConfig(runtime, precision) for runtime in (*ON_CPU, *ON_GPU) for precision in precisions]
    here = [setting for setting in every if (setting.runtime, setting.precision) not in unsupported]
    return [replace(setting, batch=GPU_BATCH) if setting.runtime in ON_GPU else setting for setting in here]


def require_int8(training: Training | None) -> None:
    """Refuse int8 before anything is converted where it cannot be made; the error says what to do."""
    if training is None:
        raise DataError(
            f"int8 needs at least {2 * LEAST_CALIBRATION} images of the train split, half of them to calibrate by; "
            "leave out --int8, or train on more"
        )
    if not computed(("int8",)):
        raise UnavailableError(capabilities.available().unsupported["onnxruntime", "int8"])
    if importlib.util.find_spec("onnx") is None:
        raise UnavailableError("int8 needs onnx; run: pip install 'manyeyes[int8]'")


def decide(folder: Path, entries: Entries, older: Mapping[str, Any], wish: CertifyOptions, log: Log) -> Decision:
    """Certify what this machine can compute; certificates of `older` that still hold are kept.

    The folder holds stacker.json and the files of `entries`, to which second files are added,
    fp16 for a GPU and int8 as the wish says, and from which those that may not run are taken away.
    """
    lower = [
        setting
        for setting in computed(LOWER)
        if setting.precision != "int8"
        or wish.int8
        or any(bundle.has_file(entry, setting) for entry in entries.values())
    ]
    made_from = _identity(folder, entries)
    found = {
        key: record
        for key, record in older.items()
        if record["made_from"] == made_from
        # a member that was converted anew to the same bytes has lost its second files
        and all(bundle.has_file(entries[name], parse_config(key)) for name in record["usable"])
    }
    old = [setting for setting in lower if str(setting) in found and _by_other_libraries(found, setting)]
    wanted = [setting for setting in lower if wish.again or str(setting) not in found or setting in old]
    extended = dict(entries)
    enough = wish.evidence is not None and len(wish.evidence.labels) >= LEAST_IMAGES
    if wish.uncertified or (wanted and enough):
        asked = lower if wish.uncertified else wanted
        making = [setting for setting in asked if setting.precision != "int8" or wish.int8]
        extended = {
            name: precision_search.add(folder, name, entry, making, wish.training, log)
            for name, entry in entries.items()
        }
    if not lower:
        why = capabilities.available().unsupported[("openvino", "bf16")].partition(";")[0]
        log(
            f"Nothing more below fp32 was certified or allowed: {why}. On the machine that will score, run: "
            "python cli.py export --bundle DIR --certify-on DATA"
        )
    elif wanted and wish.evidence is None:
        log(
            f"Not certified: {join_limited(wanted)}. Give labelled images that no member was fitted on: "
            "--certify-on DATA"
        )
    elif wanted and wish.evidence is not None:
        made = _certify(folder, extended, wish.evidence, wanted, log)
        found |= {key: {"made_from": made_from, **record} for key, record in made.items()}
    if kept := [setting for setting in old if _by_other_libraries(found, setting)]:
        log(f"Still allowed, though certified with other versions of libraries than those here: {join_limited(kept)}")
    precisions = _allowed(found, extended, lower if wish.uncertified else (), log)
    used = {(name, bundle.second_file(parse_config(key))) for key, may in precisions.items() for name in may["members"]}
    left = {name: precision_search.drop(folder, name, entry, used) for name, entry in extended.items()}
    return Decision(left, found, precisions)


def _by_other_libraries(found: Mapping[str, Any], setting: RuntimeConfig) -> bool:
    return bool(found[str(setting)].get("by") != devices.version(setting.runtime))


def _allowed(
    found: Mapping[str, Any], entries: Entries, unproven: Sequence[RuntimeConfig], log: Log
) -> dict[str, dict[str, Any]]:
    """Every precision that some members passed at, and every one of `unproven` for them all."""
    allowed = {key: {"members": made["usable"], "certified": True} for key, made in found.items() if made["usable"]}
    for setting in unproven:
        able = [name for name, entry in entries.items() if bundle.has_file(entry, setting)]
        if len(allowed.get(str(setting), {"members": ()})["members"]) < len(able):
            allowed[str(setting)] = {"members": able, "certified": False}
            who = "every member" if len(able) == len(entries) else join_limited(able)
            log(f"{setting}: {who} may use it without a passing certificate, as --uncertified asks")
    return allowed


def _certify(
    folder: Path, entries: Entries, given: LabelledImages, settings: Sequence[RuntimeConfig], log: Log
) -> dict[str, dict[str, Any]]:
    """What certificate.json says of each setting; nothing where the images that can be read are too few."""
    drawn = check_images.stratified_sample(given, MOST_IMAGES)
    if len(drawn.labels) >= LEAST_IMAGES:
        log(
            f"Certifying {join_limited(settings)} on {len(drawn.labels)} {drawn.what}: as long as scoring them "
            f"{1 + len(settings)} times, less what is kept from before"
        )
        lists = {setting: columns(folder, entries, setting) for setting in (FP32, *settings)}
        every = [column for part in lists.values() for column in part]
        logits, errors = member_logits.compute(drawn.files, every, "certify")
        if errors:
            log(f"{len(errors)} images could not be read and were left out: {join_limited(errors.values(), 2)}")
        read = [row for row in range(len(drawn.labels)) if row not in errors]
        drawn, logits = drawn.rows(read), logits[read].astype(np.float64)
    if len(drawn.labels) < LEAST_IMAGES:
        log(
            f"Not certified: {join_limited(settings)}. {len(drawn.labels)} {drawn.what} are fewer than "
            f"{LEAST_IMAGES}, so "
            "nothing more may run below fp32; give more with --certify-on DATA"
        )
        return {}
    stacker = bundle.stacker_of(folder)
    looked_up = {member.name: drawn.scores(member) for member in external.externals_of(folder, stacker.members)}
    fp32, *lower = (
        np.column_stack([{**dict(zip(entries, part.T, strict=True)), **looked_up}[name] for name in stacker.members])
        for part in np.split(logits, 1 + len(settings), axis=1)
    )
    having = {
        setting: {name: entry for name, entry in entries.items() if bundle.has_file(entry, setting)}
        for setting in settings
    }
    return {
        str(setting): {
            "by": devices.version(setting.runtime),
            "images": len(drawn.labels),
            "rows": drawn.what,
            **_record(stacker, fp32, table, drawn, having[setting]),
            **_made(having[setting], setting),
        }
        for setting, table in zip(settings, lower, strict=True)
    }


def _record(
    stacker: Stacker, fp32: np.ndarray, lower: np.ndarray, drawn: LabelledImages, entries: Entries
) -> dict[str, Any]:
    verdict = judge(stacker, fp32, lower, drawn.labels)
    return {
        "members": {name: change.to_dict() for name, change in verdict.members.items() if name in entries},
        "stack": verdict.stack.to_dict(),
        "usable": [name for name in verdict.usable if name in entries],
    }


def _made(entries: Entries, setting: RuntimeConfig) -> dict[str, Any]:
    """How the files were made that are run at this setting, where the fp32 files are not."""
    kind = bundle.second_file(setting)
    return {"files": {name: entry["made"][kind] for name, entry in entries.items()}} if kind else {}


def columns(folder: Path, entries: Entries, setting: RuntimeConfig) -> list[Column]:
    """The members in the entries' order; those that lack the file for this setting at fp32."""

    def column(name: str, entry: Mapping[str, Any]) -> Column:
        used = setting if bundle.has_file(entry, setting) else FP32
        preprocess_config = PreprocessConfig.from_dict(entry["contract"])
        return member_logits.column(name, folder / bundle.member_file(entry, used), preprocess_config, used)

    return [column(name, entry) for name, entry in entries.items()]


def _identity(folder: Path, entries: Entries) -> str:
    """A hash of the fp32 files, their contracts and the stacker: what a certificate holds for."""
    files = [
        [name, artifacts.file_sha256(folder / entry["file"]), entry["contract"]] for name, entry in entries.items()
    ]
    return artifacts.json_sha256([files, artifacts.file_sha256(folder / "stacker.json")])
