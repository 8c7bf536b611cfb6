"""Image columns of data sets on the Hub, streamed by `datasets` as the bytes that the files hold."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

from ensemble.core.errors import DataError, error_line, escape_control, join_limited
from ensemble.data.archives import MAX_IMAGE_BYTES, TOO_LARGE
from ensemble.fetch.catalogue import ImageSource
from ensemble.fetch.fetch_job import FetchJob, require_package
from ensemble.fetch.hub_stream import translate_hub_errors

MAX_UNLABELLED_ROWS = 1000  # if none of so many first rows has a known label, the classes are taken to be wrong


def fetch_rows(job: FetchJob, limit: int) -> bool:
    """Fetch from an image column on the Hub. Returns whether it was read to its end."""
    source, tally = job.source, job.tally
    commit, start = job.pinned_commit(), _first_row(job, limit)
    by_value = {value.casefold(): label for value, label in source.classes.items()}
    unknown = Counter[str]()
    for name, value, image in read_rows(source, commit, start):
        label = source.label if source.label is not None else by_value.get(value.casefold())
        if label is None:
            unknown[value] += 1
            if not job.output.rows and unknown.total() >= MAX_UNLABELLED_ROWS:
                raise _unknown_labels(source, unknown)
        if not job.needs(name, label) or label is None:
            continue
        with translate_hub_errors(source.hub):
            data = _image_bytes(image, source)
        if data is None:
            tally.refuse("that lie outside the data set", image.get("path") or name)
        elif len(data) > MAX_IMAGE_BYTES:
            tally.refuse(TOO_LARGE, name)
        else:
            job.store(name, label, data)
            if job.is_full:
                return False
    if unknown and not job.output.rows:
        raise _unknown_labels(source, unknown)
    return True


def _unknown_labels(source: ImageSource, values: Iterable[str]) -> DataError:
    return DataError(
        f"{source.hub}: the column {source.label_column} holds {join_limited(map(repr, values))}; "
        f"say what they are, for example --classes {next(iter(values))}=real"
    )


def _first_row(job: FetchJob, limit: int) -> int:
    """The row to start at: the one after the last stored, unless an earlier row may be needed now."""
    rows, state = job.output.rows, job.state
    last = int(next(reversed(rows)).split("/")[1]) if rows else -1
    if len(job.source.labels) == 1:
        return last + 1
    if state.get("begun") != limit:
        job.update_state(begun=limit, rows_begun=len(rows))
    return last + 1 if len(rows) > state["rows_begun"] else 0


def read_rows(source: ImageSource, commit: str, start: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (name, value of the label column or "", image as `datasets` stores it) of the rows from `start` on.

    The name is SPLIT/ROW, followed by the file's own name if the data set has one. A ClassLabel
    is read as its name.
    """
    require_package("datasets", "a data set on the Hub")
    with translate_hub_errors(source.hub):
        rows, name_of = _open(source, commit)
        rows = iter(rows.skip(start) if start else rows)
    for number in count(start):
        try:
            with translate_hub_errors(source.hub):
                row = next(rows, None)
        except ValueError as error:  # pyarrow's, of a damaged file
            raise DataError(f"{source.hub}: after row {number - 1} a file is damaged ({error})") from None
        if row is None:
            return
        image = row[source.image_column] or {}
        value = name_of(row[source.label_column]) if source.label_column else ""
        base = os.path.basename(escape_control(image.get("path") or ""))
        yield "/".join(filter(None, [source.split, f"{number:08}", base])), value, image


def _open(source: ImageSource, commit: str) -> tuple[Any, Callable[[Any], str]]:
    """The streamed rows, their images not decoded, and a function that turns a label into text."""
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(source.hub, source.config, split=source.split, revision=commit, streaming=True)
        features = rows.features or next(iter(rows.take(1))).keys()
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UnicodeEncodeError):  # a token with such characters; the caller explains it
            raise
        if "gated" in str(error):
            reason = f"access is granted on request: accept its terms at {source.url}, then run: hf auth login"
        else:  # no such split or configuration, no data, a format that datasets does not read
            reason = error_line(error)
        raise DataError(f"{source.hub}: {reason}") from None
    columns = [source.image_column, source.label_column] if source.label_column else [source.image_column]
    if missing := [column for column in columns if column not in features]:
        raise DataError(
            f"{source.hub} has no column {missing[0]!r}; it has {join_limited(features, 20)}: "
            "name them with --image-column and --label-column"
        )
    rows = rows.decode(False) if rows.features else rows.cast_column(source.image_column, datasets.Image(decode=False))
    rows = rows.select_columns(columns)
    label = features[source.label_column] if source.label_column and rows.features else None
    names = getattr(label, "names", None)
    if names:
        known = {name.casefold() for name in source.classes}
        if not any(name.casefold() in known for name in names):
            raise _unknown_labels(source, names)
        return rows, lambda value: "" if value is None or value < 0 else str(names[value])
    return rows, str


def _image_bytes(image: dict[str, Any], source: ImageSource) -> bytes | None:
    """An image's bytes; None for a path that leads anywhere but into the data set itself."""
    if image.get("bytes") is not None:
        return bytes(image["bytes"])
    path = image.get("path") or ""
    if not path.rpartition("::")[2].startswith(f"hf://datasets/{source.hub}@"):
        return None
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return bytes(file.read(MAX_IMAGE_BYTES + 1))
