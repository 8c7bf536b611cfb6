"""train: one member from its recipe."""

from pathlib import Path
from typing import Any

import click

from ensemble.commands import options
from ensemble.commands.train_all import run_training
from ensemble.commands.training_options import TrainOptions, training_options


@click.command("train")
@click.argument("recipe", type=options.FILE)
@training_options
def train(recipe: Path, **settings: Any) -> int:
    """Train one member from its RECIPE, a YAML file.

    As train-all does, whose help says more; other members of the run stay as they are.

    \b
    Examples:
      python cli.py train recipes/swin_tiny.yaml --set train.epochs=2
      python cli.py train recipes/swin_tiny.yaml --set adapt.mode=lora --set train.layer_decay=null
    """
    return run_training(recipe, TrainOptions(**settings))
