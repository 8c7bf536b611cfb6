"""What made a file of scores: a small JSON beside it, which `infer` writes and `submit` checks and carries on."""

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
from export.inference.ensemble import Ensemble
from export.inference.infer import InferOptions, InferResult
from export.runtimes.devices import version
from export.runtimes.settings import parse_config

# what submit reads of `made_by`'s values
READ = {"source": str, "stack": str, "uncertified": list, "images": dict, "options": dict}
MODEL = "model"  # the source of a single classifier's scores


def fingerprint_path(scores: Path) -> Path:
    """NAME.csv.json beside NAME.csv."""
    return scores.with_name(f"{scores.name}.json")


def scoring_sha256(stacker: Stacker, adapted: bool) -> str:
    """Hash of all that a target takes from the stacker: not its threshold, and its shift only where that is used."""
    values = (stacker if adapted else replace(stacker, adapted=None)).to_dict()
    return artifacts.json_sha256(
        {key: values.get(key) for key in ("members", "coef", "intercept", "calibration", "adapted")}
    )


def made_by(
    ensemble: Ensemble,
    source: str,
    listed: Mapping[str, Any] | None,
    options: InferOptions,
    images: Location,
    done: InferResult,
    libraries: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `infer` did, JSON-ready; names of files only, never their folders.

    source: run, bundle or MODEL. listed: bundle.json of the bundle that was run, as it was opened; None for torch
    members. `identity`: of the ensemble, so of all its weights. `uncertified`: the precisions in use that no
    certificate covers, such as "openvino bf16". libraries: versions of what ran the members, by
    runtime, where that was on other machines.
    """
    allowed = (listed or {}).get("precisions", {})
    used = dict(ensemble.settings)
    runtimes = {parse_config(key).runtime for key in used.values()}
    return {
        "source": source,
        "bundle": None if listed is None else artifacts.json_sha256(listed),
        "identity": ensemble.identity,
        "stack": scoring_sha256(ensemble.stacker, options.adapted),
        "members": used,
        "uncertified": sorted({key for key in used.values() if not allowed.get(key, {}).get("certified", True)}),
        "looked_up": [member.name for member in ensemble.externals],
        "device": ensemble.device,
        "options": {**asdict(options), "cascade": ensemble.cascade.to_dict() if ensemble.cascade else None},
        "input": as_utf8(storage.name(images)),
        "images": {"scored": done.scored, "failed": done.failed},
        "versions": versions(libraries or {runtime: version(runtime) for runtime in runtimes}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions(libraries: Mapping[str, str]) -> dict[str, str | None]:
    """Versions of what decides a score; manyeyes is None where it is not installed but run from its sources.

    libraries: of what runs the members, by runtime.
    """
    own = None
    with suppress(metadata.PackageNotFoundError):
        own = metadata.version("manyeyes")
    return {
        "manyeyes": own,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pandas": pd.__version__,
        "pillow": PIL.__version__,
        **dict(sorted(libraries.items())),
    }


def write_fingerprint(
    scores: Path, made: Mapping[str, Any] | None, submission: Mapping[str, Any] | None = None
) -> Path:
    """Write it beside finished `scores`; `made` of `made_by`, None where it is not known."""
    path = fingerprint_path(scores)
    values = {"file": as_utf8(scores.name), "sha256": artifacts.file_sha256(scores), "made": made}
    artifacts.write_json(path, {**values, **({"submission": submission} if submission else {})})
    return path


def read_made(scores: Path) -> dict[str, Any] | None:
    """`made_by`'s values for exactly these bytes; None where nothing beside them says what made them.

    ArtifactError for a submission that holds labels or P(real): `submit` would turn it once more.
    """
    try:
        values = artifacts.read_json(fingerprint_path(scores), "")
    except ArtifactError:  # not there, or not ours
        return None
    if values.get("sha256") != artifacts.file_sha256(scores):
        return None
    done = values.get("submission")
    if isinstance(done, dict) and (done.get("hard") or done.get("positive") == NEGATIVE):
        holds = "labels" if done.get("hard") else f"1 - target, of {NEGATIVE}"
        raise ArtifactError(f"{scores} is a submission already (it holds {holds}); give infer's file with --scores")
    made = values.get("made")
    return made if _is_sound(made) else None


def _is_sound(made: Any) -> bool:
    """Whether it has what submit reads, in the types that `made_by` writes, and can be written again."""
    if not (isinstance(made, dict) and all(isinstance(made.get(key), kind) for key, kind in READ.items())):
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
