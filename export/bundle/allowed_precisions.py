"""Which precisions below fp32 a bundle's members may run at: those certified on labelled images, or --uncertified."""

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.core import artifacts
from ensemble.core.errors import DataError, UnavailableError, join_limited
from ensemble.core.log import Log
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models import external
from export.bundle import bundle, check_images, low_precision_files, member_logits
from export.bundle.certificate import MAX_IMAGES, MIN_IMAGES, judge
from export.bundle.check_images import MIN_CALIBRATION, LabelledImages, TrainingImages
from export.bundle.low_precision_files import FP32
from export.bundle.member_logits import LogitColumn
from export.runtimes import capabilities, devices
from export.runtimes.settings import ON_CPU, ON_GPU, PRECISIONS, RuntimeConfig, parse_config

Entries = Mapping[str, Mapping[str, Any]]
GPU_BATCH = 64  # the batch size of infer: TensorRT builds an engine for each


@dataclass(frozen=True)
class CertifyOptions:
    """How a bundle's precisions are certified.

    images: None where nobody gave labelled images. recertify: also what is certified already.
    uncertified: allow what has no passing certificate. int8: make int8 files. training: None
    without a run, or where it has too few images.
    """

    images: LabelledImages | None = None
    recertify: bool = False
    uncertified: bool = False
    int8: bool = False
    training: TrainingImages | None = None


DEFAULT_OPTIONS = CertifyOptions()


def runnable_configs(precisions: Collection[str]) -> list[RuntimeConfig]:
    """The configs at these precisions that this machine can run exported members by."""
    unsupported = capabilities.available().unsupported
    return [
        RuntimeConfig(runtime, precision, GPU_BATCH if runtime in ON_GPU else RuntimeConfig.batch)
        for runtime in (*ON_CPU, *ON_GPU)
        for precision in precisions
        if (runtime, precision) not in unsupported
    ]


def require_int8(training: TrainingImages | None) -> None:
    """Raise an error that says what to do where int8 files cannot be made, before anything is converted."""
    if training is None:
        raise DataError(
            f"int8 needs at least {2 * MIN_CALIBRATION} images of the train split, half of them to calibrate by; "
            "leave out --int8, or train on more"
        )
    if not runnable_configs(("int8",)):
        raise UnavailableError(capabilities.available().unsupported["onnxruntime", "int8"])
    if importlib.util.find_spec("onnx") is None:
        raise UnavailableError("int8 needs onnx; run: pip install 'manyeyes[int8]'")


def decide_precisions(
    folder: Path, entries: Entries, older: Mapping[str, Any], options: CertifyOptions, log: Log
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, dict[str, Any]]]:
    """Certify the precisions that this machine runs, and decide which ones members may run at.

    folder: holds stacker.json and the files of `entries`; low-precision files are added to it, fp16 for
    a GPU and int8 as the options say, and those that may not run are removed. older: certificates
    of the bundle as it was; those that still hold are kept.
    Returns the entries, certificates by "runtime precision", and the value of `precisions` in bundle.json.
    """
    # int8 where it is asked for, or the bundle has files for it
    supported = [
        config
        for config in runnable_configs(PRECISIONS[1:])
        if config.precision != "int8"
        or options.int8
        or any(bundle.has_model_file(entry, config) for entry in entries.values())
    ]
    hashed = [[name, artifacts.file_sha256(folder / one["file"]), one["contract"]] for name, one in entries.items()]
    made_from = artifacts.json_sha256([hashed, artifacts.file_sha256(folder / "stacker.json")])
    certificates = {
        key: record
        for key, record in older.items()
        if record["made_from"] == made_from
        # a member that was converted anew to the same bytes has lost its low-precision files
        and all(bundle.has_model_file(entries[name], parse_config(key)) for name in record["usable"])
    }
    to_certify = [
        config
        for config in supported
        if options.recertify or str(config) not in certificates or _is_outdated(certificates, config)
    ]
    enough_images = options.images is not None and len(options.images.labels) >= MIN_IMAGES
    files_for = supported if options.uncertified else to_certify if enough_images else []
    files_for = [config for config in files_for if config.precision != "int8" or options.int8]
    extended = {
        name: low_precision_files.add_files(folder, name, entry, files_for, options.training, log)
        for name, entry in entries.items()
    }
    if not supported:
        why = capabilities.available().unsupported[("openvino", "bf16")].partition(";")[0]
        log(
            f"Nothing more below fp32 was certified or allowed: {why}. On the machine that will score, run: "
            "python cli.py export --bundle DIR --certify-on DATA"
        )
    elif to_certify and not options.images:
        log(
            f"Not certified: {join_limited(to_certify)}. Give labelled images that no member was fitted on: "
            "--certify-on DATA"
        )
    elif to_certify and options.images:
        new = certify(folder, extended, options.images, to_certify, log)
        certificates |= {key: {"made_from": made_from, **record} for key, record in new.items()}
    if outdated := [config for config in supported if _is_outdated(certificates, config)]:
        log(
            "Still allowed, though certified with other versions of libraries than those here: "
            f"{join_limited(outdated)}"
        )
    precisions = allow(certificates, extended, supported if options.uncertified else (), log)
    used = {
        (name, bundle.low_precision_kind(parse_config(key)))
        for key, allowed in precisions.items()
        for name in allowed["members"]
    }
    remaining = {
        name: low_precision_files.drop_unused_files(folder, name, entry, used) for name, entry in extended.items()
    }
    return remaining, certificates, precisions


