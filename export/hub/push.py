"""A bundle, its members and its card -> a repository on the Hub, in one commit. No torch.

Large files go ahead of the commit, one after the other, so that a push that was stopped and is repeated sends only
those that are not there yet.
"""

import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, HubError, join_limited
from ensemble.core.hub_download import NO_SUCH_LOGIN, download, hub_errors, patiently, redacted_line
from ensemble.core.log import Log
from ensemble.core.names import LABELS, is_member_name
from ensemble.models import members
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle
from export.hub.model_card import Base, merged

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

Files = Mapping[str, Path | bytes]  # by their path in the repository
CARD = "README.md"
# what pushes write in folders that may hold the owner's files too; what is not written again is cleared
OURS = re.compile(
    rf"members/(?P<exported>[^/]+)\.({'|'.join((bundle.PRECISION, *bundle.SECOND_FILES))})\.onnx"
    r"|members/(?P<member>[^/]+)/((config|preprocessor_config|member)\.json|model[^/]*\.safetensors(\.index\.json)?)"
    r"|externals/(?P<external>[^/]+)\.parquet"
)
LARGE = 1 << 20  # bytes: from here on, sent ahead of the commit
PARQUET = "It seems that you are about to commit a data file"  # heldout.parquet is meant to go with the model


@dataclass(frozen=True)
class Pushed:
    """url: of the commit; sent, deleted: paths in the repository, both empty where it had all of it already."""

    url: str
    sent: tuple[str, ...]
    deleted: tuple[str, ...]


def bundle_files(folder: Path, uncertified: bool = False) -> dict[str, Path | bytes]:
    """A bundle's files, each checked. ArtifactError where a precision may be used without a certificate.

    uncertified: such a bundle is meant.
    """
    values = bundle.open_bundle(folder)
    open_ones = [key for key, found in values.get("precisions", {}).items() if not found["certified"]]
    if open_ones and not uncertified:
        raise ArtifactError(
            f"{folder} lets members run at {join_limited(open_ones)} without a certificate; certify it first: "
            "python cli.py "
            f"export --bundle {folder} --certify-on DATA, or push it as it is with --uncertified"
        )
    return {name: folder / name for name in ("bundle.json", *values["files"])}


def member_files(run: Path, stacker: Stacker) -> dict[str, Path | bytes]:
    """The run's members of a stack as `from_pretrained` opens them, a folder each; of member.json what has no paths."""
    found: dict[str, Path | bytes] = {}
    for name in artifacts.list_members(run):
        if name not in stacker.members:
            continue
        info, folder = members.read_info(run, name), artifacts.member_path(run, name)
        kept = {
            file: digest
            for file, digest in info["files"].items()
            if file in ("config.json", "preprocessor_config.json") or "safetensors" in file
        }
        members.check_files(folder, kept, "train the member again")
        found |= {f"members/{name}/{file}": folder / file for file in kept}
        told = {
            "format_version": artifacts.FORMAT_VERSION,
            "name": name,
            "labels": list(LABELS),
            "contract": info["contract"],
            "files": kept,
        }
        found[f"members/{name}/member.json"] = (json.dumps(told, indent=1) + "\n").encode()
    return found


def with_licences(known: Sequence[Base]) -> list[Base]:
    """The same with each checkpoint's licence by its card on the Hub, as far as that can be reached."""
    from huggingface_hub import HfApi

    def licence(checkpoint: str) -> str:
        try:
            with hub_errors(checkpoint):
                card = HfApi().model_info(checkpoint, timeout=10).card_data
        except HubError:
            return ""  # the card says "see its page"
        told = card.to_dict().get("license") if card else None
        return ", ".join(map(str, told)) if isinstance(told, list) else str(told or "")

    return [replace(base, licence=licence(base.checkpoint)) if base.checkpoint else base for base in known]


def check_before(repo: str, licence: str | None) -> None:
    """HubError for what a push would fail of after hours of export: no login, or a licence unknown to the Hub."""
    from huggingface_hub import get_token

    with hub_errors(repo):
        token = get_token()
        if token is None:
            raise HubError(f"{repo}: you are not logged in; run: hf auth login, with a token that may write")
        if not (token.isascii() and token.isprintable()):
            raise HubError(f"{repo}: {NO_SUCH_LOGIN}")
        if licence:
            _check_card(repo, f"---\nlicense: {json.dumps(licence)}\n---\n")


def _check_card(repo: str, text: str) -> None:
    from huggingface_hub import RepoCard

    try:
        card = RepoCard(text)
        patiently(lambda: card.validate("model"))
    except ValueError as error:
        raise HubError(f"{repo}: the Hub refuses the head of its card, README.md: {redacted_line(error)}") from None


