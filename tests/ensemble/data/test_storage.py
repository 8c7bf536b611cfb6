"""Against a real S3 server on loopback (moto's), and against fsspec's memory where s3fs is not installed."""

import http.server
import pickle
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import exported_run, run_cli, run_python, write_csv, write_image
from object_store import KEYS, needs_s3, upload, upload_folder
from pictures import HOSTILE_NAMES
from small_ensemble import ENSEMBLE
from tar_shards import write_tar

from ensemble.core.errors import DataError, ImageError, ManyeyesError
from ensemble.data import storage
from ensemble.data.image_list import read_list
from ensemble.data.inputs import ids, names, read_inputs
from ensemble.images.decode import decode
from export.inference.infer import infer
from export.inference.predictor import Predictor

NAMES = [name for name in HOSTILE_NAMES if "\n" not in name]  # moto has no route to a line break


@pytest.fixture(params=["memory", pytest.param("s3", marks=needs_s3)])
def bucket(request, monkeypatch):
    """URL of an empty bucket."""
    storage._filesystem.cache_clear()
    url = f"{request.param}://bucket-{time.time_ns()}"
    if request.param == "s3":
        for key, value in {**KEYS, "AWS_ENDPOINT_URL": request.getfixturevalue("s3_server")[0]}.items():
            monkeypatch.setenv(key, value)
    storage.filesystem(url).mkdir(url)
    yield url
    storage._filesystem.cache_clear()


@pytest.fixture
def photos(tmp_path):
    """A folder of images with hostile names, one of them broken and one empty."""
    found = tmp_path / "photos"
    for number, name in enumerate(NAMES):
        write_image(found / f"x/{name}.png", 20 * number)
    (found / "x/broken.png").write_bytes(b"broken")
    (found / "x/empty.png").touch()
    return found


def score(*source):
    result, errors = infer(read_inputs(*source), ENSEMBLE)
    return result, errors


def test_a_folder_of_a_store_is_scored_as_a_folder(photos, bucket):
    (photos / ".hidden.png").touch()
    (photos / "x/notes.txt").touch()
    local, failed = score(photos)
    remote, errors = score(upload_folder(photos, f"{bucket}/in put"))
    pd.testing.assert_frame_equal(local, remote)
    assert list(errors["error"]) == [text.replace(str(photos), f"{bucket}/in put") for text in failed["error"]]
    assert len(errors) == 2


def test_tables_of_a_store_name_images_there(photos, bucket, tmp_path):
    upload_folder(photos, f"{bucket}/set/images")
    paths = [f"x/{name}.png" for name in NAMES]
    pd.DataFrame({"id": NAMES}).to_csv(tmp_path / "ids.csv", index=False)
    pd.DataFrame({"path": [f"images/{path}" for path in paths]}).to_parquet(tmp_path / "paths.parquet")
    pd.DataFrame({"path": paths}).to_csv(tmp_path / "local.csv", index=False)
    urls = [f"{bucket}/set/images/{path}" for path in paths]
    pd.DataFrame({"path": urls, "id": NAMES}).to_csv(tmp_path / "urls.csv", index=False)
    by_id = score(upload(tmp_path / "ids.csv", f"{bucket}/set/ids.csv"))[0]
    found = [
        score(tmp_path / "local.csv", photos)[0],
        score(upload(tmp_path / "paths.parquet", f"{bucket}/set/paths.parquet"))[0],
        score(tmp_path / "local.csv", f"{bucket}/set/images")[0],
        score(tmp_path / "urls.csv")[0],
    ]
    assert list(by_id["id"]) == list(NAMES)
    for each in found:
        np.testing.assert_array_equal(each["target"], by_id["target"])


@pytest.mark.parametrize("first", ["path", "url"])
def test_a_table_may_name_files_here_and_in_a_store(photos, bucket, tmp_path, first):
    upload_folder(photos, f"{bucket}/set")
    paths = [
        f"{bucket}/set/x/{name}.png" if number % 3 == (first == "path") else str(photos / f"x/{name}.png")
        for number, name in enumerate(NAMES)
    ]
    pd.DataFrame({"path": paths, "id": NAMES}).to_csv(tmp_path / "mixed.csv", index=False)
    pd.DataFrame({"path": [f"x/{name}.png" for name in NAMES], "id": NAMES}).to_csv(photos / "local.csv", index=False)
    found, errors = score(tmp_path / "mixed.csv")
    assert errors.empty
    pd.testing.assert_frame_equal(found, score(photos / "local.csv")[0])


