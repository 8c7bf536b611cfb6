"""Fetch images of one source into a folder: the first ones in the source's own order, each as the bytes it is.

FOLDER/ai/, FOLDER/real/    the images
FOLDER/data.csv             a row each, for --data
FOLDER/fetch.json           where they came from, and how far the fetch went
FOLDER/.partial/            what was downloaded of an archive, until it has been read
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ensemble.core.errors import DataError, join_limited
from ensemble.data.archives import Tally
from ensemble.fetch.catalogue import Source
from ensemble.fetch.hub_archives import fetch_archives
from ensemble.fetch.hub_rows import fetch_rows
from ensemble.fetch.kaggle import fetch_zip
from ensemble.fetch.output_folder import opened
from ensemble.fetch.quotas import Job, shares

# Each takes images until all are there that were asked for, and says whether it came to the source's end.
RUNNERS: dict[str, Callable[[Job, int], bool]] = {"tar.gz": fetch_archives, "zip": fetch_zip, "parquet": fetch_rows}


@dataclass(frozen=True)
class Outcome:
    """What a fetch left: images by label, how many are new, what was not taken, bytes over the network."""

    counts: dict[int, int]
    new: int
    ended: bool
    tally: Tally
    downloaded: int
    licence: str


def fetch(source: Source, folder: Path, limit: int, keep_archive: bool = False, progress: bool = True) -> Outcome:
    """Fetch the first `limit` images (0: all) of a source, half of each class where it has two, into `folder`.

    What is there already is not fetched again, and what an earlier fetch left unfinished goes on.
    Raises DataError where the source cannot be reached or is broken, or `folder` holds another one.
    """
    with opened(folder, source) as store:
        state, quotas, before = store.read_state(), shares(limit, source.labels), len(store.rows)
        whole = sum(quotas.values())
        total = source.images if math.isinf(whole) else int(whole)
        disable = None if progress else True  # None: no bar where nobody watches
        with tqdm(total=total, initial=before, unit=" images", desc=source.name, disable=disable) as bar:
            job = Job(source, store, quotas, bar, state)
            ended = bool(state.get("ended")) and (not state["left_out"] or state["limit"] == limit)
            if not job.full and not ended:
                ended = RUNNERS[source.unpack](job, limit)
                job.remember(ended=ended, left_out=job.left_out, limit=limit)
        if not store.rows:
            raise DataError(_nothing(job))
        if ended or not keep_archive:
            shutil.rmtree(store.partial, ignore_errors=True)
        counts = {label: store.counts[label] for label in source.labels}
        new = len(store.rows) - before
        return Outcome(counts, new, ended, job.tally, job.downloaded, state.get("licence") or source.licence)


def _nothing(job: Job) -> str:
    passed = [f"{count} {reason}" for reason, count in sorted(job.tally.passed.items())]
    return f"{job.source.name} gave no image ({join_limited([*passed, *job.tally.refusals()]) or 'it is empty'})"
