"""Logits of many members, runtimes and precisions on the same files: decoded once, computed once, kept in the cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ensemble.core import artifacts, feature_cache
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models.runner import Runner, chunk_rows, score_images
from export.runtimes import capabilities, devices
from export.runtimes import runner as runtime
from export.runtimes.settings import ON_GPU, RuntimeConfig

CHUNK = 64  # files between two writes to the cache: a kill loses no more


@dataclass(frozen=True)
class Column:
    """One member at one setting. key: a hash of all that decides its logits."""

    key: str
    open: Callable[[], Runner]


def column(name: str, file: Path, preprocess_config: PreprocessConfig, setting: RuntimeConfig) -> Column:
    """A file's, opened when it is needed. Its logits hold for one processor and library."""
    machine = capabilities.available()
    by = [machine.gpu if setting.runtime in ON_GPU else machine.cpu, devices.version(setting.runtime)]
    key = artifacts.json_sha256([artifacts.file_sha256(file), preprocess_config.to_dict(), str(setting), *by])
    return Column(key, partial(runtime.open_runner, name, file, preprocess_config, setting))


def compute(files: Sequence[Path], columns: Sequence[Column], title: str) -> tuple[np.ndarray, dict[int, str]]:
    """Logits float32 [files, columns], and why files could not be read, by row (theirs are NaN).

    A network is only loaded if the cache lacks a logit of its own.
    """
    digests, errors = _digests(files)
    with feature_cache.opened(artifacts.cache_path() / "logits.sqlite") as cache:
        kept = {column.key: feature_cache.known(cache, column.key) for column in columns}
        lacking = {column.key: set(digests.values()) - kept[column.key] for column in columns}
        runners = {column.key: column.open() for column in columns if lacking[column.key]}
        # together as far as memory allows: a GPU fills up each batch to its own size
        together = min(CHUNK, chunk_rows([runner.preprocess_config for runner in runners.values()], "cpu"))
        rows = [row for row, digest in digests.items() if any(digest in lacking[key] for key in runners)]
        with tqdm(total=len(rows), desc=title, unit="image", leave=False, disable=None) as bar:
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                scores, failed = score_images(
                    [files[row] for row in part], list(runners.values()), together, progress=bar.update
                )
                errors |= {part[place]: text for place, text in failed.items()}
                sound = [place for place in range(len(part)) if place not in failed]
                for key, logits in zip(runners, scores.T, strict=True):
                    feature_cache.write(cache, key, {digests[part[place]]: logits[place].tobytes() for place in sound})
        table = np.full((len(files), len(columns)), np.nan, dtype=np.float32)
        read = [row for row in digests if row not in errors]
        for place, column in enumerate(columns):
            values = feature_cache.read(cache, column.key, [digests[row] for row in read])
            table[read, place] = np.frombuffer(b"".join(values), dtype=np.float32)
    return table, errors


def _digests(files: Sequence[Path]) -> tuple[dict[int, bytes], dict[int, str]]:
    """SHA-256 of each file that can be opened, and why the others cannot, by row."""
    found, errors = {}, {}
    for row, file in enumerate(files):
        try:
            found[row] = bytes.fromhex(artifacts.file_sha256(file))
        except OSError as error:
            errors[row] = f"{file}: {error.strerror}"
    return found, errors