def certify(
    folder: Path, entries: Entries, images: LabelledImages, configs: Sequence[RuntimeConfig], log: Log
) -> dict[str, dict[str, Any]]:
    """The record in certificate.json of each config; nothing where too few of the images can be read."""
    sample = check_images.stratified_sample(images, MAX_IMAGES)
    logits = np.empty((0, 0))
    if len(sample.labels) >= MIN_IMAGES:
        log(
            f"Certifying {join_limited(configs)} on {len(sample.labels)} {sample.description}: as long as scoring "
            f"them {1 + len(configs)} times, less what is kept from before"
        )
        columns = [column for config in (FP32, *configs) for column in logit_columns(folder, entries, config)]
        readable, logits, errors = member_logits.compute_logits(sample.files, columns, "certify")
        if errors:
            log(f"{len(errors)} images could not be read and were left out: {join_limited(errors.values(), 2)}")
        sample = sample.subset(readable)
    if len(sample.labels) < MIN_IMAGES:
        log(
            f"Not certified: {join_limited(configs)}. {len(sample.labels)} {sample.description} are fewer than "
            f"{MIN_IMAGES}, so nothing more may run below fp32; give more with --certify-on DATA"
        )
        return {}
    stacker = bundle.bundle_stacker(folder)
    externals = {one.name: sample.external_logits(one) for one in external.read_externals(folder, stacker.members)}
    # columns in the stacker's order, a table [images, members] for fp32 and one for each config
    fp32, *tables = (
        np.column_stack([{**dict(zip(entries, table.T, strict=True)), **externals}[name] for name in stacker.members])
        for table in np.split(logits, 1 + len(configs), axis=1)
    )
    records = {}
    for config, table in zip(configs, tables, strict=True):
        changes, stack, usable = judge(stacker, fp32, table, sample.labels)
        having = {name: entry for name, entry in entries.items() if bundle.has_model_file(entry, config)}
        kind = bundle.low_precision_kind(config)
        records[str(config)] = {
            "by": devices.version(config.runtime),
            "images": len(sample.labels),
            "rows": sample.description,
            "members": {name: change.to_dict() for name, change in changes.items() if name in having},
            "stack": stack.to_dict(),
            "usable": [name for name in usable if name in having],
            **({"files": {name: entry["made"][kind] for name, entry in having.items()}} if kind else {}),
        }
    return records


def allow(
    certificates: Mapping[str, Any], entries: Entries, uncertified: Sequence[RuntimeConfig], log: Log
) -> dict[str, dict[str, Any]]:
    """Members by "runtime precision": those with a passing certificate, and every one for an `uncertified` config."""
    allowed = {
        key: {"members": record["usable"], "certified": True}
        for key, record in certificates.items()
        if record["usable"]
    }
    for config in uncertified:
        able = [name for name, entry in entries.items() if bundle.has_model_file(entry, config)]
        if len(allowed.get(str(config), {"members": ()})["members"]) < len(able):
            allowed[str(config)] = {"members": able, "certified": False}
            who = "every member" if len(able) == len(entries) else join_limited(able)
            log(f"{config}: {who} may use it without a passing certificate, as --uncertified asks")
    return allowed


def logit_columns(folder: Path, entries: Entries, config: RuntimeConfig) -> list[LogitColumn]:
    """A column for each member in the entries' order; members without a file for this config run at fp32."""
    columns = []
    for name, entry in entries.items():
        used = config if bundle.has_model_file(entry, config) else FP32
        path = folder / bundle.model_file(entry, used)
        columns.append(member_logits.logit_column(name, path, PreprocessConfig.from_dict(entry["contract"]), used))
    return columns


def _is_outdated(certificates: Mapping[str, Any], config: RuntimeConfig) -> bool:
    """Whether there is a certificate, and it was made with other library versions than those installed here."""
    record = certificates.get(str(config))
    return record is not None and record.get("by") != devices.version(config.runtime)
