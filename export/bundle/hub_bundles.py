"""Download bundles and classifiers from the Hugging Face Hub: hf://USER/REPO[@REVISION] -> a local folder. No torch."""

import glob
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, BackboneError, HubError, join_limited
from ensemble.core.hub_download import download, download_classifier, has_weights, require_hub
from ensemble.data.files import expand_user
from export.bundle import bundle

PREFIX = "hf://"
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
REVISION = re.compile(r"\w[\w.+-]*(/[\w+-][\w.+-]*)*", re.ASCII)


def locate(source: str | Path) -> Path:
    """The folder that `source` names; hf:// is downloaded first, unless the cache has it."""
    text = str(source)
    if is_remote(text):
        repo, revision = parse(text)
        folder = download(repo, ("bundle.json", "config.json"), revision, bars=False)
        if (folder / "bundle.json").is_file():
            return _complete(repo, folder)
        if not has_weights(folder):
            require_hub(repo, folder.name)  # fails at once, where a download would retry for long
        return download_classifier(repo, folder.name)
    folder = expand_user(text)
    if not folder.is_dir():
        raise BackboneError(f"{text} is not a folder; for a model on the Hub write {PREFIX}USER/REPO")
    return folder


def locate_bundle(source: str) -> Path:
    """As `locate`, for bundles alone; of a repository that is none, no more than a look is downloaded."""
    if is_remote(source):
        return fetch_bundle(*parse(source))
    folder = locate(source)
    if not (folder / "bundle.json").is_file():
        raise ArtifactError(
            f"{source} is no bundle (no bundle.json); a single classifier scores by: "
            f"python cli.py infer --model {source}"
        )
    return folder


def is_remote(source: str | Path) -> bool:
    """Whether `source` is on the Hub."""
    return str(source).startswith(PREFIX)


def parse(text: str) -> tuple[str, str | None]:
    """[hf://]USER/REPO[@REVISION] -> USER/REPO and the revision, None for the main branch."""
    repo, at, revision = text.removeprefix(PREFIX).partition("@")
    if not NAME.fullmatch(repo) or (at and not REVISION.fullmatch(revision)):
        raise HubError(f"{text} is no name on the Hub; write USER/REPO, or USER/REPO@REVISION")
    return repo, revision or None


def fetch_bundle(repo: str, revision: str | None) -> Path:
    """Download all files of a bundle at one commit, as bundle.json lists them; HubError if it is no bundle."""
    return _complete(repo, _fetch_list(repo, revision))


def _complete(repo: str, folder: Path) -> Path:
    """Download the files of bundle.json that are missing or damaged in a commit's folder in the cache."""
    files = _listed(repo, folder)

    def fetch(names: Sequence[str], again: bool) -> None:
        require_hub(repo, folder.name)
        download(repo, [glob.escape(name) for name in names], folder.name, again)

    if missing := [name for name in files if not (folder / name).is_file()]:
        fetch(missing, again=False)
    if damaged := _damaged(folder, files):  # for example cut off by a full disk: the client checks sizes only
        fetch(damaged, again=True)
        damaged = _damaged(folder, files)
    if damaged:
        raise HubError(
            f"{repo} does not hold what its bundle.json lists ({join_limited(damaged)}); its owner should push it again"
        )
    return folder


def _fetch_list(repo: str, revision: str | None) -> Path:
    """The folder in the cache with a bundle's bundle.json; HubError if there is none on the Hub."""
    folder = download(repo, ("bundle.json",), revision, bars=False)
    if not (folder / "bundle.json").is_file():
        require_hub(repo, folder.name)
        raise HubError(
            f"{repo} holds no bundle (no bundle.json); a single classifier scores by: "
            f"python cli.py infer --model {PREFIX}{repo}"
        )
    return folder


def pull(repo: str, revision: str | None, target: Path, replace: bool = False) -> tuple[str, bool]:
    """Copy a bundle from the Hub into the folder `target`; returns its commit, and whether anything changed.

    Another bundle there is replaced only with `replace`, and in one step; of the same bundle, only
    damaged files are replaced. Files in the cache are not downloaded again.
    """
    from huggingface_hub import is_offline_mode

    commit = "" if is_offline_mode() else require_hub(repo, revision)
    noted = download(repo, ("bundle.json",), revision, bars=False).name  # the cache notes a revision's commit
    commit, target = commit or noted, target.resolve()
    artifacts.restore_folder(target)
    if target.is_dir() and any(target.iterdir()):
        if not (target / "bundle.json").is_file():
            raise ArtifactError(f"{target} is there and is no bundle; name another folder")
        newest = _fetch_list(repo, commit)
        if (target / "bundle.json").read_bytes() == (newest / "bundle.json").read_bytes():
            if damaged := _damaged(target, _listed(repo, newest)):
                source = fetch_bundle(repo, commit)
                for name in damaged:
                    with artifacts.replacing(target / name) as temporary:
                        shutil.copyfile(source / name, temporary)
            return commit, bool(damaged)
        if not replace:
            raise ArtifactError(f"{target} holds another bundle; name another folder, or replace it with --force")
    _copy(fetch_bundle(repo, commit), target)
    return commit, True


def _listed(repo: str, folder: Path) -> Mapping[str, str]:
    try:
        files: Mapping[str, str] = bundle.read_contents(folder)["files"]
    except ArtifactError as error:  # anybody may have written it
        why = str(error).partition("; ")[0].replace(str(folder / "bundle.json"), "its bundle.json")
        raise HubError(f"{repo} cannot be used: {why}; its owner should push it again") from None
    return files


def _damaged(folder: Path, files: Mapping[str, str]) -> list[str]:
    return [
        name
        for name, digest in files.items()
        if not (folder / name).is_file() or artifacts.file_sha256(folder / name) != digest
    ]


def _copy(source: Path, target: Path) -> None:
    """Copy a bundle's files from the cache, where they are links, into a folder of their own."""
    work = target.with_name(f".{target.name}.pull")
    shutil.rmtree(work, ignore_errors=True)
    try:
        for name in ["bundle.json", *bundle.read_contents(source)["files"]]:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, work / name)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise ArtifactError(f"cannot write {work}: {error.strerror or error}; choose another place") from None
    artifacts.replace_folder(work, target)
