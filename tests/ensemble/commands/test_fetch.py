"""The command, in a process of its own; data sets of rows are read by the real `datasets`."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_server import Hub, serve
from fetch_cases import MIDJOURNEY, REPO, images, picture, start, tar_gz
from helpers import read_csv, run_cli
from pictures import encoded, noise

pytest.importorskip("datasets")
ROWS, FOLDER, ACTION = "hf://datasets/org/rows", "hf://datasets/org/folder", "Bingsu/Human_Action_Recognition"

CLASSES = "--label-column label --classes fake=ai,human=real"


def parquet(count, names, labels="label", outside=()):
    """Half of the rows each class, in this order; every second one a JPEG with a name."""
    rows = [
        {"bytes": encoded(noise(i), "JPEG"), "path": f"x/{i}.jpg"} if i % 2 else {"bytes": picture(i), "path": None}
        for i in range(count)
    ]
    rows += [{"bytes": None, "path": path} for path in outside]
    codes = [min(i * len(names) // count, len(names) - 1) for i in range(len(rows))]
    columns = {
        "image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        labels: pa.array(codes, pa.int64()),
    }
    features = {"image": {"_type": "Image"}, labels: {"names": names, "_type": "ClassLabel"}}
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(meta), buffer, row_group_size=10)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Every command below, one after the other in one process: (folder, exit codes, output, errors, server)."""
    folder = tmp_path_factory.mktemp("fetch")
    secret = folder / "secret.png"
    secret.write_bytes(picture(99))
    hub = Hub()
    hub.repos["org/rows"] = {"data/train-0.parquet": parquet(40, ["Fake", "Human"], outside=[str(secret)])}
    hub.repos["org/folder"] = {f"train/{c}/{i}.png": picture(i) for c in ("fake", "real") for i in range(3)}
    hub.repos[ACTION] = {"data/train-0.parquet": parquet(20, ["calling", "texting"], "labels")}
    hub.repos[REPO] = {MIDJOURNEY: tar_gz(images(9) | {"../up.png": picture(1), "z.png": picture(2)})}
    hub.gated.add("org/gated")
    lines = [
        f"fetch {ROWS} {CLASSES} --generator gan --limit 6 --output {{0}}/rows",
        f"fetch {ROWS} {CLASSES} --generator gan --limit 10 --output {{0}}/rows",
        f"fetch {ROWS} --label-column label --limit 0 --output {{0}}/all",
        f"fetch {FOLDER} --label-column label --limit 5 --output {{0}}/folder",
        "fetch human-action --limit 4 --output {0}/action",
        "fetch human-action --limit 7 --output {0}/action",
        "fetch midjourney-v5 --output {0}/mj",
        f"fetch {ROWS} --class real --image-column picture --output {{0}}/bad",
        f"fetch {ROWS} --label-column label --classes cat=real,dog=ai --output {{0}}/bad",
        f"fetch {ROWS} --class real --split test --output {{0}}/bad",
        "fetch hf://datasets/org/gated --class real --output {0}/bad",
        "fetch hf://datasets/org/nothing --class real --output {0}/bad",
    ]
    with serve(hub):
        process = start(hub, *(line.format(folder) for line in lines), home=folder / "home")
        out, errors = process.communicate(timeout=120)
    return folder, json.loads(errors.splitlines()[-1]), out, errors.splitlines()[:-1], hub


def rows_of(ran, name):
    return read_csv(ran[0] / name / "data.csv")


def test_every_command_ends_as_it_should(ran):
    assert ran[1] == [0, 0, 1, 0, 0, 0, 1, 2, 2, 2, 2, 2], ran[3]


def test_rows_of_a_hub_data_set_keep_their_bytes_and_formats(ran):
    rows = rows_of(ran, "rows")
    assert (rows["label"] == "1").sum() == (rows["label"] == "0").sum() == 5
    ai = rows[rows["label"] == "1"]
    assert list(ai["original"]) == [f"train/{i:08}" + (f"/{i}.jpg" if i % 2 else "") for i in range(5)], (
        "three by the first fetch, two by the larger limit"
    )
    for i, row in enumerate(ai.itertuples()):
        data = (ran[0] / "rows" / row.path).read_bytes()
        assert data == (encoded(noise(i), "JPEG") if i % 2 else picture(i))
        assert row.path.endswith(".jpg" if i % 2 else ".png")
    assert set(ai["generator"]) == {"gan"}
    assert set(rows[rows["label"] == "0"]["generator"]) == {""}
    assert set(rows["source"]) == {"org/rows"}


