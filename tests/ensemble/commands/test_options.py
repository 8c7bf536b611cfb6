"""Options that several commands share."""

import pytest
from helpers import run_cli, write_image

URL = "s3://bucket/set/train"
COMMANDS = {
    "train-all": ("train-all", "--data", URL),
    "train-all images": ("train-all", "--images", URL),
    "train-all ray": ("train-all", "--engine", "ray", "--data", URL),
    "against": ("train-all", "--against", URL),
    "audit": ("audit", "data", URL),
    "canonicalise": ("canonicalise", URL, "out"),
    "select test": ("select", "--test", URL, "--pool", "pool", "--count", "1", "--output", "out"),
    "select pool": ("select", "--test", "test", "--pool", "pool", URL, "--count", "1", "--output", "out"),
    "evaluate": ("evaluate", "--data", URL),
    "export": ("export", "--certify-on", URL),
    "adapt": ("adapt", "--images", URL),
    "bench": ("bench", "--images", URL),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_images_in_a_store_are_refused_at_once_with_how_to_copy_them(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(*COMMANDS[command])
    assert (code, out) == (2, "")
    assert err == (
        f"Error: {URL}: only infer reads images from an object store; copy them to disk first, for example: "
        f"aws s3 sync {URL} train\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("S3://bucket/set/labels.csv", "for example: aws s3 sync s3://bucket/set set"),
        ("gs://bucket/set/", "for example: gcloud storage rsync --recursive gs://bucket/set set"),
        ("s3://me:SECRET@bucket/set", "leave the password or signature out of it"),
        ("hf://user/set", "hf:// names bundles and models; download images first"),
    ],
)
def test_every_store_is_refused_without_its_secrets(url, message):
    code, out, err = run_cli("evaluate", "--data", url)
    assert (code, message in err, len(err.splitlines())) == (2, True, 1)
    assert "SECRET" not in out + err


def test_a_path_may_be_a_file_url(tmp_path):
    write_image(tmp_path / "a b" / "ai" / "1.png")
    _, _, err = run_cli("evaluate", "--data", f"file://{tmp_path}/a%20b")
    assert f"{tmp_path / 'a b'}: one folder a class" in err or "both classes" in err
