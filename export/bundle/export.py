"""Export: the members of a run, or classifiers fine-tuned elsewhere, as a bundle; certify an existing bundle again.

Converting needs torch.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, BackboneError
from ensemble.core.hub_download import download_classifier
from ensemble.core.log import Log
from ensemble.data import dataset
from ensemble.data.files import expand_user
from ensemble.data.sources import LabelledImage
from ensemble.data.splits import Fractions
from ensemble.models import external, members
from ensemble.models.classifier import read_classifiers
from ensemble.stacking import stack
from ensemble.stacking.logit_table import LabelledLogits, cross_validated, refuse_constant
from ensemble.stacking.stack import StackOptions, StackResult, read_stacker
from ensemble.stacking.stacker import Stacker
from export.bundle import allowed_precisions, bundle, check_images, heldout_rows, hub_bundles, member_logits
from export.bundle.allowed_precisions import DEFAULT_OPTIONS, CertifyOptions, logit_columns
from export.bundle.builder import export_member, finalize, open_workdir, read_record
from export.bundle.low_precision_files import FP32
from export.runtimes.runner import require_torch


def export_run(run: Path, log: Log, force: bool = False, options: CertifyOptions = DEFAULT_OPTIONS) -> dict[str, Any]:
    """Bring the run's bundle up to date; returns the values of certificate.json.

    A member that was converted before from the same weights is taken over, unless `force`. Precisions
    are certified on the held-out rows, unless the options have other images.
    """
    stacker, held, training = read_stacker(run), check_images.heldout_images(run), check_images.training_images(run)
    if options.int8:
        allowed_precisions.require_int8(training)
    work = open_workdir(artifacts.work_path(run, "export"), artifacts.bundle_path(run), force)
    externals = [name for name in stacker.members if external.is_external(run, name)]
    samples = check_images.sample_images(held)
    sources = {name: bundle.source_sha256(run, name) for name in stacker.members if name not in externals}
    records = {
        name: export_member(work.path, name, source, partial(members.load_member, run, name), samples, log)
        for name, source in sources.items()
    }
    _copy_others(run, work.path, externals)
    # logits of every row by weights that saw no row of its group: held-out rows, and with folds the training rows
    parts = [members.heldout_logits(run, stacker.members)]
    fitting = members.fitting_logits(run, stacker.members)
    if not fitting[0]["split"].isin(parts[0][0]["split"]).any():
        parts.append(fitting)
    rows = pd.concat([part for part, _ in parts])
    logits, groups = np.concatenate([logits for _, logits in parts]), rows["group"].to_numpy(dtype=str)
    heldout_rows.write_rows(work.path, LabelledLogits(tuple(stacker.members), logits, rows["label"].to_numpy(), groups))
    return finalize(work, records, externals, replace(options, images=options.images or held, training=training), log)


def certify_bundle(folder: Path, log: Log, options: CertifyOptions) -> dict[str, Any]:
    """Certify a bundle's precisions again; nothing is converted. Returns the values of certificate.json."""
    folder = folder.resolve()
    artifacts.restore_folder(folder)
    values = bundle.read_contents(folder)
    work_path = folder.with_name(f".{folder.name}.certify")
    shutil.rmtree(work_path, ignore_errors=True)  # a killed run may have left it, for another bundle
    work = open_workdir(work_path, folder, force=False)
    records = {name: read_record(work.path, name) for name in values["members"]}
    externals = [name for name in bundle.bundle_stacker(folder).members if name not in records]
    _copy_others(folder, work.path, externals)
    if (folder / heldout_rows.HELDOUT_FILE).is_file():
        shutil.copyfile(folder / heldout_rows.HELDOUT_FILE, work.path / heldout_rows.HELDOUT_FILE)
    return finalize(work, records, externals, options, log)


def _copy_others(source: Path, target: Path, externals: list[str]) -> None:
    """stacker.json, and the scores of members that were trained elsewhere."""
    shutil.rmtree(target / "externals", ignore_errors=True)
    for name in externals:
        artifacts.ensure_folder(target / "externals")
        shutil.copyfile(artifacts.external_path(source, name), artifacts.external_path(target, name))
    shutil.copyfile(artifacts.stacker_path(source), artifacts.stacker_path(target))


