"""Leave-one-generator-out scores of the stacker: refitted without a generator's held-out rows, scored on its images.

The members stay as they are, trained on that generator; `training_commands` trains them without it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.bootstrap import score_intervals
from ensemble.core.errors import ArtifactError, DataError, join_limited
from ensemble.core.metrics import Interval, sigmoid
from ensemble.evaluation.leakage import UNSEEN
from ensemble.evaluation.protocol import LOGIT_PREFIX
from ensemble.models import members
from ensemble.stacking.fit import fit_stacker
from ensemble.stacking.stacker import Stacker


def known_generators(run: Path | None, generators: Iterable[str | None]) -> dict[str, bool]:
    """The generators named, sorted, and whether the run was fitted on each.

    DataError if there is no run, none is named, or the run was fitted on none of them.
    """
    if run is None:
        raise DataError("--leave-out generator refits a run's stacker; name the run with --run")
    names = sorted({name for name in generators if name})
    if not names:
        raise DataError("--leave-out generator: the images name no generators; add a column generator to the CSV")
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    fitted = set(frame.loc[(frame["label"] == 1) & (frame["split"] != UNSEEN), "generator"].dropna())
    if not fitted & set(names):
        raise DataError(
            f"--leave-out generator: the run knows other generators "
            f"({join_limited(sorted(fitted), 12) or 'none named'}) "
            f"than these images have ({join_limited(names, 12)})"
        )
    return {name: name in fitted for name in names}


def leave_out_generators(run: Path, clean: pd.DataFrame, stacker: Stacker, seed: int = 0) -> list[dict[str, Any]]:
    """For each generator of the undamaged rows: the run's stack, and one that none of its fitting rows shaped.

    Both on that generator's images and all reals of `clean`, which neither was fitted on. JSON-ready: `full` and
    `without` are the AUROC of the two stacks, `images` how many of the generator were scored, `rows` how many fitting
    rows were left out, and `known` whether the members were trained on the generator.
    """
    known = known_generators(run, clean.loc[clean["label"] == 1, "generator"].dropna())
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first").set_index("id")
    rows, logits = members.fitting_logits(run, stacker.members)
    generator = frame.loc[rows["id"], "generator"].to_numpy(dtype=object)
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy(dtype=str)
    columns = [LOGIT_PREFIX + name for name in stacker.members]

    def auroc(fitted: Stacker, scored: pd.DataFrame) -> Interval:
        p = sigmoid(fitted.logit(scored[columns].to_numpy()))
        groups = scored["group"].to_numpy(dtype=str)
        return score_intervals(scored["label"].to_numpy(), p, groups, seed=seed, names=["auroc"])["auroc"]

    lines = []
    for name in known:
        own = (generator == name) & (labels == 1)
        scored = clean[(clean["label"] == 0) | (clean["generator"] == name)]
        full = without = auroc(stacker, scored)
        if own.any():
            try:
                refitted = fit_stacker(stacker.members, logits[~own], labels[~own], groups[~own], stacker.refit_method)
                without = auroc(refitted, scored)
            except ArtifactError:  # the rows do not suffice
                without = Interval(np.nan, np.nan, np.nan)
        counts = {"images": int((scored["label"] == 1).sum()), "rows": int(own.sum()), "known": known[name]}
        lines.append({"generator": name, **counts, "full": full.to_dict(), "without": without.to_dict()})
    return lines


def training_commands(run: Path, generators: Sequence[str]) -> list[str]:
    """The training that would leave each generator out of the members too; `...` stands for the run's own options."""
    return [
        f"python cli.py train-all ... --hold-out {quote('generator=' + name)} "
        f"--run {quote(f'{run}-without-{artifacts.safe_name(name)}')}"
        for name in generators
    ]
