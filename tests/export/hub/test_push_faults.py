"""What goes wrong on the Hub is one line that says what to run; the real client, a loopback Hub with faults."""

import io
import logging
import re
import shutil

import pytest
from helpers import exported_run, run_cli
from hub_api import READER, TOKEN
from hub_client import client
from hub_state import Fault

from ensemble.core.errors import HubError
from ensemble.core.hub_download import explain_error, hub_errors, redacted_line
from export.bundle import hub_bundles as hub_names

WRONG = "hf_aTokenThatNobodyKnows"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def run(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "run")


def one_line(said):
    assert re.fullmatch(r"Error: [^\n]*\n", said)
    return said


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault("POST /api/repos/create", 401, message=f"Invalid token {TOKEN}"),
            "not accept your token; run: hf auth login",
        ),
        (Fault("POST /api/repos/create", 403), "your token has no right to do this; .* run: hf auth login"),
        (Fault("POST /api/repos/create", 500), r"the Hub is in trouble \(it answers 500\); run the same command again"),
        (
            Fault("POST .*/commit/", 500),
            r"in trouble \(it answers 500\); run the same command again, what is done is kept",
        ),
        (Fault("POST .*/commit/", 412), "it was changed meanwhile; run the same command again"),
        (Fault("POST .*/preupload/", 403, message=f"{TOKEN} may not"), "your token has no right to do this"),
        (Fault("GET .*/tree/", 404, headers={"X-Error-Code": "RepoNotFound"}), "no such repository, or it is private"),
        (Fault("POST /api/repos/create", 429, 9, {"Retry-After": "600"}), "asks to wait 600 seconds; then run"),
        (Fault("POST /api/repos/create", 418, message=f"no coffee for {TOKEN}"), "the Hub refused"),
        (Fault("POST /api/repos/create"), "the Hub cannot be reached"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", f"{value.pattern}{value.status}") if isinstance(value, Fault) else "",
)
def test_a_push_that_is_refused(fault, message, hub, call, run, repo):
    if not fault.status:  # cut off before an answer
        fault.pattern, fault.status = "POST /api/repos/create", -1
    hub.faults.append(fault)
    assert re.search(f"^Error: {repo}: .*{message}", one_line(call("push", repo, "--run", run, code=2)))
    hub.faults.clear()
    call("push", repo, "--run", run)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST /api/repos/create", 429, 1, {"Retry-After": "1"}),
        Fault("POST .*/commit/", 429, 1),
        Fault("GET .*/revision/|GET /api/models/me/r[0-9]+$", 429, 2),
        Fault("PUT /lfs/", 500),
        Fault("POST .*/objects/batch", 429, 1, {"Retry-After": "0"}),
    ],
    ids=lambda fault: re.sub(r"\W+", "-", f"{fault.pattern}{fault.status}"),
)
def test_what_passes_is_waited_for(fault, hub, call, run, repo, tmp_path):
    (run / "bundle" / "heldout.parquet").write_bytes(tmp_path.name.encode())  # a large file that the Hub has not seen
    from export.bundle import bundle

    bundle.write_bundle(run / "bundle", bundle.read_contents(run / "bundle")["members"])
    hub.faults.append(fault)
    call("push", repo, "--run", run)
    assert fault.times == 0
    assert len(hub.repos[repo].messages) == 1
    call("pull", repo, tmp_path / "pulled")


def test_of_the_clients_log_only_waits_are_shown():
    handler, shown = logging.StreamHandler(), io.StringIO()
    handler.setStream(shown)
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    try:
        with hub_errors("me/x"):
            logging.getLogger("huggingface_hub.utils._http").warning("HTTP Error 500 thrown, PUT https://x?signature=y")
            logging.getLogger("huggingface_hub.utils._http").warning("Rate limited. Waiting 31.0s before retry")
        logging.getLogger("huggingface_hub.utils._http").warning("as before")
    finally:
        logger.removeHandler(handler)
    assert shown.getvalue() == "Rate limited. Waiting 31.0s before retry\nas before\n"


def test_who_may_not_push_is_told_so(hub, call, run, repo):
    assert "you are not logged in; run: hf auth login" in one_line(call("push", repo, "--run", run, code=2, token=""))
    assert hub.seen == []
    assert "does not accept your token" in one_line(call("push", repo, "--run", run, code=2, token=WRONG))
    call("push", repo, "--run", run)
    changed = ("push", repo, "--run", run, "--license", "mit")
    assert "no right to do this" in one_line(call(*changed, code=2, token=READER))
    assert "no right to do this" in one_line(call("push", "others/x", "--run", run, code=2))
    assert "license" in one_line(call("push", repo, "--run", run, "--license", "forbidden", code=2))


