#!/usr/bin/env python3
"""manyeyes: tell AI-made images from real photographs with many eyes.

The command group. A command's module is imported only when that command is called, and
every error meant for the user becomes one line here.
"""

import importlib
import os
import sys

import click

from ensemble.core.errors import ManyeyesError, escape_control

# command -> (module, line for --help)
COMMANDS = {
    "demo": ("export.commands.demo", "The whole job on small real data, offline, in minutes."),
    "fetch": ("ensemble.commands.fetch", "Get training images from public collections."),
    "audit": ("ensemble.commands.audit", "Find what a detector could cheat with, before training."),
    "canonicalise": ("ensemble.commands.canonicalise", "Store both classes alike, so that only the pictures differ."),
    "select": ("ensemble.commands.select", "Choose pool images that resemble the test's."),
    "train": ("ensemble.commands.train", "Train one member from its recipe."),
    "train-all": ("ensemble.commands.train_all", "Train a member for every recipe in a folder."),
    "stack": ("ensemble.commands.stack", "Fit the stacker on the members' held-out logits."),
    "evaluate": ("export.commands.evaluate", "Score labelled images, as they are and damaged."),
    "report": ("ensemble.commands.report", "One page that shows whether to trust the stack."),
    "export": ("export.commands.export", "Convert members to ONNX, each checked against its original."),
    "infer": ("export.commands.infer", "Score images and write their `target` column."),
    "submit": ("export.commands.submit", "Check scores against a sample and write what to upload."),
    "kaggle-kernel": ("export.commands.kaggle_kernel", "Pack bundle, wheels and notebook for Kaggle."),
    "bench": ("export.commands.bench", "Measure a bundle's speed on this machine."),
    "frontier": ("export.commands.frontier", "What accuracy costs here; choose members to a budget."),
    "adapt": ("export.commands.adapt", "Estimate one shift of the stack from unlabelled images."),
    "push": ("export.commands.push", "Put the bundle on the Hugging Face Hub, with a model card."),
    "pull": ("export.commands.pull", "Get a bundle from the Hugging Face Hub."),
    "serve": ("export.commands.serve", "A page to drop images on, and its HTTP API."),
    "explain": ("export.commands.explain", "Show where in one image each member's evidence lies."),
}


class _LazyGroup(click.Group):
    """Lists commands from COMMANDS and imports a command's module only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="manyeyes")
def cli() -> None:
    """Tell AI-made images from real photographs with an ensemble of fine-tuned vision models.

    \b
    The usual way through:
      python cli.py train-all recipes/    fine-tune the five members on data/train/{ai,real}
      python cli.py stack                 weigh them on images they never saw
      python cli.py infer --onnx          score data/test.csv into submission.csv

    Exit codes: 0 done, 1 done with failures listed, 2 wrong use or nothing done.
    """


def main() -> None:
    """Run the command line; user errors become one line on stderr and exit code 2."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ManyeyesError as error:
        click.echo("\n".join(map(escape_control, f"Error: {error}".split("\n"))), err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Stopped. What was finished is kept; the same command goes on from there.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os._exit(141)  # the reader of our output went away, as in `| head`


if __name__ == "__main__":
    main()