def push(
    repo: str,
    files: Files,
    card: str,
    log: Log,
    private: bool = False,
    branch: str | None = None,
    message: str = "",
) -> Pushed:
    """Send what the Hub does not have, and delete what an earlier push left, in one commit.

    card: as `model_card` makes it; what others wrote in README.md around it stays. Makes the
    repository, and the branch, where they are missing. HubError says what to do.
    """
    from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi

    with hub_errors(repo), _bars_on_terminals():
        api = HfApi()
        head = _prepare(api, repo, private, branch)
        there = _files(api, repo, head)
        before = download(repo, (CARD, "bundle.json"), head, bars=False)
        older = before / CARD
        text = merged(repo, older.read_text(encoding="utf-8", errors="replace") if older.is_file() else "", card)
        _check_card(repo, text)  # create_commit would, after the large files
        wanted = {**files, CARD: text.encode()}
        changed = {path: file for path, file in wanted.items() if not _is_there(file, there.get(path))}
        stale = _stale(there, before / "bundle.json", wanted)
        if not changed and not stale:
            return Pushed(f"{api.endpoint}/{repo}/commit/{head}", (), ())
        additions = {path: CommitOperationAdd(path, file) for path, file in changed.items()}
        _send_large(api, repo, branch, additions, log)
        operations: list[CommitOperation] = [
            *additions.values(),
            *(CommitOperationDelete(path, is_folder=False) for path in stale),
        ]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            done = patiently(
                lambda: api.create_commit(
                    repo, operations, commit_message=message or "Push", revision=branch, parent_commit=head
                )
            )
        for warning in warned:
            if warning.category is UserWarning and not str(warning.message).startswith(PARQUET):
                log(" ".join(str(warning.message).split()))
        if ignored := sorted(set(wanted) - set(_files(api, repo, done.oid))):
            raise HubError(
                f"{repo}: its .gitignore kept out {join_limited(ignored)}, so nobody can use what is there; delete the "
                ".gitignore on its page, and push again"
            )
        return Pushed(done.commit_url, tuple(changed), tuple(stale))


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """huggingface_hub's bars where someone looks at them, unless HF_HUB_DISABLE_PROGRESS_BARS says otherwise."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _prepare(api: "HfApi", repo: str, private: bool, branch: str | None) -> str:
    """Make the repository and the branch where they are missing; returns the commit they are at."""
    patiently(lambda: api.create_repo(repo, private=private or None, exist_ok=True))
    info = patiently(lambda: api.model_info(repo))
    if private and info.private is False:
        raise HubError(f"{repo} is there and public; make it private in its settings, or leave out --private")
    if branch:
        patiently(lambda: api.create_branch(repo, branch=branch, exist_ok=True))
        info = patiently(lambda: api.model_info(repo, revision=branch))
    return str(info.sha)


def _files(api: "HfApi", repo: str, commit: str) -> dict[str, "RepoFile"]:
    """What a commit holds, by path."""
    from huggingface_hub.hf_api import RepoFile

    tree = patiently(lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)))
    return {item.path: item for item in tree if isinstance(item, RepoFile)}


def _send_large(api: "HfApi", repo: str, branch: str | None, additions: Mapping[str, Any], log: Log) -> None:
    large = {path: item for path, item in additions.items() if item.upload_info.size >= LARGE}
    for number, (path, item) in enumerate(large.items(), 1):
        log(f"{number} of {len(large)} large files: {path}, {item.upload_info.size / 1e6:,.0f} MB")
        api.preupload_lfs_files(repo, [item], revision=branch, num_threads=1, free_memory=False)


def _is_there(file: Path | bytes, found: "RepoFile | None") -> bool:
    """Whether the Hub has just this content: by SHA-256 in large-file storage, else by git's own hash of it."""
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if found is None or found.size != size:
        return False
    if found.lfs is not None:
        return isinstance(file, Path) and artifacts.file_sha256(file) == found.lfs.sha256
    content = file if isinstance(file, bytes) else file.read_bytes()
    return sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest() == found.blob_id


def _stale(there: Iterable[str], older: Path, wanted: Iterable[str]) -> list[str]:
    """What an earlier push left and this one does not write; nothing where no bundle was."""
    if not older.is_file():
        return []
    try:
        listed = set(json.loads(older.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        listed = set()
    left = set(there) - set(wanted)
    return sorted(path for path in left if path in listed or _is_ours(path))


def _is_ours(path: str) -> bool:
    found = OURS.fullmatch(path)
    return found is not None and any(name and is_member_name(name) for name in found.groupdict().values())
