"""Members of a run -> its bundle; a bundle -> the same with other certificates."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.models import external, members
from ensemble.stacking.cascade_fit import Rows
from ensemble.stacking.stack import read_stacker
from export import bundle, evidence, heldout_rows, precisions
from export.precisions import NOTHING, Wish
from export.records import Job, assemble, begin, export_member, read_record


def export_run(run: Path, say: Callable[[str], object], force: bool = False, wish: Wish = NOTHING) -> dict[str, Any]:
    """Bring the run's bundle up to date; returns what certificate.json holds.

    A member converted before from the same weights is taken over, unless `force`. Precisions
    are certified on the held-out rows, unless `wish` names other images.
    """
    stacker, held, training = read_stacker(run), evidence.heldout(run), evidence.training(run)
    if wish.int8:
        precisions.require_int8(training)
    work = begin(artifacts.work_path(run, "export"), artifacts.bundle_path(run), force)
    elsewhere = [name for name in stacker.members if external.is_external(run, name)]
    samples = evidence.samples(held)
    jobs = [
        Job(name, bundle.source_sha256(run, name), partial(members.load_member, run, name), samples)
        for name in stacker.members
        if name not in elsewhere
    ]
    records = {job.name: export_member(job, work.path, say) for job in jobs}
    _copy_others(run, work.path, elsewhere)
    heldout_rows.write_rows(work.path, stacker.members, _scored_unseen(run, stacker.members))
    return assemble(work, records, elsewhere, replace(wish, evidence=wish.evidence or held, training=training), say)


def certify_bundle(folder: Path, say: Callable[[str], object], wish: Wish) -> dict[str, Any]:
    """Decide anew which precisions a bundle's members may run at; nothing is converted. Returns as `export_run`."""
    folder = folder.resolve()
    artifacts.restore_folder(folder)
    values = bundle.open_bundle(folder)
    stacker = bundle.stacker_of(folder)
    place = folder.with_name(f".{folder.name}.certify")
    shutil.rmtree(place, ignore_errors=True)  # another bundle may have been here when it was left
    work = begin(place, folder, force=False)
    records = {name: read_record(work.path, name) for name in values["members"]}
    elsewhere = [name for name in stacker.members if name not in records]
    _copy_others(folder, work.path, elsewhere)
    (work.path / heldout_rows.FILE).unlink(missing_ok=True)
    if (folder / heldout_rows.FILE).is_file():
        shutil.copyfile(folder / heldout_rows.FILE, work.path / heldout_rows.FILE)
    return assemble(work, records, elsewhere, wish, say)


def _scored_unseen(run: Path, names: Sequence[str]) -> Rows:
    """Every row that has logits of weights that saw no row of its group: with folds the training rows too."""
    parts = [members.heldout_logits(run, names)]
    fitting = members.fitting_logits(run, names)
    if not fitting[0]["split"].isin(parts[0][0]["split"]).any():
        parts.append(fitting)
    rows = pd.concat([part for part, _ in parts])
    logits = np.concatenate([logits for _, logits in parts])
    return Rows(logits, rows["label"].to_numpy(), rows["group"].to_numpy(dtype=str))


def _copy_others(source: Path, target: Path, elsewhere: list[str]) -> None:
    """stacker.json, and the scores of members that were trained elsewhere."""
    shutil.rmtree(target / "externals", ignore_errors=True)
    for name in elsewhere:
        artifacts.ensure_folder(target / "externals")
        shutil.copyfile(artifacts.external_path(source, name), artifacts.external_path(target, name))
    shutil.copyfile(artifacts.stacker_path(source), artifacts.stacker_path(target))
