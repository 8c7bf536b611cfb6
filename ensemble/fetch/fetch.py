"""Fetch the first images of one source, in the source's own order, into a folder; their bytes are kept as they are.

FOLDER/ai/, FOLDER/real/    the images
FOLDER/data.csv             one row per image, for --data
FOLDER/fetch.json           where they came from, and how far the fetch has got
FOLDER/.partial/            downloaded parts of an archive, until they have been read
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ensemble.core.errors import DataError, join_limited
from ensemble.data.archives import Tally
from ensemble.fetch.catalogue import ImageSource
from ensemble.fetch.fetch_job import FetchJob, class_quotas
from ensemble.fetch.hub_archives import fetch_archives
from ensemble.fetch.hub_rows import fetch_rows
from ensemble.fetch.kaggle import fetch_zip
from ensemble.fetch.output_folder import open_output_folder

# (job, limit) -> whether the source was read to its end; each stores images until the quotas are full
FETCHERS: dict[str, Callable[[FetchJob, int], bool]] = {
    "tar.gz": fetch_archives,
    "zip": fetch_zip,
    "parquet": fetch_rows,
}


@dataclass(frozen=True)
class FetchResult:
    """Images in the folder by label, how many are new, whether the source has no more, what was skipped or refused."""

    counts: dict[int, int]
    new: int
    exhausted: bool
    tally: Tally
    downloaded_bytes: int
    licence: str


def fetch(source: ImageSource, folder: Path, limit: int, keep_archive: bool = False) -> FetchResult:
    """Fetch the first `limit` images (0: all) of a source, half of each class where it has two, into `folder`.

    What is there is not fetched again; an interrupted fetch goes on. Raises DataError where the
    source cannot be reached or is broken, or `folder` holds images of another one.
    """
    with open_output_folder(folder, source) as output:
        state, quotas, before = output.read_state(), class_quotas(limit, source.labels), len(output.rows)
        total = sum(quotas.values())
        expected = source.images if math.isinf(total) else int(total)
        with tqdm(total=expected, initial=before, unit=" images", desc=source.name, disable=None) as bar:
            job = FetchJob(source, output, quotas, bar, state)
            exhausted = bool(state.get("ended")) and (not state["left_out"] or state["limit"] == limit)
            if not job.is_full and not exhausted:
                exhausted = FETCHERS[source.unpack](job, limit)
                job.update_state(ended=exhausted, left_out=job.skipped_full, limit=limit)
        if not output.rows:
            reasons = [f"{count} {reason}" for reason, count in sorted(job.tally.passed.items())]
            reason = join_limited([*reasons, *job.tally.refusals()]) or "it is empty"
            raise DataError(f"{source.name} gave no image ({reason})")
        if exhausted or not keep_archive:
            shutil.rmtree(output.partial_folder, ignore_errors=True)
        counts = {label: output.counts[label] for label in source.labels}
        new, licence = len(output.rows) - before, state.get("licence") or source.licence
        return FetchResult(counts, new, exhausted, job.tally, job.downloaded_bytes, licence)
