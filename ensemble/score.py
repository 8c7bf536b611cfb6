"""Images -> logits of one or several members, each image read and decoded once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL.Image import Image

from ensemble import images
from ensemble.contract import ImageContract
from ensemble.errors import ImageError
from ensemble.parallel import ordered_map

Views = dict[tuple[object, ...], np.ndarray]  # pixels by ImageContract.view


@dataclass(frozen=True)
class Runner:
    """A member ready to run, whatever runs it: uint8 [N, S, S, 3] -> float32 logit [N]."""

    name: str
    contract: ImageContract
    run: Callable[[np.ndarray], np.ndarray]


def score_images(
    files: Sequence[Path],
    runners: Sequence[Runner],
    batch_size: int = 16,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda count: None,
    read: Callable[[int, Path], Image] = lambda row, file: images.decode(file),
) -> tuple[np.ndarray, dict[int, str]]:
    """Logits float32 [images, runners] in the order given, and why images could not be read.

    Rows of unreadable images are NaN and stand in the second value by position. Files are
    decoded ahead on threads while the members run; the logits of several views are averaged.
    `progress` is called with the number of images done; `read` turns (row, file) into a
    decoded image.
    """
    contracts = {runner.contract.view: runner.contract for runner in runners}

    def load(item: tuple[int, Path]) -> Views | str:
        try:
            image = read(*item)
            return {view: images.to_pixels(image, contract) for view, contract in contracts.items()}
        except ImageError as error:
            return str(error)

    logits = np.full((len(files), len(runners)), np.nan, dtype=np.float32)
    errors: dict[int, str] = {}
    rows: list[int] = []
    batch: list[Views] = []
    done = 0
    for row, loaded in enumerate(ordered_map(load, enumerate(files), workers, ahead=2 * batch_size)):
        if isinstance(loaded, str):
            errors[row] = loaded
        else:
            rows.append(row)
            batch.append(loaded)
        if batch and (len(batch) == batch_size or row == len(files) - 1):
            for column, runner in enumerate(runners):
                logits[rows, column] = _run(runner, batch)
            rows, batch = [], []
        if not batch:
            progress(row + 1 - done)
            done = row + 1
    return logits, errors


def image_score(runners: Sequence[Runner]) -> Callable[[Sequence[Image]], np.ndarray]:
    """Decoded images -> logits float32 [images, runners]; ImageError for one that a contract cannot take."""
    contracts = {runner.contract.view: runner.contract for runner in runners}

    def score(pictures: Sequence[Image]) -> np.ndarray:
        batch = [
            {view: images.to_pixels(picture, contract) for view, contract in contracts.items()} for picture in pictures
        ]
        return np.stack([_run(runner, batch) for runner in runners], axis=1).astype(np.float32)

    return score


def _run(runner: Runner, batch: Sequence[Views]) -> np.ndarray:
    pixels = np.concatenate([views[runner.contract.view] for views in batch])
    return runner.run(pixels).reshape(len(batch), -1).mean(axis=1)


def with_flip(runner: Runner) -> Runner:
    """The same member, its logit averaged with that of the image mirrored left to right."""

    def run(pixels: np.ndarray) -> np.ndarray:
        mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
        return (runner.run(pixels) + runner.run(mirrored)) / 2

    return Runner(runner.name, runner.contract, run)