def write_sets(photos, folder):
    """The photos as tars, and as Parquet files, of three images each; names as ids."""
    files = sorted(photos.rglob("*.png"))
    for number in range(0, len(files), 3):
        part = files[number : number + 3]
        write_tar(
            folder / f"tars/{number:02}.tar", {file.relative_to(photos).as_posix(): file.read_bytes() for file in part}
        )
        images = [{"bytes": f.read_bytes(), "path": f.relative_to(photos).with_suffix("").as_posix()} for f in part]
        (folder / "sets").mkdir(exist_ok=True)
        pd.DataFrame({"image": images}).to_parquet(folder / f"sets/{number:02}.parquet", row_group_size=2)


def test_the_same_images_have_the_same_scores_wherever_they_lie(photos, bucket, tmp_path):
    write_sets(photos, tmp_path)
    upload_folder(tmp_path / "tars", f"{bucket}/tars")
    upload_folder(tmp_path / "sets", f"{bucket}/sets")
    expected, failed = score(photos)
    expected["id"] = expected["id"].str.removesuffix(".png")
    for source in (
        tmp_path / "tars",
        tmp_path / "sets",
        f"{bucket}/tars",
        f"{bucket}/tars/*.tar",
        f"{bucket}/tars/{{00,03,06,09}}.tar",
        f"{bucket}/sets/",
        f"{bucket}/sets/*.parquet",
    ):
        found, errors = score(source)
        pd.testing.assert_frame_equal(found, expected)
        assert list(errors["id"]) == [key.removesuffix(".png") for key in failed["id"]]


@pytest.mark.parametrize("kind", ["photos", "tars", "sets"])
def test_a_range_of_rows_is_that_slice(photos, bucket, tmp_path, kind):
    write_sets(photos, tmp_path)
    inputs = read_inputs(upload_folder(tmp_path / kind, f"{bucket}/{kind}"), spill=tmp_path)
    expected = list(inputs.items(0, inputs.count))
    for start in range(0, 13, 2):
        for stop in range(start, 13, 3):
            assert list(inputs.items(start, stop)) == expected[start:stop]
    assert len(ids(inputs)) == len(list(names(inputs))) == len(NAMES) + 2


@pytest.mark.parametrize("kind", ["tars", "sets"])
def test_what_has_changed_since_it_was_listed_is_said_so(photos, bucket, tmp_path, kind):
    write_sets(photos, tmp_path)
    inputs = read_inputs(upload_folder(tmp_path / kind, f"{bucket}/{kind}"))
    suffix = {"tars": "tar", "sets": "parquet"}[kind]
    same_size = bytearray((tmp_path / kind / f"03.{suffix}").read_bytes())
    same_size[700] ^= 1
    storage.filesystem(bucket).pipe_file(f"{bucket}/{kind}/03.{suffix}", bytes(same_size))
    assert len(list(inputs.items(0, 3))) == 3
    with pytest.raises(DataError, match=rf"{kind}/03\.{suffix} was changed meanwhile; run the same command again"):
        list(inputs.items(0, 6))


@pytest.mark.parametrize("bucket", ["memory"], indirect=True)
def test_a_tar_that_is_refused_is_told_of_before_the_others_are_read(bucket, tmp_path, monkeypatch):
    many = write_tar(tmp_path / "many.tar", {f"{number}.json": bytes(9000) for number in range(100)})
    for number in range(8):
        upload(many, f"{bucket}/{number}.tar")
    upload(write_tar(tmp_path / "bad.tar", {"../a.png": b"a"}), f"{bucket}/0.tar")
    read_range, reads = storage.read_range, []

    def slow(*arguments):
        reads.append(arguments)
        time.sleep(0.05)
        return read_range(*arguments)

    monkeypatch.setattr(storage, "read_range", slow)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 10_000)
    with pytest.raises(DataError, match=r"0\.tar: images would be left out"):
        read_inputs(f"{bucket}/")
    assert len(reads) < 200  # of 700