def export_classifiers(
    sources: Mapping[str, str],
    folder: Path,
    log: Log,
    positive: str | None = None,
    force: bool = False,
    stack_on: Sequence[LabelledImage] = (),
    options: CertifyOptions = DEFAULT_OPTIONS,
) -> tuple[dict[str, Any], StackResult | None]:
    """Make or update a bundle of classifiers; returns the values of certificate.json, and the fitted stack if any.

    sources: by name, a folder or a repository on the Hub. Weights are equal, or those of a stacker
    fitted on `stack_on`. A kill loses no finished member.
    """
    require_torch()
    folder = folder.resolve()
    no_bundle = not (folder / "bundle.json").is_file()
    if folder.exists() and no_bundle and not (folder.is_dir() and not any(folder.iterdir())):
        raise ArtifactError(f"{folder} is there and is no bundle; name a new folder with --bundle")
    artifacts.ensure_writable(folder.parent)
    classifiers = read_classifiers({name: locate_classifier(source) for name, source in sources.items()}, positive)
    samples = check_images.sample_images(options.images) if options.images else check_images.generated_images()
    work = open_workdir(folder.with_name(f".{folder.name}.export"), folder, force)
    records = {}
    for one in classifiers:
        source = artifacts.json_sha256([one.sha256, bundle.CONVERTER_VERSION])
        records[one.name] = export_member(work.path, one.name, source, one.load, samples, log)
    stacked = None
    (work.path / heldout_rows.HELDOUT_FILE).unlink(missing_ok=True)
    if stack_on:
        stacked = _stack(work.path, records, stack_on, log)
    else:
        names = tuple(records)
        mean = Stacker(names, (1 / len(names),) * len(names), 0.0, method="mean")
        artifacts.write_json(artifacts.stacker_path(work.path), mean.to_dict())
    return finalize(work, records, (), options, log), stacked


def locate_classifier(source: str) -> Path:
    """The folder that `source` names; downloaded from the Hub where there is no such folder."""
    folder = expand_user(source)
    if folder.is_dir():
        return folder
    if not hub_bundles.is_remote(source) and not hub_bundles.NAME.fullmatch(source.partition("@")[0]):
        raise BackboneError(f"{source} is neither a folder nor a model on the Hub, which is written USER/REPO")
    return download_classifier(*hub_bundles.parse(source))


def _stack(work: Path, records: Mapping[str, Any], items: Sequence[LabelledImage], log: Log) -> StackResult:
    """Fit a stacker on labelled images by the exported files' logits, and write stacker.json and heldout.parquet."""
    readable, indexed = dataset.index_items(items, skip_unreadable=True)
    if unreadable := len(items) - len(readable):
        log(f"{unreadable} of {len(items)} images could not be read and were left out of the stack")
    near = dataset.near_pairs(indexed)
    rows = dataset.assemble(readable, indexed, near, Fractions(), seed=0, check=False).assign(split="heldout")
    log(f"Scoring {len(rows)} images by {len(records)} members at fp32, for the stack")
    entries = {name: record["entry"] for name, record in records.items()}
    columns = logit_columns(work, entries, FP32)
    readable_rows, logits, _ = member_logits.compute_logits(dataset.files(rows), columns, "stack")
    labels, groups = rows["label"].to_numpy()[readable_rows], rows["group"].to_numpy(dtype=str)[readable_rows]
    scored = LabelledLogits(tuple(records), logits, labels, groups)
    options = StackOptions()
    refuse_constant(scored)
    result = stack.fit_and_score(cross_validated(scored), options)
    fitted_on = {
        "data_sha256": dataset.dataset_sha256(rows),
        "members": {name: artifacts.json_sha256(record["files"]) for name, record in records.items()},
    }
    artifacts.write_json(artifacts.stacker_path(work), stack.stacker_record(result, options, fitted_on))
    heldout_rows.write_rows(work, scored)
    return result
