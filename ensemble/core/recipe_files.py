"""Recipe files: YAML -> checked recipes, with the problems of all files in one error."""

import difflib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ensemble.core.errors import RecipeError, error_line, join_limited
from ensemble.core.names import RESERVED, is_member_name
from ensemble.core.recipe import Recipe, Section


def load_recipes(paths: Sequence[Path], overrides: Sequence[str] = (), seen_in: str = "recipes") -> list[Recipe]:
    """Read and check recipe files, each with `overrides` ("train.lr=1e-5") applied.

    All problems of all files come in one RecipeError.
    """
    if not paths:
        raise RecipeError(f"no recipe (*.yaml) in {seen_in}; name a folder or file that holds one")
    changes, problems = _parse_overrides(overrides)
    recipes = []
    found: dict[str, list[Path]] = {}  # a wrong --set is the same problem in every file
    for path in paths:
        try:
            values = _read_yaml(path)
            for keys, value in changes:
                _set(values, keys, value)
            recipes.append(_build(path.stem, values))
        except (RecipeError, OSError) as error:
            for line in str(error).splitlines():
                found.setdefault(line, []).append(path)
    problems += [f"{join_limited(files, 1)}: {line}" for line, files in found.items()]
    names = [recipe.name for recipe in recipes]
    problems += [f"two recipes are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipes


def find_recipes(folder: Path) -> list[Path]:
    """Every YAML file directly in `folder`, by name; a file stands for itself."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise RecipeError(f"no recipe at {folder}; name a YAML file, or a folder of them such as {recipes_folder()}")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in {".yaml", ".yml"} and p.is_file())


def recipes_folder() -> Path:
    """The recipes that come with manyeyes: of this checkout, or inside the installed package."""
    here = Path(__file__).resolve().parent.parent
    return next((p for p in (here.parent / "recipes", here / "recipes") if p.is_dir()), here / "recipes")


def _build(name: str, values: dict[str, Any]) -> Recipe:
    if not is_member_name(name):
        raise RecipeError(
            f"the file name {name!r} becomes the member's name: use letters, digits, - and _, "
            f"and none of {', '.join(sorted(RESERVED))}"
        )
    if "name" in values:
        raise RecipeError("name: the file's own name is the member's name; remove this key")
    try:
        return Recipe.model_validate({"name": name, **values})
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(e) for e in error.errors())) from None


def _explain(error: Mapping[str, Any]) -> str:
    """One pydantic error as 'train.lr: what is wrong', with the nearest valid key for a typo."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    return f"{where}: {message}" + ("" if isinstance(given, Mapping | Section) else f" (got {given!r})")


def _valid_keys(location: Sequence[Any]) -> list[str]:
    section: Any = Recipe
    for part in location:
        section = section.model_fields[part].annotation
    return [name for name in section.model_fields if name != "name"]


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # the loader above is yaml.SafeLoader with one check more
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506
    except FileNotFoundError:
        raise RecipeError("no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid YAML: {error_line(error)}") from None
    if not isinstance(values, dict):
        raise RecipeError("a recipe is a mapping with the keys backbone, image, adapt, augment, train")
    return values


def _parse_overrides(overrides: Sequence[str]) -> tuple[list[tuple[list[str], Any]], list[str]]:
    changes, problems = [], []
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {text}: write it as key=value, for example train.lr=1e-5")
            continue
        try:
            changes.append((key.strip().split("."), yaml.safe_load(raw)))
        except yaml.YAMLError as error:
            problems.append(f"--set {text}: {error_line(error)}")
    return changes, problems


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {'.'.join(keys)}: {key} is not a section")
        values = inner
    values[keys[-1]] = value
