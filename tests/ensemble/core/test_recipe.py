import pytest
from pydantic import ValidationError

from ensemble.core.errors import RecipeError
from ensemble.core.recipe import Recipe, find_recipes, load_recipes, recipes_folder

RECIPE = """
backbone:
  architecture: swin
train:
  lr: 1.0e-3
  epochs: 2
  batch_size: 4
"""
LISTED = {
    "timm/vit_base_patch16_clip_384.laion2b_ft_in1k",
    "microsoft/swin-tiny-patch4-window7-224",
    "microsoft/swin-base-patch4-window7-224-in22k",
    "microsoft/swinv2-tiny-patch4-window8-256",
    "facebook/convnext-large-384-22k-1k",
}


@pytest.fixture
def load(tmp_path):
    def load(text: str = RECIPE, *overrides: str, name: str = "member.yaml") -> Recipe:
        (tmp_path / name).write_text(text, encoding="utf-8")
        [recipe] = load_recipes([tmp_path / name], overrides)
        return recipe

    return load


def problems(load, *arguments, **options) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(*arguments, **options)
    return str(caught.value).splitlines()


def test_recipes_are_the_five_listed_checkpoints():
    recipes = load_recipes(find_recipes(recipes_folder()))
    assert len(recipes) == 5
    assert {recipe.backbone.checkpoint for recipe in recipes} == LISTED


def test_every_quick_recipe_loads():
    paths = find_recipes(recipes_folder() / "quick")
    recipes = load_recipes(paths)
    assert [recipe.name for recipe in recipes] == [path.stem for path in paths]
    assert len(recipes) >= 7
    assert all(recipe.backbone.architecture for recipe in recipes)


def test_every_other_recipe_loads():
    recipes = load_recipes(find_recipes(recipes_folder() / "more"))
    assert {recipe.name for recipe in recipes} >= {"dinov2_small", "dinov3_small", "siglip_base"}
    assert {recipe.adapt.mode for recipe in recipes} == {"probe", "lora"}


def test_values_and_defaults(load):
    recipe = load()
    assert (recipe.name, recipe.backbone.architecture, recipe.train.lr) == ("member", "swin", 1e-3)
    assert (recipe.train.accumulate, recipe.augment.flip, recipe.image.size) == (1, True, None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 2", "epochs: 2\n  epoch: 3", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("train:", "augmnt: {}\ntrain:", "augmnt: unknown key; did you mean 'augment'?"),
        ("train:", "image: {zzz: 1}\ntrain:", "image.zzz: unknown key; valid keys: size, geometry, filter, crop_pct"),
        ("train:", "1: 2\ntrain:", "1: Keys should be strings"),
        ("1.0e-3", "-1.0e-3", "train.lr: Input should be greater than 0 (got -0.001)"),
        ("1.0e-3", "high", "train.lr: Input should be a valid number"),
        ("  epochs: 2\n", "", "train.epochs: missing"),
        ("architecture: swin", "architecture: swin\n  checkpoint: a/b", "give either checkpoint or architecture"),
        ("architecture: swin", "drop_path: 0.1", "give either checkpoint or architecture"),
        ("architecture: swin", "checkpoint: a/b\n  weights: w.pth", "config and weights belong to an architecture"),
        ("train:", "image: {count: 3}\ntrain:", "image: count must be one of 1, 4, 5, 9, 16"),
        ("train:", "augment: {jpeg: [90, 30]}\ntrain:", "jpeg must be [lowest, highest] within 1..100"),
        ("train:", "name: other\ntrain:", "the file's own name is the member's name"),
        ("train:", "backbone: {architecture: vit}\ntrain:", "the key 'backbone' is given twice"),
        ("epochs: 2", "epochs: 2\n  epochs: 3", "the key 'epochs' is given twice"),
        ("epochs: 2", "epochs: [2", "not valid YAML"),
    ],
)
def test_a_mistake_is_named(load, tmp_path, old, new, message):
    assert old in RECIPE
    [line] = problems(load, RECIPE.replace(old, new))
    assert line.startswith(f"{tmp_path / 'member.yaml'}: ")
    assert message in line


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "text"])
def test_what_is_not_a_mapping_is_refused(load, text):
    [line] = problems(load, text)
    assert "a recipe is a mapping with the keys backbone, image, adapt, augment, train" in line


