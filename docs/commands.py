"""Writes docs/commands.md, the command reference, from the commands' own --help: python docs/commands.py"""

import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "commands.md"
WIDTH = 100  # characters, whatever the terminal has


def reference() -> str:
    """The page as text: --help of `python cli.py` and of every command, in the order of the list there."""
    from cli import cli

    with click.Context(cli, info_name="python cli.py", **cli.context_settings | {"terminal_width": WIDTH}) as group:
        parts = [
            "# Commands",
            "What `--help` says, by `python docs/commands.py`; do not edit. Paths are relative to where you are.",
            _block(cli.get_help(group)),
        ]
        for name in cli.list_commands(group):
            command = cli.get_command(group, name)
            if command is None:
                raise LookupError(f"cli.py lists {name} but does not have it")
            with click.Context(command, parent=group, info_name=name, terminal_width=WIDTH) as context:
                parts += [f"## {name}", _block(command.get_help(context))]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    """Text as a fenced block, without the spaces that click leaves at line ends."""
    return "```text\n" + "\n".join(line.rstrip() for line in text.splitlines()) + "\n```"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(reference(), encoding="utf-8")
    click.echo(f"{len(PAGE.read_text(encoding='utf-8').splitlines())} lines -> {PAGE}")