def test_label_names_are_understood_without_being_told(ran):
    assert list(rows_of(ran, "all")["label"].value_counts()) == [20, 20]


def test_a_row_that_points_at_a_file_of_this_machine_is_refused(ran):
    assert any("refused 1 that lie outside the data set" in line and "secret.png" in line for line in ran[3])
    assert not any(path.read_bytes() == picture(99) for path in (ran[0] / "all").rglob("*.png"))


def test_a_folder_of_images_on_the_hub_is_a_data_set_too(ran):
    rows = rows_of(ran, "folder")
    assert list(rows["label"]) == ["1", "1", "1", "0", "0"]
    assert [(ran[0] / "folder" / path).read_bytes() for path in rows["path"]] == [picture(i) for i in (0, 1, 2, 0, 1)]
    assert not any("train/real/2.png" in line for line in ran[4].asked("GET /datasets")), "only what is wanted"


def test_a_parquet_source_of_the_catalogue_goes_on(ran):
    rows = rows_of(ran, "action")
    assert list(rows["original"]) == [f"train/{i:08}" + (f"/{i}.jpg" if i % 2 else "") for i in range(7)]
    assert set(rows["label"]) == {"0"}


def test_it_says_what_came_and_how_to_use_it(ran):
    folder, _, out, errors, _ = ran
    assert f"midjourney-v5: 10 images (10 ai) in {folder}/mj; 10 new, 0.0 MB downloaded." in out
    assert "The source has no more images (--limit was 5,000)." in out
    assert "Licence: Apache-2.0 by its card; its authors ask for written permission" in out
    assert "Licence: cc0-1.0; read https://huggingface.co/datasets/org/rows before you pass images on." in out
    assert f"Use them: python cli.py train-all recipes/ --data {folder}/rows/data.csv\n" in out
    assert f"--data {folder}/mj/data.csv --data FOLDER_OR_CSV_OF_THE_OTHER_CLASS" in out
    assert "Error: refused 1 with '..' in the path: '../up.png'" in errors


def test_what_is_wrong_is_said_in_one_line(ran):
    errors = [line for line in ran[3] if line.startswith("Error: ") and "refused" not in line]
    assert errors[0].startswith("Error: org/rows has no column 'picture'; it has image, label: name them with")
    assert errors[1].startswith(
        "Error: org/rows: the column label holds 'Fake', 'Human'; say what they are, for example"
    )
    assert errors[2].startswith("Error: org/rows: Bad split: test")
    assert errors[3].startswith("Error: org/gated: access is granted on request: accept its terms at https://")
    assert errors[4].startswith("Error: org/nothing: no such repository, or it is private")
    assert len(errors) == len(ran[3]) - 2 == 5, ran[3]
    assert not (ran[0] / "bad").exists()


@pytest.mark.parametrize("arguments", [(), ("--list",)])
def test_the_catalogue_is_printed(arguments):
    code, out, _ = run_cli("fetch", *arguments)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("midjourney-v5"))
    assert line.split()[1:6] == ["ai", "midjourney-v5", "5,449", "1.2", "GB"]
    assert "Not verified:" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fetch midjourny", "the catalogue has no source 'midjourny'; did you mean midjourney-v5?"),
        ("fetch sd15 --class real", "--class is for hf://datasets/OWNER/NAME; the catalogue knows it for sd15"),
        ("fetch sd15 --image-column x", "--image-column is for hf://"),
        ("fetch hf://datasets/a/b", "say what the images are"),
        ("fetch hf:a/b --class ai", "is no Hub data set; write hf://datasets/OWNER/NAME"),
        ("fetch sd15 --limit -1", "-1 is not in the range x>=0"),
    ],
)
def test_wrong_use_costs_one_line_and_no_request(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(*line.split())
    assert (code, out) == (2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []
