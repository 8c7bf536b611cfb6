"""Numbers of training for those who watch it: TensorBoard's event files, or a tracker of accelerate's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from torch.utils.tensorboard import SummaryWriter

from ensemble.core.errors import UnavailableError

PROJECT = "manyeyes"
# What each tracker calls the name of a run within a project; the others go by the project alone.
RUN_NAMES = {"wandb": "name", "mlflow": "run_name", "trackio": "name", "swanlab": "experiment_name"}
PACKAGES = {"comet_ml": "comet-ml"}  # where the package has another name
FLUSH = 30  # seconds; what a kill may lose of the event file


@dataclass(frozen=True)
class Trackers:
    """Open trackers of one fit."""

    writer: SummaryWriter | None
    others: Sequence[GeneralTracker]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step, by name."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        for tracker in self.others:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is still held back."""
        if self.writer is not None:
            self.writer.close()
        for tracker in self.others:
            tracker.finish()


def check_trackers(report_to: Sequence[str]) -> None:
    """UnavailableError for a tracker that is unknown, or whose package is absent; "none" is none."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in report_to:
        if name != "none" and name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise UnavailableError(f"no tracker {name!r}; it is none, or some of: {known}")
        if name != "none" and name not in available:
            ready = ", ".join(available)
            raise UnavailableError(
                f"the tracker {name} is not installed (there is: {ready}); run: pip install {PACKAGES.get(name, name)}"
            )


def open_trackers(
    report_to: Sequence[str], folder: Path, name: str, config: Mapping[str, Any], done: int = 0
) -> Trackers:
    """Begin, or go on with, the logs of one fit; on the main process alone.

    TensorBoard's events lie in folder/name, where `name` may be "NAME" or "NAME/fold-2". done:
    steps that stand from an earlier run; TensorBoard forgets what it was told of later ones.
    config: shown by the other trackers, nested values under dotted names.
    """
    check_trackers(report_to)
    wanted = [tracker for tracker in dict.fromkeys(report_to) if tracker != "none"]
    writer = None
    if "tensorboard" in wanted:
        writer = SummaryWriter(str(folder / name), purge_step=done + 1, flush_secs=FLUSH)
    return Trackers(writer, [_open(tracker, folder, name, config) for tracker in wanted if tracker != "tensorboard"])


def _open(tracker: str, folder: Path, name: str, config: Mapping[str, Any]) -> GeneralTracker:
    PartialState()  # accelerate's trackers ask it whether this is the main process
    kind = LOGGER_TYPE_TO_CLASS[tracker]
    options: dict[str, Any] = {RUN_NAMES[tracker]: name} if tracker in RUN_NAMES else {}
    if kind.requires_logging_directory:
        options["logging_dir"] = str(folder)
    opened = kind(PROJECT, **options)
    try:
        opened.start()
        opened.store_init_configuration(_flat(config))
    except Exception as error:
        # An account, a server or a setting of the tracker's own: its message says what it lacks.
        brief = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnavailableError(f"the tracker {tracker} did not start: {brief}") from error
    return opened


def _flat(values: Mapping[str, Any], lead: str = "") -> dict[str, Any]:
    """Nested mappings as one, under dotted names; what is no number, text or None as text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{lead}{name}.")
        else:
            flat[f"{lead}{name}"] = value if value is None or isinstance(value, int | float | str) else str(value)
    return flat
