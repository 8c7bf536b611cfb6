"""Push a bundle, its members and its card to a Hub repository, in one commit. No torch.

Large files are uploaded one after the other before the commit, so a push that is interrupted and repeated sends
only those that are missing.
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
from typing import TYPE_CHECKING

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, HubError, join_limited
from ensemble.core.hub_download import INVALID_LOGIN, download, hub_errors, redacted_line, retry_on_429
from ensemble.core.log import Log
from ensemble.core.names import LABELS, is_member_name
from ensemble.models import members
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle
from export.hub.model_card import BaseCheckpoint, merge_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

Files = Mapping[str, Path | bytes]  # path in the repository -> local file or content
CARD = "README.md"
# what pushes write in folders that may hold the owner's files too; a push deletes those that it does not write again
PUSHED_PATHS = re.compile(
    rf"members/(?P<exported>[^/]+)\.({'|'.join((bundle.PRECISION, *bundle.LOW_PRECISION_KINDS))})\.onnx"
    r"|members/(?P<member>[^/]+)/((config|preprocessor_config|member)\.json|model[^/]*\.safetensors(\.index\.json)?)"
    r"|externals/(?P<external>[^/]+)\.parquet"
)
LARGE_FILE_BYTES = 1 << 20  # files of this size and more are uploaded before the commit
PARQUET_WARNING = (
    "It seems that you are about to commit a data file"  # of huggingface_hub; heldout.parquet belongs to the model
)


@dataclass(frozen=True)
class PushResult:
    """The commit's URL, and the repository paths sent and deleted; both are empty where nothing had changed."""

    url: str
    sent: tuple[str, ...]
    deleted: tuple[str, ...]


def bundle_files(folder: Path, uncertified: bool = False) -> dict[str, Path | bytes]:
    """A bundle's files, each checked. ArtifactError for a precision without a certificate, unless `uncertified`."""
    manifest = bundle.open_bundle(folder)
    missing = [key for key, precision in manifest.get("precisions", {}).items() if not precision["certified"]]
    if missing and not uncertified:
        raise ArtifactError(
            f"{folder} lets members run at {join_limited(missing)} without a certificate; certify it first: "
            "python cli.py "
            f"export --bundle {folder} --certify-on DATA, or push it as it is with --uncertified"
        )
    return {name: folder / name for name in ("bundle.json", *manifest["files"])}


def member_files(run: Path, stacker: Stacker) -> dict[str, Path | bytes]:
    """The run's members of a stack, a folder each for `from_pretrained`; member.json without local paths."""
    files: dict[str, Path | bytes] = {}
    for name in artifacts.list_members(run):
        if name not in stacker.members:
            continue
        info, folder = members.read_info(run, name), artifacts.member_path(run, name)
        digests = {
            file: digest
            for file, digest in info["files"].items()
            if file in ("config.json", "preprocessor_config.json") or "safetensors" in file
        }
        members.check_files(folder, digests, "train the member again")
        files |= {f"members/{name}/{file}": folder / file for file in digests}
        public_info = {
            "format_version": artifacts.FORMAT_VERSION,
            "name": name,
            "labels": list(LABELS),
            "contract": info["contract"],
            "files": digests,
        }
        files[f"members/{name}/member.json"] = (json.dumps(public_info, indent=1) + "\n").encode()
    return files


def look_up_licences(bases: Sequence[BaseCheckpoint]) -> list[BaseCheckpoint]:
    """The same with each checkpoint's licence from its card on the Hub, where that can be reached."""
    from huggingface_hub import HfApi

    def licence(checkpoint: str) -> str:
        try:
            with hub_errors(checkpoint):
                card = HfApi().model_info(checkpoint, timeout=10).card_data
        except HubError:
            return ""  # the card says "see its page"
        value = card.to_dict().get("license") if card else None
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")

    return [replace(base, licence=licence(base.checkpoint)) if base.checkpoint else base for base in bases]


def check_login(repo: str, licence: str | None) -> None:
    """HubError, before a long export, for what would make the push fail: no login, or a licence unknown to the Hub."""
    from huggingface_hub import get_token

    with hub_errors(repo):
        token = get_token()
        if token is None:
            raise HubError(f"{repo}: you are not logged in; run: hf auth login, with a token that may write")
        if not (token.isascii() and token.isprintable()):
            raise HubError(f"{repo}: {INVALID_LOGIN}")
        if licence:
            _check_card(repo, f"---\nlicense: {json.dumps(licence)}\n---\n")