def test_all_problems_of_all_files_come_together(tmp_path):
    texts = {"a": RECIPE, "b": RECIPE.replace("lr: 1.0e-3", "lr: 7\n  wormup: 0"), "c": "1", "d": RECIPE}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipes([*find_recipes(tmp_path), tmp_path / "e.yaml"], ["x"])
    lines = str(caught.value).splitlines()
    starts = ["--set x: ", *(f"{tmp_path / name}.yaml: " for name in "bbce")]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert "train.wormup: unknown key; did you mean 'warmup'?" in lines[2]
    assert lines[-1].endswith("no such file")


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.lr=1e-5", "train", "lr", 1e-5),  # text to YAML, which wants 1.0e-5
        ("train.lr = 0.5", "train", "lr", 0.5),
        ("train.epochs=9", "train", "epochs", 9),
        ("augment.jpeg=[30, 90]", "augment", "jpeg", (30, 90)),
        ("augment.flip=false", "augment", "flip", False),
        ("backbone.config={depths: [1, 1]}", "backbone", "config", {"depths": [1, 1]}),
    ],
)
def test_set_overrides_a_value(load, override, section, key, value):
    before, after = load(), load(RECIPE, override)
    assert getattr(getattr(after, section), key) == value
    assert getattr(getattr(before, section), key) != value
    assert after.sha256 != before.sha256


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "train.lrr: unknown key; did you mean 'lr'?"),
        ("trian.lr=1", "trian: unknown key; did you mean 'train'?"),
        ("train.lr", "--set train.lr: write it as key=value, for example train.lr=1e-5"),
        ("=3", "--set =3: write it as key=value"),
        ("train.lr.x=1", "--set train.lr.x: lr is not a section"),
        ("train.lr=-1", "train.lr: Input should be greater than 0"),
        ("augment.jpeg=[1", "--set augment.jpeg=[1: while parsing"),
        ("name=other", "the file's own name is the member's name"),
    ],
)
def test_a_wrong_override_is_named(load, override, message):
    [line] = problems(load, RECIPE, override)
    assert message in line


def test_a_recipe_cannot_be_changed(load):
    recipe = load()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.lr = 0.5
    assert recipe.train.lr == 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "# a comment\n" + RECIPE,
        RECIPE.replace("1.0e-3", "0.001"),
        RECIPE.replace("train:", "augment: {flip: true}\ntrain:"),
        "train: {batch_size: 4, epochs: 2, lr: 1e-3}\nbackbone: {architecture: swin}\n",
    ],
)
def test_the_hash_is_of_the_resolved_values(load, text):
    assert load(text, name="other.yaml").sha256 == load().sha256


@pytest.mark.parametrize("name", ["mean.yaml", "target.yaml", "a b.yaml", "-x.yaml", "é.yaml", "a.b.yaml", ".yaml"])
def test_file_names_that_cannot_name_a_member_are_refused(load, name):
    [line] = problems(load, name=name)
    assert "becomes the member's name: use letters, digits, - and _" in line


def test_two_files_cannot_name_one_member(tmp_path):
    for name in ("a.yaml", "a.yml"):
        (tmp_path / name).write_text(RECIPE)
    with pytest.raises(RecipeError, match="two recipes are named 'a'"):
        load_recipes(find_recipes(tmp_path))


def test_find_recipes_takes_yaml_files_directly_in_the_folder(tmp_path):
    for name in ("b.yaml", "a.YML", "note.txt", "inner/c.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(RECIPE)
    assert [path.name for path in find_recipes(tmp_path)] == ["a.YML", "b.yaml"]
    assert find_recipes(tmp_path / "b.yaml") == [tmp_path / "b.yaml"]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipes(find_recipes(tmp_path), seen_in=str(tmp_path))
    assert str(caught.value).startswith(f"no recipe (*.yaml) in {tmp_path};")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(RecipeError) as caught:
        find_recipes(tmp_path / "missing")
    assert str(caught.value).startswith(f"no recipe at {tmp_path / 'missing'};")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not valid YAML: 'utf-8' codec"):
        load_recipes([tmp_path / "a.yaml"])