def test_an_image_that_has_changed_is_said_so_and_one_that_is_gone_is_an_unreadable_row(photos, bucket):
    inputs = read_inputs(upload_folder(photos, f"{bucket}/photos"))
    first, second = ids(inputs)[:2]
    storage.filesystem(bucket).rm(f"{bucket}/photos/{first}")
    gone = next(iter(inputs.items(0, 1)))
    with pytest.raises(ImageError, match="no such file"):
        decode(gone.source, gone.path)
    for data in (b"longer" * 100, b"short", b""):
        storage.filesystem(bucket).pipe_file(f"{bucket}/photos/{second}", data)
        with pytest.raises(DataError, match="was changed meanwhile; run the same command again"):
            list(inputs.items(1, 2))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone/", "nothing lies at .*gone/; check the bucket and the path"),
        ("gone.csv", "no such file: .*gone.csv"),
        ("gone.tar", "no tar at .*gone.tar"),
        ("gone.parquet", "gone.parquet is not a readable Parquet file"),
        ("gone/*.tar", "no file matches"),
        ("texts", "holds no images"),
        ("others", r"images that cannot be read would be skipped \(1 \.heic\)"),
    ],
)
def test_what_is_not_there_is_said_so(bucket, source, message):
    for name in ("texts/a.txt", "others/a.heic", "others/a.png"):
        storage.filesystem(bucket).pipe_file(f"{bucket}/{name}", b"a")
    with pytest.raises(DataError, match=message) as raised:
        read_inputs(f"{bucket}/{source}")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["x[1].tar", "what?.tar", "a*.tar", "[1]/a.tar"])
def test_a_tar_of_a_store_whose_name_looks_like_a_pattern_is_that_file(bucket, tmp_path, name):
    upload(write_tar(tmp_path / "a.tar", {"a.png": b"a"}), f"{bucket}/t/{name}")
    upload(write_tar(tmp_path / "b.tar", {"b.png": b"b"}), f"{bucket}/t/ab.tar")
    assert ids(read_inputs(f"{bucket}/t/{name}")) == ["a"]
    if name.startswith("["):
        assert ids(read_inputs(f"{bucket}/t/[1]")) == ["a"]


def test_shards_among_images_of_a_store_are_spoken_of(bucket):
    for name in ("a.png", "x/b.tar", "c.txt"):
        storage.filesystem(bucket).pipe_file(f"{bucket}/photos/{name}", b"a")
    inputs = read_inputs(f"{bucket}/photos/")
    assert ids(inputs) == ["a.png"]
    assert inputs.note.endswith(f"'x/b.tar'. For the images inside of such files name them: '{bucket}/photos/x/*.tar'")


@pytest.mark.parametrize("key", ["a//y.png", "a/sub//deep/z.png", "/y.png"])
def test_keys_with_an_empty_part_are_not_left_out_in_silence(bucket, key):
    for name in ("a/", "a/sub/") if bucket.startswith("s3") else ():  # folders that are objects of their own
        storage.filesystem(bucket).pipe_file(f"{bucket}/{name}", b"")
    storage.filesystem(bucket).pipe_file(f"{bucket}/a/x.png", b"a")
    assert ids(read_inputs(bucket)) == ["a/x.png"]
    storage.filesystem(bucket).pipe_file(f"{bucket}/{key}", b"a")
    with pytest.raises(DataError, match=r"keys that begin with \S*// cannot be listed; rename them"):
        read_inputs(bucket)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf://user/repo", "hf:// names bundles and models; download images first: hf download --repo-type dataset"),
        ("https://example.org/a.jpg", "https://example.org/a.jpg: images are read from a path, s3:// or gs://"),
        ("https://me:SECRET@example.org/a?x=SECRET", "https://example.org/a: images are read from a path, s3://"),
        ("https://example.org/a?X-Amz-Signature=SECRET/", "https://example.org/a: images are read from a path"),
        ("HF://me:SECRET@user/repo", "HF://user/repo: hf:// names bundles"),
        ("s3://ME:SECRET@bucket/a.tar", "s3://bucket/a.tar: leave the password or signature out of it"),
        ("s3://bucket/a.tar?X-Amz-Date=1&X-Amz-Signature=SECRET", "s3://bucket/a.tar: leave the password or signature"),
        ("gs://bucket/a.tar?X-Goog-Credential=SECRET", "gs://bucket/a.tar: leave the password or signature out of it"),
    ],
)
def test_urls_that_nothing_reads_are_refused_without_their_secrets(tmp_path, text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        storage.parse_location(text)
    for source in (text, write_csv(tmp_path / "list.csv", path=[text])):
        code, out, err = run_cli("infer", "--input", source, "--output", tmp_path / "scores.csv")
        assert (code, message in err, len(err.splitlines())) == (2, True, 1)
        assert "SECRET" not in out + err


def test_what_a_user_writes_is_a_path_or_a_url():
    assert storage.parse_location("a/b:c") == Path("a/b:c")
    assert storage.parse_location("file:///a%20b/c") == Path("/a b/c")
    assert storage.parse_location("S3://Bucket/Key") == "s3://Bucket/Key"
    assert storage.parse_location("s3://bucket/what?/me@home=1/*.tar") == "s3://bucket/what?/me@home=1/*.tar"


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/a/", "s3fs"), ("gs://bucket/a.tar", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch, url, package):
    storage._filesystem.cache_clear()
    monkeypatch.delitem(
        sys.modules["fsspec.registry"]._registry, storage.parse_location(url).partition(":")[0], raising=False
    )
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ManyeyesError, match=f"{package} is not installed; run: pip install {package}"):
        read_inputs(url)