def _check_card(repo: str, text: str) -> None:
    from huggingface_hub import RepoCard

    try:
        card = RepoCard(text)
        retry_on_429(lambda: card.validate("model"))
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
) -> PushResult:
    """Upload what the Hub lacks and delete stale files of an earlier push, in one commit.

    card: from `model_card.render_card`; what others wrote in README.md around it stays. Creates
    the repository, and the branch, where they are missing. HubError says what to do.
    """
    from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi

    with hub_errors(repo), _progress_bars_on_terminals():
        api = HfApi()
        head = _create_repo(api, repo, private, branch)
        present = _list_files(api, repo, head)
        previous = download(repo, (CARD, "bundle.json"), head, bars=False)
        old_card = previous / CARD
        old_text = old_card.read_text(encoding="utf-8", errors="replace") if old_card.is_file() else ""
        text = merge_card(repo, old_text, card)
        _check_card(repo, text)  # create_commit does so too, but after the large files
        files = {**files, CARD: text.encode()}
        changed = {path: file for path, file in files.items() if not _is_uploaded(file, present.get(path))}
        stale = _stale_files(present, previous / "bundle.json", files)
        if not changed and not stale:
            return PushResult(f"{api.endpoint}/{repo}/commit/{head}", (), ())
        additions = {path: CommitOperationAdd(path, file) for path, file in changed.items()}
        large = [path for path, item in additions.items() if item.upload_info.size >= LARGE_FILE_BYTES]
        for number, path in enumerate(large, 1):
            log(f"{number} of {len(large)} large files: {path}, {additions[path].upload_info.size / 1e6:,.0f} MB")
            api.preupload_lfs_files(repo, [additions[path]], revision=branch, num_threads=1, free_memory=False)
        operations: list[CommitOperation] = [
            *additions.values(),
            *(CommitOperationDelete(path, is_folder=False) for path in stale),
        ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            commit = retry_on_429(
                lambda: api.create_commit(
                    repo, operations, commit_message=message or "Push", revision=branch, parent_commit=head
                )
            )
        for warning in caught:
            if warning.category is UserWarning and not str(warning.message).startswith(PARQUET_WARNING):
                log(" ".join(str(warning.message).split()))
        if ignored := sorted(set(files) - set(_list_files(api, repo, commit.oid))):
            raise HubError(
                f"{repo}: its .gitignore kept out {join_limited(ignored)}, so nobody can use what is there; delete the "
                ".gitignore on its page, and push again"
            )
        return PushResult(commit.commit_url, tuple(changed), tuple(stale))


@contextmanager
def _progress_bars_on_terminals() -> Iterator[None]:
    """Show huggingface_hub's progress bars on terminals only, unless HF_HUB_DISABLE_PROGRESS_BARS is set."""
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


def _create_repo(api: "HfApi", repo: str, private: bool, branch: str | None) -> str:
    """Create the repository and the branch where they are missing; returns the branch's commit."""
    retry_on_429(lambda: api.create_repo(repo, private=private or None, exist_ok=True))
    info = retry_on_429(lambda: api.model_info(repo))
    if private and info.private is False:
        raise HubError(f"{repo} is there and public; make it private in its settings, or leave out --private")
    if branch:
        retry_on_429(lambda: api.create_branch(repo, branch=branch, exist_ok=True))
        info = retry_on_429(lambda: api.model_info(repo, revision=branch))
    return str(info.sha)


def _list_files(api: "HfApi", repo: str, commit: str) -> dict[str, "RepoFile"]:
    """The files of a commit by path."""
    from huggingface_hub.hf_api import RepoFile

    tree = retry_on_429(lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)))
    return {item.path: item for item in tree if isinstance(item, RepoFile)}


def _is_uploaded(file: Path | bytes, remote: "RepoFile | None") -> bool:
    """Whether the Hub has this content: compared by SHA-256 in large-file storage, else by git's blob hash."""
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if remote is None or remote.size != size:
        return False
    if remote.lfs is not None:
        return isinstance(file, Path) and artifacts.file_sha256(file) == remote.lfs.sha256
    content = file if isinstance(file, bytes) else file.read_bytes()
    return sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest() == remote.blob_id


def _stale_files(present: Iterable[str], old_bundle: Path, files: Iterable[str]) -> list[str]:
    """Files of an earlier push that this one does not write; none where the repository held no bundle."""
    if not old_bundle.is_file():
        return []
    try:
        listed = set(json.loads(old_bundle.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        listed = set()
    matches = {path: PUSHED_PATHS.fullmatch(path) for path in set(present) - set(files)}
    return sorted(
        path
        for path, match in matches.items()
        if path in listed or (match and any(name and is_member_name(name) for name in match.groupdict().values()))
    )
