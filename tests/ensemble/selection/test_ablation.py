import numpy as np
import pytest
from click.testing import CliRunner
from helpers import write_csv
from hub_layouts import write_checkpoint
from pictures import encoded, write_files
from small_pool import TINY, one_thread, patch, write_pool, write_test

from ensemble.commands.select import select
from ensemble.core import artifacts, metrics
from ensemble.core.bootstrap import score_intervals
from ensemble.core.errors import DataError
from ensemble.selection import ablation
from ensemble.selection import run as select_run
from ensemble.selection.ablation import compare, paired_interval, split_halves

RECIPE = """
backbone: {architecture: convnext, config: {patch_size: 4, hidden_sizes: [8, 8, 8, 8], depths: [1, 1, 1, 1]}}
image: {size: 32, geometry: native_crops}
train: {lr: 1.0e-3, epochs: 1, batch_size: 16, precision: fp32}
"""


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", TINY)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    write_test(tmp_path / "test", each=8)
    write_pool(tmp_path / "pool", each=10)
    ids = [path.stem for path in sorted((tmp_path / "test").iterdir())]
    labels = [str(number % 2) for number in range(16)]
    write_csv(tmp_path / "labels.csv", id=ids, label=labels, group=[f"g{number // 2}" for number in range(16)])
    (tmp_path / "small.yaml").write_text(RECIPE)
    with one_thread():
        yield tmp_path


@pytest.fixture
def run(embedder):
    def call(*more, count=40, labels=("--test-labels", "labels.csv"), pool="pool"):
        given = ["--test", "test", "--pool", pool, "--count", count, "--output", "out", "--ablate", "small.yaml"]
        given += [*labels, "--embedder", embedder, "--device", "cpu", *more]
        result = CliRunner().invoke(select, [str(part) for part in given])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return call


def test_halves_cut_no_group_and_are_of_a_size():
    names = np.repeat(np.arange(9), [1, 2, 3, 4, 5, 6, 7, 8, 10])
    labels = np.arange(46) % 2
    for seed in range(5):
        first = split_halves(names, labels, seed)
        assert all(len(set(first[names == name])) == 1 for name in range(9))
        assert 18 <= first.sum() <= 28
    assert len({tuple(split_halves(names, labels, seed)) for seed in range(5)}) > 1
    assert (split_halves(names, labels, 3) == split_halves(names, labels, 3)).all()


def test_a_half_without_a_class_is_refused():
    with pytest.raises(DataError, match=r"--ablate: the half .* lacks a class \(2 groups in all\)"):
        split_halves(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), 0)


def test_better_logits_show_in_the_paired_difference():
    rng = np.random.default_rng(0)
    labels, groups = np.arange(400) % 2, np.arange(400) // 4
    noise = rng.normal(size=(3, 400))
    good, bad = noise + 2 * (labels - 0.5), noise + 1 * (labels - 0.5)
    report = compare(labels, groups, good, bad)
    expected = [metrics.auroc(labels, a) - metrics.auroc(labels, b) for a, b in zip(good, bad, strict=True)]
    assert report["auroc"]["difference"]["value"] == pytest.approx(np.mean(expected))
    assert report["auroc"]["difference_by_seed"] == pytest.approx(expected)
    assert report["auroc"]["difference"]["low"] > 0
    assert report["auroc"]["selected"]["value"] == pytest.approx(np.mean([metrics.auroc(labels, a) for a in good]))
    assert report["log_loss"]["difference"]["high"] < 0
    assert ablation.verdict(report) == "Training on the selected images is better than on the random ones, by AUROC."
    swapped = compare(labels, groups, bad, good)
    assert ablation.verdict(swapped) == "Training on the random images is better than on the selected ones, by AUROC."


def test_like_logits_show_no_difference():
    rng = np.random.default_rng(0)
    labels, groups = np.arange(200) % 2, np.arange(200) // 4
    logits = rng.normal(size=(2, 2, 200)) + (labels - 0.5)
    report = compare(labels, groups, *logits)
    ends = report["auroc"]["difference"]
    assert ends["low"] < 0 < ends["high"]
    assert "No difference" in ablation.verdict(report)


def test_the_paired_interval_is_narrower_than_either_arms_own():
    rng = np.random.default_rng(1)
    labels, groups = np.arange(200) % 2, np.arange(200) // 4
    a = rng.normal(size=(1, 200)) + (labels - 0.5)
    b = a + 0.1 * rng.normal(size=(1, 200))
    arm, pair = (paired_interval("auroc", labels, a, other, groups) for other in (None, b))
    assert pair.high - pair.low < 0.5 * (arm.high - arm.low)


def test_an_arm_alone_has_the_interval_of_its_score():
    rng = np.random.default_rng(1)
    labels, groups = np.arange(60) % 2, np.arange(60) // 4
    logits = rng.normal(size=60)
    p = metrics.sigmoid(logits)
    expected = score_intervals(labels, p, groups, resamples=1000, names=("auroc",))["auroc"]
    assert paired_interval("auroc", labels, logits[None], None, groups) == expected


