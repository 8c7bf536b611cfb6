"""One member of a prepared run in a process of its own: python -m ensemble.cluster.train_process ORDER

ORDER is an `Order` as JSON. What comes of it stands in the run's events of this member. The process ends
when its standard input does.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from ensemble.cluster.events import Events
from ensemble.cluster.train_worker import TrainRequest, end_with_input
from ensemble.core import artifacts
from ensemble.core.errors import ManyeyesError, error_line
from ensemble.core.recipe import Recipe
from ensemble.training import distributed, precision
from ensemble.training import train_all as runs
from ensemble.training.train_member import TrainContext


class Silent:
    """A Watch for the processes that do not speak."""

    def log(self, line: str) -> None:
        """Nothing; so do the next."""

    def part(self, title: str, epochs: int, steps: int, done: int = 0, share: float = 1.0) -> None:
        """As `Watch.part`."""

    def step(self, step: int, loss: float | None, lr: float, images: int) -> None:
        """As `Watch.step`."""

    def epoch(self, record: Mapping[str, float], better: bool) -> None:
        """As `Watch.epoch`."""

    def scoring(self, title: str, total: int) -> Callable[[int], object]:
        """As `Watch.scoring`."""
        return lambda count: None


def main() -> None:
    """Train the member that the command line orders, and write its outcome."""
    end_with_input()
    order = TrainRequest.of(sys.argv[1])
    events = Events(order.events)
    try:
        outcome = train(order, events)
    except Exception as error:
        ours = isinstance(error, ManyeyesError) and not isinstance(error, distributed.MainProcessError)
        if ours or order.processes == 1:  # else another process may have been killed, which is worth another try
            events.tell(
                "outcome", values=asdict(runs.Outcome(order.name, "failed", error=error_line(error, first=True)))
            )
        if not ours:
            raise
        sys.exit(1)
    else:
        if outcome is not None:
            events.tell("outcome", values=asdict(outcome))
    finally:
        distributed.destroy_process_group()


def train(order: TrainRequest, events: Events) -> runs.Outcome | None:
    """The outcome, of the first process alone."""
    recipe, run = Recipe.model_validate(order.recipe), Path(order.run)
    processes = distributed.init_process_group(order.device)
    if processes.device_type == "cpu":
        torch.set_num_threads(max(order.cpus // order.processes, 1))
    precision.keep_freed_memory()
    setup = TrainContext(order.seed, processes, order.report_to, order.save_minutes, order.beside)
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all again")
    checkpoint = distributed.run_on_main(processes, lambda: runs.recipe_checkpoint(recipe))
    outcome = runs.train_one(recipe, checkpoint, frame, run, setup, events if processes.is_main else Silent())
    return outcome if processes.is_main else None


if __name__ == "__main__":
    main()
