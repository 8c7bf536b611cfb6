"""Trains one member of a prepared run in a process of its own: python -m ensemble.cluster.train_process REQUEST

REQUEST is a `TrainRequest` as JSON. Lines for the user go to its log, the result to its outcome file. The process
ends when its standard input does.
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from ensemble.cluster.train_worker import TrainRequest, append_line, end_with_input
from ensemble.core import artifacts
from ensemble.core.errors import ManyeyesError, error_line
from ensemble.core.log import no_log
from ensemble.core.recipe import Recipe
from ensemble.training import distributed, precision, train_all
from ensemble.training.progress import LiveProgress
from ensemble.training.train_member import Outcome, TrainContext


def main() -> None:
    """Train the member that the command line names, and write its outcome."""
    end_with_input()
    request = TrainRequest.from_json(sys.argv[1])
    try:
        outcome = train(request)
    except Exception as error:
        ours = isinstance(error, ManyeyesError) and not isinstance(error, distributed.MainProcessError)
        if ours or request.processes == 1:  # else another process may have been killed, which is worth another try
            _write(request, Outcome(request.name, "failed", error=error_line(error, first=True)))
        if not ours:
            raise
        sys.exit(1)
    else:
        if outcome is not None:
            _write(request, outcome)
    finally:
        distributed.destroy_process_group()


def train(request: TrainRequest) -> Outcome | None:
    """The outcome, in the main process alone."""
    recipe, run = Recipe.model_validate(request.recipe), Path(request.run)
    processes = distributed.init_process_group(request.device)
    if processes.device_type == "cpu":
        torch.set_num_threads(max(request.cpus // request.processes, 1))
    precision.keep_freed_memory()
    context = TrainContext(request.seed, processes, request.report_to, request.save_minutes, request.parallel_members)
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all again")
    checkpoint = distributed.run_on_main(processes, lambda: train_all.recipe_checkpoint(recipe))
    log = partial(append_line, request.log_path) if processes.is_main else no_log
    with LiveProgress([recipe.name], log) as progress:  # its output is no terminal, so that it logs lines
        progress.begin_member(recipe.name, processes.device)
        outcome = train_all.train_one(recipe, checkpoint, frame, run, context, progress)
    return outcome if processes.is_main else None


def _write(request: TrainRequest, outcome: Outcome) -> None:
    if not request.outcome_path.exists():  # of several processes, the first that fails says why
        with artifacts.replacing(request.outcome_path) as temporary:
            temporary.write_text(json.dumps(asdict(outcome)), encoding="utf-8")


if __name__ == "__main__":
    main()
