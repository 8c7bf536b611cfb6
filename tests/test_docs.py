"""The pages of docs/: the command reference is what --help says, links lead somewhere, commands and options exist."""

import importlib.util
import re
from pathlib import Path

import pytest

from cli import cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def load_script():
    spec = importlib.util.spec_from_file_location("docs_commands", DOCS / "commands.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def missing_links(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


def unknown_options(text):
    """`command --option` for every shell line of ours that names a command or an option which we do not have."""
    wrong = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for name, rest in re.findall(r"cli\.py ([a-z][a-z-]*)([^|#&`;]*)", line):
            command = cli.get_command(None, name)
            known = (
                {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
                | {"--help"}
                if command
                else set()
            )
            wrong += [] if command else [name]
            wrong += [f"{name} {option}" for option in re.findall(r"(?<=\s)--[a-z][\w-]*", rest) if option not in known]
    return wrong


def test_the_command_reference_is_what_help_says():
    script = load_script()
    assert script.PAGE.read_text(encoding="utf-8") == script.reference(), "renew it: python docs/commands.py"


def test_the_command_reference_does_not_depend_on_the_terminal(monkeypatch):
    script = load_script()
    monkeypatch.setenv("COLUMNS", "40")
    narrow = script.reference()
    monkeypatch.setenv("COLUMNS", "300")
    assert narrow == script.reference()
    assert max(map(len, narrow.splitlines())) > 80


def test_the_command_reference_changes_with_a_help_text(monkeypatch):
    script = load_script()
    before = script.reference()
    monkeypatch.setattr(cli.get_command(None, "stack"), "help", "Something else.")
    assert script.reference() != before


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert missing_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    assert unknown_options(page.read_text(encoding="utf-8")) == []


def test_a_dead_link_and_an_unknown_option_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](gone.md) [b](page.md#x) [c](https://example.org)")
    assert missing_links(page) == ["gone.md"]
    assert unknown_options("$ python cli.py stack --run x --drop-two\n$ python cli.py fly") == [
        "stack --drop-two",
        "fly",
    ]
