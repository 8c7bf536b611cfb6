"""Logits of many members, runtimes and precisions on the same files; each is computed once, and cached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ensemble.core import artifacts, feature_cache
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models.runner import Runner, chunk_rows, score_images
from export.runtimes import capabilities, devices, runner
from export.runtimes.settings import ON_GPU, RuntimeConfig

CHUNK_FILES = 64  # files between two writes to the cache: a kill loses no more


@dataclass(frozen=True)
class LogitColumn:
    """The logits of one member at one config. key: a hash of all that decides them."""

    key: str
    open: Callable[[], Runner]


def logit_column(name: str, file: Path, preprocess_config: PreprocessConfig, config: RuntimeConfig) -> LogitColumn:
    """The column of an ONNX file, opened when it is needed. Its logits hold for one processor and library version."""
    machine = capabilities.available()
    computed_by = [machine.gpu if config.runtime in ON_GPU else machine.cpu, devices.version(config.runtime)]
    key = artifacts.json_sha256([artifacts.file_sha256(file), preprocess_config.to_dict(), str(config), *computed_by])
    return LogitColumn(key, partial(runner.open_runner, name, file, preprocess_config, config))


def compute_logits(
    files: Sequence[Path], columns: Sequence[LogitColumn], title: str
) -> tuple[list[int], np.ndarray, dict[int, str]]:
    """The rows of the files that can be read, their logits float64 [rows, columns], and why others cannot, by row.

    A network is loaded only where one of its logits is not in the cache.
    """
    digests, errors = dict[int, bytes](), dict[int, str]()
    for row, file in enumerate(files):
        try:
            digests[row] = bytes.fromhex(artifacts.file_sha256(file))
        except OSError as error:
            errors[row] = f"{file}: {error.strerror}"
    with feature_cache.open_cache(artifacts.cache_path() / "logits.sqlite") as cache:
        known = {column.key: feature_cache.cached_keys(cache, column.key) for column in columns}
        missing = {column.key: set(digests.values()) - known[column.key] for column in columns}
        runners = {column.key: column.open() for column in columns if missing[column.key]}
        # as many images at once as memory allows; a GPU pads each batch to its own size
        chunk = min(CHUNK_FILES, chunk_rows([runner.preprocess_config for runner in runners.values()], "cpu"))
        rows = [row for row, digest in digests.items() if any(digest in missing[key] for key in runners)]
        with tqdm(total=len(rows), desc=title, unit="image", leave=False, disable=None) as bar:
            for start in range(0, len(rows), CHUNK_FILES):
                part = rows[start : start + CHUNK_FILES]
                scores, failed = score_images(
                    [files[row] for row in part], list(runners.values()), chunk, progress=bar.update
                )
                errors |= {part[position]: text for position, text in failed.items()}
                read = [position for position in range(len(part)) if position not in failed]
                for key, logits in zip(runners, scores.T, strict=True):
                    values = {digests[part[position]]: logits[position].tobytes() for position in read}
                    feature_cache.write(cache, key, values)
        readable = [row for row in digests if row not in errors]
        table = np.empty((len(readable), len(columns)))
        for position, column in enumerate(columns):
            stored = feature_cache.read(cache, column.key, [digests[row] for row in readable])
            table[:, position] = np.frombuffer(b"".join(stored), dtype=np.float32)
    return readable, table, errors