def test_both_arms_are_alike_but_for_the_choice(run, here, monkeypatch):
    red = patch("red", 0)  # test/red_0.png: no arm may see it, whichever half it is in
    write_files(here / "pool", "ai/copy.jpg", data=encoded(red, "JPEG", quality=90))
    calls = []

    def record(recipe, checkpoint, data, rows, files, context, log):
        calls.append((context.seed, [data.items[row] for row in rows], files))
        return np.random.default_rng(len(calls)).normal(size=len(files))

    monkeypatch.setattr(ablation, "_train_and_score", record)
    out = run("--seeds", "2", count=20)
    assert [seed for seed, _, _ in calls] == [0, 0, 1, 1]
    scored = {file.stem for _, _, files in calls for file in files}
    assert len(scored) == 8
    by_id = {
        f"{colour}_{n}": f"g{i // 2}"
        for i, (colour, n) in enumerate((c, n) for c in ("green", "red") for n in range(8))
    }
    for other in set(by_id) - scored:
        assert by_id[other] not in {by_id[name] for name in scored}
    for _, items, _ in calls:
        assert [sum(item.label == label for item in items) for label in (0, 1)] == [10, 10]
        assert len({item.id for item in items}) == 20
        assert "ai/copy.jpg" not in {item.id for item in items}
    colours = [[item.path.rpartition("/")[2].partition("_")[0] for item in items] for _, items, _ in calls]
    assert all(set(names) == {"red", "green"} for names in colours[0::2])  # selected
    assert all({"blue", "grey"} & set(names) for names in colours[1::2])  # random
    assert calls[1][1] != calls[3][1]
    assert "On 8 test images of half B in 4 groups, mean of 2 seeds" in out
    report = artifacts.read_json(here / "out" / "ablation.json", "")
    assert (report["half_a"], report["half_b"], report["ai"], report["real"]) == (8, 8, 10, 10)
    assert len(report["auroc"]["difference_by_seed"]) == 2


def test_the_ablation_trains_scores_and_is_written(run, here):
    out = run("--seeds", "1", "--set", "train.lr=1e-3")
    table = [line.split() for line in out.splitlines() if "[" in line]
    assert [line[0] for line in table] == ["selected", "random", "difference"]
    report = artifacts.read_json(here / "out" / "ablation.json", "")
    a, b, difference = (report["auroc"][name]["value"] for name in ("selected", "random", "difference"))
    assert 0 <= a <= 1
    assert difference == pytest.approx(a - b)
    assert (here / "out" / "selection.csv").is_file()
    assert report["recipe"] == "small"


def test_near_duplicates_of_the_test_join_its_groups(run, here, monkeypatch):
    for number in range(1, 8):
        write_files(here / "test", f"red_{number}.png", data=encoded(patch("red", 0).rotate(90 * (number % 2))))
    monkeypatch.setattr(ablation, "_train_and_score", lambda *arguments: np.zeros(len(arguments[4])))
    seen = []
    monkeypatch.setattr(
        ablation, "split_halves", lambda names, *rest: (seen.extend(names), split_halves(names, *rest))[1]
    )
    run("--seeds", "1", count=20)
    by_colour = [set(seen[part]) for part in (slice(0, 8), slice(8, 16))]
    assert [len(names) for names in by_colour] == [4, 1]  # green by its CSV, red all one picture


def test_labels_can_be_the_tests_own(run, here, monkeypatch):
    for number, file in enumerate(sorted((here / "test").iterdir())):
        write_files(here / "test", f"{('real', 'ai')[number % 2]}/{file.name}", data=file.read_bytes())
        file.unlink()
    monkeypatch.setattr(ablation, "_train_and_score", lambda *arguments: np.zeros(len(arguments[4])))
    assert "of half B in" in run("--seeds", "1", labels=())


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("--ablate trains on both classes", {"more": ("--balance", "1"), "count": 10}),
        ("--ablate needs a pool of known classes", {"pool": "pool/ai", "count": 10}),
        ("labels.csv has no label for 2 of 16 test images: green_0.png, green_1.png", {"cut": 2}),
        ("--ablate needs the test's labels: .* --test-labels", {"labels": ()}),
        ("--ablate needs the test's labels: no data at none.csv", {"labels": ("--test-labels", "none.csv")}),
    ],
)
def test_what_an_ablation_lacks_is_said_before_work(run, here, monkeypatch, message, arguments):
    if cut := arguments.pop("cut", 0):
        lines = (here / "labels.csv").read_text().splitlines(keepends=True)
        (here / "labels.csv").write_text("".join([lines[0], *lines[1 + cut :]]))
    monkeypatch.setattr(select_run.features, "load_embedder", None)
    with pytest.raises(DataError, match=message):
        run(*arguments.pop("more", ()), **arguments)
    assert not (here / "out").exists()


def test_a_selection_too_small_to_train_on_says_so(run):
    with pytest.raises(DataError, match=r"--ablate cannot train on 2 images: .*raise --count"):
        run("--seeds", "1", count=2)
