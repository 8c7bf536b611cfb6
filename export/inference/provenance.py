"""Provenance of a file of scores: a small JSON beside it. `infer` writes it; `submit` checks and extends it."""

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.core.names import NEGATIVE
from ensemble.data import storage
from ensemble.data.files import as_utf8
from ensemble.data.storage import Location
from ensemble.stacking.stacker import Stacker
from export.inference.infer import InferResult, PreparedEnsemble, ScoreOptions

# fields of `describe_scoring` that submit reads, and their types
REQUIRED_FIELDS = {"source": str, "stack": str, "uncertified": list, "images": dict, "options": dict}
MODEL = "model"  # the source of a single classifier's scores


def provenance_path(scores: Path) -> Path:
    """NAME.csv.json beside NAME.csv."""
    return scores.with_name(f"{scores.name}.json")


def stacker_sha256(stacker: Stacker, adapted: bool) -> str:
    """Hash of what decides a target in the stacker: without its threshold, with its shift only if `adapted`."""
    values = (stacker if adapted else replace(stacker, adapted=None)).to_dict()
    return artifacts.json_sha256(
        {key: values.get(key) for key in ("members", "coef", "intercept", "calibration", "adapted")}
    )


def describe_scoring(
    prepared: PreparedEnsemble, kind: str, options: ScoreOptions, images: Location, result: InferResult
) -> dict[str, Any]:
    """How `infer` made its scores, JSON-ready; names of files only, never their folders.

    kind: run, bundle or MODEL. images: the input. Of the result: `identity` is the ensemble's, so it covers all
    weights; `uncertified` lists the precisions in use that no certificate covers, such as "openvino bf16".
    """
    ensemble = prepared.ensemble
    precisions = (prepared.bundle or {}).get("precisions", {})
    used = dict(ensemble.settings)
    own = None  # where manyeyes runs from its sources, not installed
    with suppress(metadata.PackageNotFoundError):
        own = metadata.version("manyeyes")
    return {
        "source": kind,
        "bundle": None if prepared.bundle is None else artifacts.json_sha256(prepared.bundle),
        "identity": ensemble.identity,
        "stack": stacker_sha256(ensemble.stacker, options.adapted),
        "members": used,
        "uncertified": sorted({key for key in used.values() if not precisions.get(key, {}).get("certified", True)}),
        "looked_up": [member.name for member in ensemble.externals],
        "device": ensemble.device,
        "options": {**asdict(options), "cascade": ensemble.cascade.to_dict() if ensemble.cascade else None},
        "input": as_utf8(storage.name(images)),
        "images": {"scored": result.scored, "failed": result.failed},
        "versions": {
            "manyeyes": own,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pandas": pd.__version__,
            "pillow": PIL.__version__,
            **dict(sorted(prepared.libraries.items())),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_provenance(
    scores: Path, made_by: Mapping[str, Any] | None, submission: Mapping[str, Any] | None = None
) -> Path:
    """Write the provenance of finished `scores`. made_by: of `describe_scoring`, None where it is not known."""
    path = provenance_path(scores)
    values = {"file": as_utf8(scores.name), "sha256": artifacts.file_sha256(scores), "made": made_by}
    artifacts.write_json(path, {**values, **({"submission": submission} if submission else {})})
    return path


def read_provenance(scores: Path) -> dict[str, Any] | None:
    """The values of `describe_scoring` for a file of scores; None if there is no valid provenance of these bytes.

    ArtifactError for a submission that holds labels or P(real): `submit` would convert it a second time.
    """
    try:
        values = artifacts.read_json(provenance_path(scores), "")
    except ArtifactError:  # missing, or not ours
        return None
    if values.get("sha256") != artifacts.file_sha256(scores):
        return None
    submitted = values.get("submission")
    if isinstance(submitted, dict) and (submitted.get("hard") or submitted.get("positive") == NEGATIVE):
        holds = "labels" if submitted.get("hard") else f"1 - target, of {NEGATIVE}"
        raise ArtifactError(f"{scores} is a submission already (it holds {holds}); give infer's file with --scores")
    made_by = values.get("made")
    return made_by if _is_valid(made_by) else None


def _is_valid(made: Any) -> bool:
    """Whether it has the fields that submit reads, of the right types, and can be written as JSON again."""
    if not (isinstance(made, dict) and all(isinstance(made.get(key), kind) for key, kind in REQUIRED_FIELDS.items())):
        return False
    try:
        json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False).encode()
    except (RecursionError, ValueError):
        return False
    return (
        all(isinstance(setting, str) for setting in made["uncertified"])
        and type(made["images"].get("failed")) is int
        and isinstance(made["options"].get("adapted"), bool)
    )
