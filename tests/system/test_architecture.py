"""The packages import in one direction, and nothing grows past what one can read. docs/architecture.md draws it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

# a package -> the packages it may import; itself always
ENSEMBLE = {
    "core": "",
    "images": "core",
    "data": "core images",
    "models": "core images data",
    "audit": "core images data models",
    "stacking": "core images data models",
    "cascade": "core images data models stacking",
    "training": "core images data models",
    "cluster": "core images data models training",
    "evaluation": "core images data models audit stacking",
    "fetch": "core images data",
    "selection": "core images data models training",
    "commands": "core images data models audit stacking cascade training cluster evaluation fetch selection",
}
# these may import all of ensemble but its commands
EXPORT = {
    "runtimes": "",
    "bundle": "runtimes",
    "inference": "runtimes bundle",
    "cluster": "runtimes bundle inference",
    "hub": "runtimes bundle inference",
    "kaggle": "runtimes bundle inference",
    "web": "runtimes bundle inference",
    "commands": "runtimes bundle inference cluster hub kaggle web",
}
LIBRARIES = set(ENSEMBLE) - {"commands"}
ALLOWED = (
    {f"ensemble.{name}": {f"ensemble.{other}" for other in others.split()} for name, others in ENSEMBLE.items()}
    | {
        f"export.{name}": {f"export.{other}" for other in others.split()} | {f"ensemble.{other}" for other in LIBRARIES}
        for name, others in EXPORT.items()
    }
    | {"export": {"export.inference"}, "ensemble": set()}  # export/__init__.py hands out Predictor
)
ALLOWED["export.commands"] |= {"ensemble.commands"}
# a library -> where it may be imported at all
ONLY_IN = {"click": ("ensemble.commands", "export.commands"), "ray": ("ensemble.cluster", "export.cluster")}

MOST_LINES, MOST_MODULES, MOST_IN_COMMANDS, MOST_AT_THE_TOP, MOST_PARAMETERS = 400, 14, 20, 3, 8


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """`ensemble.core.errors` -> `ensemble.core`; `export` stays."""
    return ".".join(module.split(".")[:2])


def imports(tree: ast.AST) -> Iterator[str]:
    """Whatever a module imports, also inside functions and under TYPE_CHECKING: modules, or module.name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read_sources(root: Path) -> dict[str, ast.Module]:
    files = [path for half in ("ensemble", "export") for path in sorted((root / half).rglob("*.py"))]
    return {module_name(path, root): ast.parse(path.read_text("utf-8")) for path in files}


def graph(sources: dict[str, ast.Module]) -> dict[str, set[str]]:
    """module -> the modules of ours that it imports."""
    found: dict[str, set[str]] = {}
    for module, tree in sources.items():
        names = {name if name in sources else name.rpartition(".")[0] for name in imports(tree)}
        found[module] = {name for name in names if name in sources} - {module}
    return found


def forbidden(sources: dict[str, ast.Module]) -> list[str]:
    """Imports that the tables do not allow, as "importer -> imported"."""
    found = []
    for module, tree in sources.items():
        package = package_of(module)
        for name in imports(tree):
            top = name.partition(".")[0]
            ours = top in ("ensemble", "export", "cli")
            allowed = package_of(name) in ALLOWED[package] | {package} if ours else package in ONLY_IN.get(top, package)
            if not allowed:
                found.append(f"{module} -> {name}")
    return sorted(set(found))


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty if there are none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(edges[module]):
            if ring := walk(other, [*path, module]):
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(edges) if (ring := walk(module, []))), [])


def too_large(root: Path) -> list[str]:
    """Modules, folders and functions past the limits."""
    found = []
    for half in ("ensemble", "export"):
        for path in sorted((root / half).rglob("*.py")):
            text = path.read_text("utf-8")
            if (lines := text.count("\n")) > MOST_LINES:
                found.append(f"{module_name(path, root)}: {lines} lines")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and not is_click_callback(node):
                    count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                    count -= bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
                    if count > MOST_PARAMETERS:
                        found.append(f"{module_name(path, root)}.{node.name}: {count} parameters")
        for folder in [root / half, *sorted(path for path in (root / half).rglob("*") if path.is_dir())]:
            most = MOST_AT_THE_TOP if folder.parent == root else MOST_MODULES
            most = MOST_IN_COMMANDS if folder.name == "commands" else most
            if (count := len([path for path in folder.glob("*.py") if path.name != "__init__.py"])) > most:
                found.append(f"{folder.relative_to(root)}: {count} modules")
    return found


def is_click_callback(node: ast.FunctionDef) -> bool:
    return any("click" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_packages_import_in_one_direction():
    sources = read_sources(ROOT)
    assert len(sources) > 100
    assert {package_of(module) for module in sources} == set(ALLOWED)
    assert forbidden(sources) == []


def test_no_modules_import_each_other_in_a_ring():
    assert circle(graph(read_sources(ROOT))) == []


def test_nothing_is_too_large_to_read():
    assert too_large(ROOT) == []


@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED)
def test_the_table_names_packages_that_exist(allowed):
    assert allowed <= set(ALLOWED)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ensemble.core.x", "from ensemble.data import sources"),
        ("ensemble.audit.x", "def f():\n    from ensemble.training import loop"),
        ("ensemble.data.x", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import export.bundle.bundle"),
        ("ensemble.evaluation.x", "from ensemble.commands import options"),
        ("ensemble.training.x", "import cli"),
        ("ensemble.training.x", "import ray"),
        ("export.runtimes.x", "from export.bundle.bundle import open_bundle"),
        ("export.inference.x", "from export import Predictor"),
        ("export.hub.x", "from ensemble.commands.options import run"),
        ("export.web.x", "from click import echo"),
    ],
)
def test_a_wrong_import_is_found_wherever_it_stands(module, source):
    assert len(forbidden({module: ast.parse(source)})) == 1


def test_allowed_imports_pass():
    good = "import ray\nfrom ensemble.training.loop import fit\nfrom ensemble.cluster import nodes"
    assert forbidden({"ensemble.cluster.x": ast.parse(good)}) == []


def test_a_ring_is_found_and_a_diamond_is_none():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def test_what_is_too_large_is_found(tmp_path):
    for half in ("ensemble", "export"):
        (tmp_path / half / "commands").mkdir(parents=True)
    (tmp_path / "ensemble/long.py").write_text("x = 1\n" * (MOST_LINES + 1))
    letters = ", ".join("abcdefghi")
    (tmp_path / "ensemble/wide.py").write_text(f"def f({letters}): pass\ndef g(self, {letters[3:]}): pass\n")
    (tmp_path / "ensemble/commands/run.py").write_text(f"@click.command('run')\ndef run({letters}): pass\n")
    for number in range(MOST_IN_COMMANDS + 1):
        (tmp_path / f"export/commands/m{number}.py").touch()
    assert too_large(tmp_path) == [
        f"ensemble.long: {MOST_LINES + 1} lines",
        "ensemble.wide.f: 9 parameters",
        f"export/commands: {MOST_IN_COMMANDS + 1} modules",
    ]
