"""Finished members on disk: their member.json, their network and their held-out logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, join_limited
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.data import dataset
from ensemble.data.splits import FITTED_SPLITS
from ensemble.models import external

if TYPE_CHECKING:
    from ensemble.models.backbone import Member


def read_info(run: Path, name: str) -> dict[str, Any]:
    """A finished member's member.json."""
    return artifacts.read_json(artifacts.member_path(run, name) / "member.json", "run train-all again")


def stored_preprocess_config(folder: Path) -> PreprocessConfig | None:
    """The preprocessing in a member folder's member.json, more exact than a processor's; None without the file."""
    if not (folder / "member.json").is_file():
        return None
    return PreprocessConfig.from_dict(artifacts.read_json(folder / "member.json", "remove it")["contract"])


def is_current(run: Path, name: str, expected: dict[str, Any]) -> bool:
    """Whether member.json has all these values (hashes, version, seed); False for a member that is not finished."""
    try:
        info = read_info(run, name)
    except ArtifactError:
        return False
    return all(info.get(key) == value for key, value in expected.items())


def check_files(folder: Path, files: dict[str, str], remedy: str) -> None:
    """Raise ArtifactError unless every listed file is there with its SHA-256."""
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; {remedy}")
        if artifacts.file_sha256(path) != digest:
            raise ArtifactError(f"{path} is damaged: it is not the file that was written; {remedy}")


def load_member(run: Path, name: str) -> "Member":
    """A finished member as the torch module that was trained. Needs torch."""
    from ensemble.models.backbone import Member, load_classifier

    info, folder = read_info(run, name), artifacts.member_path(run, name)
    check_files(folder, info["files"], "train the member again")
    network, _ = load_classifier(folder)
    return Member(network, PreprocessConfig.from_dict(info["contract"])).eval()


def heldout_logits(
    run: Path, names: Sequence[str], splits: Sequence[str] = ("heldout",)
) -> tuple[pd.DataFrame, np.ndarray]:
    """The held-out rows (id, label, group, split) and the members' logits float64 [N, members].

    splits: may add "unseen", the generators or sources that nothing was fitted on. ArtifactError where members differ
    in data set, split or folds, rows are missing or doubled, or a member was trained or tuned on a row.
    """
    frame = _common_rows(run, names)
    return _logits(run, names, frame, frame["split"].isin(splits))


def fitting_logits(run: Path, names: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows that a stacker is fitted on, and their logits, in the form of `heldout_logits`.

    With folds: the train and tune rows, each scored by weights that never saw its group. Without: the held-out rows.
    """
    frame = _common_rows(run, names)
    folded = frame["fold"].notna()
    return _logits(run, names, frame, folded if folded.any() else frame["split"] == "heldout")


def _common_rows(run: Path, names: Sequence[str]) -> pd.DataFrame:
    """The run's rows, if all these members were made from them."""
    infos = {name: read_info(run, name) for name in names if not external.is_external(run, name)}
    folds = {name: info.get("folds") for name, info in infos.items()}
    if len(set(folds.values())) > 1:
        listed = join_limited(f"{name} {'with ' + str(count) if count else 'without'}" for name, count in folds.items())
        raise ArtifactError(
            f"members were trained with different folds ({listed}); train them alike, or choose some with --members"
        )
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    data = dataset.run_sha256(frame, run)
    for name, info in infos.items():
        if info["data_sha256"] != data:
            raise ArtifactError(
                f"member {name!r} was trained on another data set or split than {artifacts.dataset_path(run)}; "
                "run train-all again, or leave it out with --members"
            )
    return frame


def _logits(run: Path, names: Sequence[str], frame: pd.DataFrame, chosen: pd.Series) -> tuple[pd.DataFrame, np.ndarray]:
    rows = frame.loc[chosen, ["id", "label", "group", "split"]].reset_index(drop=True)
    return rows, np.stack([_column(run, name, frame, rows) for name in names], axis=1)


def _column(run: Path, name: str, frame: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    if external.is_external(run, name):
        return external.heldout_column(external.read_external(run, name), rows["id"])
    path = artifacts.member_path(run, name) / "heldout.parquet"
    scores = artifacts.read_parquet(path, "train the member again")
    remedy = f"{path} cannot be used; train {name!r} again"
    if repeated := sorted(set(scores.loc[scores["id"].duplicated(), "id"])):
        raise ArtifactError(
            f"{name}: ids stand more than once in its held-out rows ({join_limited(repeated)}); {remedy}"
        )
    own = frame.set_index("id").reindex(scores["id"]).reset_index()
    # scored by another fold's weights: held out all the same
    out_of_fold = (scores["fold"].astype("Int16") == own["fold"].astype("Int16")).fillna(False).astype(bool)
    if (fitted := own["split"].isin(FITTED_SPLITS) & ~out_of_fold).any():
        ids = join_limited(scores.loc[fitted, "id"])
        raise ArtifactError(f"{name}: rows it was trained or tuned on are among its held-out rows ({ids}); {remedy}")
    held = scores.set_index("id")
    if missing := [key for key in rows["id"] if key not in held.index]:
        raise ArtifactError(f"{name}: {len(missing)} rows have no logit ({join_limited(missing)}); {remedy}")
    scored, expected = (set(table.loc[table["split"] == "heldout", "id"]) for table in (scores, frame))
    if extra := sorted(scored - expected):
        raise ArtifactError(f"{name}: ids that the data set does not hold out ({join_limited(extra)}); {remedy}")
    held = held.loc[rows["id"]]
    if list(held["label"]) != list(rows["label"]):
        raise ArtifactError(f"{name}: its labels differ from the data set's; {remedy}")
    logits = held["logit"].to_numpy(dtype=np.float64)
    if not np.isfinite(logits).all():
        raise ArtifactError(f"{name}: some held-out logits are not finite; {remedy}")
    return logits
