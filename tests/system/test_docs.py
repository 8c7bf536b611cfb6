"""The pages of docs/: the command reference is what --help says; links, anchors, commands, options, extras exist."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from helpers import run_python

from cli import cli

ROOT = Path(__file__).resolve().parents[2]
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


def missing_anchors(page):
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    places = [(page.parent / link if link else page, anchor) for link, anchor in links if "://" not in link]
    return [anchor for path, anchor in places if path.suffix == ".md" and anchor not in anchors(path)]


def anchors(page):
    """What GitHub names the headings of a page: small letters, no punctuation, hyphens for spaces."""
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.casefold()).replace(" ", "-") for heading in headings}


def options_of(command):
    named = (option for parameter in command.params for option in parameter.opts + parameter.secondary_opts)
    return {"--help", *(option for option in named if option.startswith("-"))}


def unknown_in_backticks(text):
    """Options in `backticks` outside of code blocks that no command has."""
    known = set().union(*(options_of(cli.get_command(None, name)) for name in cli.list_commands(None)))
    prose = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
    found = [option for code in re.findall(r"`([^`]+)`", prose) for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code)]
    return [option for option in found if option not in known]


def unknown_extras(text):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"(?:manyeyes|(?<![\w/])\.)\[([a-z0-9, ]+)\]", text)
    return [extra for names in named for extra in re.split(r",\s*", names) if extra not in extras]


def unknown_options(text):
    """`command --option` for every shell line of ours that names a command or an option which we do not have."""
    wrong = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for name, rest in re.findall(r"cli\.py ([a-z][a-z-]*)([^|#&`;]*)", line):
            command = cli.get_command(None, name)
            known = options_of(command) if command else set()
            wrong += [] if command else [name]
            wrong += [f"{name} {option}" for option in re.findall(r"(?<=\s)--[a-z][\w-]*", rest) if option not in known]
    return wrong


def test_the_command_reference_is_what_help_says():
    # by itself: a command that another test called without its group would keep no -h
    code = f"import sys; sys.path.insert(0, {str(DOCS)!r}); import commands; sys.stdout.write(commands.reference())"
    done = run_python("-X", "utf8", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert page == done.stdout, "renew it: python docs/commands.py"


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
def test_anchors_are_headings(page):
    assert missing_anchors(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_options_and_extras_exist(page):
    text = page.read_text(encoding="utf-8")
    assert unknown_options(text) == []
    assert unknown_in_backticks(text) == []
    assert unknown_extras(text) == []


def test_a_dead_link_and_an_unknown_option_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](gone.md) [b](page.md#x) [c](https://example.org)")
    assert missing_links(page) == ["gone.md"]
    assert unknown_options("$ python cli.py stack --run x --drop-two\n$ python cli.py fly") == [
        "stack --drop-two",
        "fly",
    ]


def test_a_dead_anchor_an_option_in_prose_and_an_extra_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`: 3\n```\n# no heading\n```\n[a](#one-two-3) [b](page.md#no-heading) [c](#gone)")
    assert missing_anchors(page) == ["no-heading", "gone"]
    assert unknown_in_backticks("`--run` or `--drop-two K`\n```\n$ pip `--other`\n```\nand `stack --fly`") == [
        "--drop-two",
        "--fly",
    ]
    assert unknown_extras('pip install "manyeyes[train,gpu]" -e ".[serve]" ".[page]" x.[no]') == ["gpu", "page"]