def test_nothing_but_a_url_loads_fsspec(photos):
    code = "import sys; from pathlib import Path; from ensemble.data.inputs import read_inputs;"
    for source, loaded in ((f"Path({str(photos)!r})", False), ("'memory://a'", True)):
        done = run_python(
            "-c", f"{code}\ntry: read_inputs({source})\nexcept Exception: pass\nprint('fsspec' in sys.modules)"
        )
        assert done.stdout.strip() == str(loaded), done.stderr


def requests(log, since=0):
    """(method, status) of the requests in a server's log."""
    return re.findall(r'"(GET|HEAD|PUT|POST) .*" (\d+) -', log.read_text()[since:])


@needs_s3
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_tars_are_read_in_few_requests_and_images_in_one_each(bucket, s3_server, tmp_path, monkeypatch):
    log = s3_server[1]
    for number in range(200):
        write_image(tmp_path / f"many/{number:03}.png", number)
    data = {file.name: file.read_bytes() + bytes(40_000) for file in sorted((tmp_path / "many").iterdir())}
    size = upload(write_tar(tmp_path / "s.tar", data), f"{bucket}/s.tar") and (tmp_path / "s.tar").stat().st_size
    upload_folder(tmp_path / "many", f"{bucket}/many")
    frame = pd.DataFrame({"id": list(data), "image": list(data.values())})
    frame.to_parquet(tmp_path / "s.parquet", compression=None, row_group_size=50)
    upload(tmp_path / "s.parquet", f"{bucket}/s.parquet")
    few = size // storage.BLOCK_BYTES + 4
    read_range, sizes = storage.read_range, []

    def counted(*arguments):
        data = read_range(*arguments)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(storage, "read_range", counted)

    for name, most, ten in (("s.tar", few, 2), ("s.parquet", 3 * few, 8), ("many", 200, 10)):
        inputs = read_inputs(f"{bucket}/{name}")
        before = len(log.read_text())
        sizes.clear()
        assert len(list(inputs.items(0, 200))) == 200
        assert sum(sizes) < 1.1 * size + storage.BLOCK_BYTES
        asked = requests(log, before)
        assert sum(method == "GET" for method, _ in asked) <= most
        assert {status for _, status in asked} <= {"200", "206"}
        before = len(log.read_text())
        assert len(list(inputs.items(150, 160))) == 10
        assert len(requests(log, before)) <= ten


@needs_s3
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_readers_read_in_another_process(photos, bucket, tmp_path):
    write_sets(photos, tmp_path)
    inputs = [read_inputs(upload_folder(tmp_path / kind, f"{bucket}/{kind}")) for kind in ("photos", "tars", "sets")]
    pickled = tmp_path / "inputs"
    # rows in memory are no file: what another machine is sent is the reader, with its rows
    pickled.write_bytes(pickle.dumps([(each.loader, list(read_list(each.rows, 2, 7))) for each in inputs]))
    code = "import pickle, sys; print([[i.id for i in f(r, 2, 7)] for f, r in pickle.load(open(sys.argv[1], 'rb'))])"
    done = run_python("-c", code, pickled)
    assert done.stdout.strip() == str([ids(each)[2:7] for each in inputs]), done.stderr


FAULTS = {
    "no bucket": ({}, "s3://no-such-bucket-at-all/a/", "nothing lies at"),
    "no server": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://bucket/a/", "cannot be reached; check the network"),
    "no name": ({"AWS_ENDPOINT_URL": "http://no-such-host.invalid"}, "s3://bucket/a.tar", "cannot be reached"),
    "no credentials": (
        dict.fromkeys(KEYS, "") | {"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nowhere"},
        "s3://bucket/a.csv",
        "no credentials were found",
    ),
}