@pytest.mark.parametrize("command", [["pull"], ["infer", "--model"], ["infer", "--bundle"], ["evaluate", "--model"]])
def test_what_is_not_there_or_not_open(command, hub, call, run, repo, tmp_path, tiles):
    hub.add("me/gated", {"bundle.json": b"{}"}, gated=True)
    call("push", repo, "--run", run)
    more = {
        "pull": [tmp_path / "pulled"],
        "infer": ["--input", tiles, "--output", tmp_path / "scores.csv"],
        "evaluate": ["--data", tiles, "--grid", "none", "--output", tmp_path / "evaluated"],
    }[command[0]]
    for name, message in [
        ("me/none", "me/none: no such repository, or it is private: check the name, or run: hf auth login"),
        (
            "me/gated",
            "me/gated: its owner grants access on request: accept its terms on the Hub, then run: hf auth login",
        ),
        (f"{repo}@none", f"{repo}: it has no such revision"),
        ("only-one", "is no name on the Hub; write USER/REPO"),
        ("me/x@../..", "is no name on the Hub; write USER/REPO"),
    ]:
        source = name if command == ["pull"] else f"hf://{name}"
        assert message in one_line(call(*command, source, *more, code=2))


def test_without_a_network_the_cache_serves_and_pull_says_what_is_wrong(
    hub, hub_child, call, run, repo, tmp_path, tiles
):
    call("push", repo, "--run", run)
    scored = ("--input", tiles, "--output", tmp_path / "scores.csv")
    call("infer", "--bundle", f"hf://{repo}", *scored)
    with client("http://127.0.0.1:9", hub_child.home) as offline:
        assert offline("infer", "--bundle", f"hf://{repo}", *scored)[0] == 0
        for command in (["pull", repo], ["push", repo, "--run", run], ["infer", "--bundle", "hf://me/none", *scored]):
            code, _, err = offline(*command)
            assert code == 2
            assert "the Hub cannot be reached" in one_line(err)


def test_wrong_use_is_told_before_the_hub_is_asked(run, tmp_path):
    for arguments, message in [
        (["push", "me/x", "--bundle", run / "bundle", "--run", run], "give either --bundle or --run, not both"),
        (["push", "me/x", "--bundle", run / "bundle", "--members"], "--members are those of a run"),
        (["push", "me/x@v1", "--run", run], "name the branch with --revision v1"),
        (["push", "../x", "--run", run], "is no name on the Hub"),
        (["pull", "me/x@v1", "--revision", "v2"], "the revision is given twice"),
        (["infer", "--bundle", "hf://me/x", "--model", "hf://me/x"], "exclude each other"),
        (["infer", "--model", "hf://me/x", "--onnx"], "leave out --onnx"),
        (["infer", "--model", "hf://me/x", "--run", run], "give either --model or --run, not both"),
        (["infer", "--positive", "fake"], "--positive names a class of --model"),
    ]:
        code, _, err = run_cli(*arguments)
        assert code == 2
        assert message in err


@pytest.mark.parametrize(
    "arguments", [["infer", "--bundle"], ["infer", "--model"], ["export", "--bundle", "made", "--member"]]
)
def test_a_home_that_nobody_has_is_no_folder(arguments, tiles):
    source = ("a=" if "--member" in arguments else "") + "~nosuchuser/x"
    code, _, err = run_cli(*arguments, source, *(["--input", tiles] if "infer" in arguments else []))
    assert code == 2
    assert re.search(r"^Error: ~nosuchuser/x is (not|neither) a folder", one_line(err))


@pytest.mark.parametrize(
    "name", ["a/b/c", "a", "a/b@", "a/..", "a/b@../c", "hf://a/b@x/../y", "é/b", "a b/c", "a/b\n", ""]
)
def test_what_cannot_be_a_name_on_the_hub(name):
    with pytest.raises(HubError, match="write USER/REPO"):
        hub_names.parse(name)


@pytest.mark.parametrize("name", ["a/b", "hf://a-b.c/d_e@refs/pr/1", "a/b@v1.0", "a/b@" + "c" * 40])
def test_what_can_be_one(name):
    repo, revision = hub_names.parse(name)
    assert f"{repo}@{revision}" == name.removeprefix("hf://") or revision is None


def test_an_error_of_our_own_is_no_fault_of_the_hub():
    assert explain_error(RuntimeError("a mistake")) is None
    assert explain_error(KeyError("a mistake")) is None
    assert explain_error(PermissionError(13, "Permission denied", "/cache/x")) == "/cache/x: Permission denied"
    assert explain_error(OSError(28, "No space left on device")).startswith("the disk is full; make room")
    assert redacted_line(ValueError(f"\n\n token {TOKEN} is bad\nmore")) == "token hf_... is bad"