@needs_s3
@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_at_a_store_is_one_line_and_soon(s3_server, monkeypatch, fault):
    changes, url, message = FAULTS[fault]
    storage._filesystem.cache_clear()
    for key, value in {**KEYS, "AWS_ENDPOINT_URL": s3_server[0], **changes}.items():
        monkeypatch.setenv(key, value) if value else monkeypatch.delenv(key, raising=False)
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as raised:
        read_inputs(url)
    assert len(str(raised.value).splitlines()) == 1
    assert time.monotonic() - began < 60
    storage._filesystem.cache_clear()


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with `code` and `error`, after a while."""

    code, error, wait = 403, ("AccessDenied", "Access Denied"), 0.0

    def do_GET(self):
        time.sleep(self.wait)
        body = "<Error><Code>{}</Code><Message>{}</Message></Error>".format(*self.error).encode()
        with suppress(OSError):  # nobody waits for it any more
            self.send_response(self.code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *arguments):
        """Say nothing."""


ANSWERS = {
    "no right": (
        403,
        ("AccessDenied", "Access Denied"),
        0,
        r"no right to read it \(.*\); check credentials",
    ),
    "wrong region": (400, ("AuthorizationHeaderMalformed", "expecting 'eu-west-1'"), 0, "check its name and region"),
    "silence": (200, ("", ""), 0.5, "cannot be reached; check the network"),
}


@needs_s3
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("url", ["s3://bucket/folder/", "s3://bucket/a.tar"])
def test_what_a_store_refuses_is_one_line(monkeypatch, answer, url):
    code, error, wait, message = ANSWERS[answer]
    handler = type("Handler", (_Refusing,), {"code": code, "error": error, "wait": wait})
    quick = {"connect_timeout": 1, "read_timeout": 0.2, "retries": {"total_max_attempts": 1}}
    if wait:
        monkeypatch.setitem(storage.OPTIONS, "s3", {"config_kwargs": quick})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        for key, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{serving.server_port}"}.items():
            monkeypatch.setenv(key, value)
        storage._filesystem.cache_clear()
        with pytest.raises(DataError, match=message) as raised:
            read_inputs(url)
        serving.shutdown()
    assert len(str(raised.value).splitlines()) == 1
    assert not any(value in str(raised.value) for value in KEYS.values() if value == "testing")
    storage._filesystem.cache_clear()


def test_addresses_in_errors_of_a_store_have_no_secrets():
    with (
        pytest.raises(DataError, match="no answer of http://host/key; check"),
        storage.translate_errors("gs://bucket/key"),
    ):
        raise ValueError("no answer of http://me:SECRET@host/key?X-Goog-Signature=SECRET")


def test_no_right_to_read_is_one_line(monkeypatch, bucket):
    def refuse(*arguments, **options):
        raise PermissionError("Forbidden")

    storage.filesystem(bucket).pipe_file(f"{bucket}/a/b.png", b"a")
    monkeypatch.setattr(storage.filesystem(bucket), "ls", refuse)
    with pytest.raises(DataError, match=r"a: no right to read it \(Forbidden\); check credentials"):
        read_inputs(f"{bucket}/a")


@needs_s3
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_infer_reads_tars_of_a_store(photos, bucket, tmp_path):
    write_sets(photos, tmp_path)
    upload_folder(tmp_path / "tars", f"{bucket}/tars")
    run = exported_run(tmp_path / "run")
    outputs = []
    for source in (tmp_path / "tars", f"{bucket}/tars/*.tar"):
        outputs.append(tmp_path / f"{len(outputs)}.csv")
        code, _, err = run_cli("infer", "--onnx", "--run", run, "--input", source, "--output", outputs[-1])
        assert code == 1, err  # two images cannot be read
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_a_predictor_takes_images_of_a_store(photos, bucket, tmp_path):
    predictor = Predictor.load(exported_run(tmp_path / "run") / "bundle")
    frame = pd.DataFrame({"id": NAMES})
    found = predictor.predict(frame, images=upload_folder(photos, f"{bucket}/photos"))
    pd.testing.assert_frame_equal(found, predictor.predict(frame, images=photos))
    assert found["target"].notna().all()
