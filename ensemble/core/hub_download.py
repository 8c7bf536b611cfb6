"""Files from the Hugging Face Hub into its local cache, and what its failures mean. Only what is named is fetched.

huggingface_hub makes every request, so HF_ENDPOINT, HF_HOME, HF_TOKEN and `hf auth login` count. It keeps whole
files: one that was cut off is fetched again from its beginning, all others stay.
"""

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ensemble.core.errors import BackboneError, HubError, error_line

if TYPE_CHECKING:
    from huggingface_hub import errors

CLASSIFIER_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "*.index.json",
)
PARALLEL_DOWNLOADS = 2  # files at a time: a kill loses what has arrived of these
RETRY_SECONDS = (1, 2, 4)  # where the Hub asks to wait and does not say how long
MAX_WAIT_SECONDS = 60
TIMEOUT_SECONDS = 10
INVALID_LOGIN = "your token has characters that none has; set HF_TOKEN anew, or unset it and run: hf auth login"
REFUSAL_PREFIXES = ("LFS batch API returned errors", "Invalid metadata in README.md")  # how such a ValueError begins

Result = TypeVar("Result")


def download_classifier(repo: str, revision: str | None = None) -> Path:
    """A Hub classifier's config, processor and weights at one commit as a local folder; safetensors if it has them."""
    folder = download(repo, CLASSIFIER_FILES, revision)
    if not has_weights(folder):
        # Older repositories have the PyTorch form only; it is read as tensors, never as code.
        require_hub(repo, folder.name)
        folder = download(repo, (*CLASSIFIER_FILES, "pytorch_model.bin"), folder.name)
    if not (folder / "config.json").is_file():
        require_hub(repo, folder.name)
        raise BackboneError(f"{repo} on the Hub has no config.json, so it is not a checkpoint of transformers or timm")
    if not has_weights(folder):
        raise BackboneError(
            f"{repo} on the Hub has neither model.safetensors nor pytorch_model.bin: no weights to load"
        )
    return folder


def has_weights(folder: Path) -> bool:
    """Whether a classifier's folder holds weights in either form, or a part of them."""
    return any(folder.glob("*.safetensors")) or (folder / "pytorch_model.bin").is_file()


def require_hub(repo: str, revision: str | None = None) -> str:
    """The commit that the Hub says a revision is now; HubError at once where it does not tell, or lists no files of it.

    `download` then gives what the cache has, and only after many tries: what that lacks may be on the Hub.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(repo):
        commit = str(retry_on_429(lambda: api.model_info(repo, revision=revision, timeout=TIMEOUT_SECONDS)).sha)
        retry_on_429(lambda: list(api.list_repo_tree(repo, revision=commit)))
    return commit


def download(
    repo: str, patterns: Sequence[str], revision: str | None = None, again: bool = False, bars: bool = True
) -> Path:
    """Fetch files of a Hub repository that match, or find them in the cache; HubError says why not.

    The folder is named by the commit that `revision` (default: main) means; given that name, the
    next call stays at it. again: fetch what is in the cache too. bars: show progress on a terminal.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **{**more, "disable": None if bars else True})

    with hub_errors(repo):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                force_download=again,
                max_workers=PARALLEL_DOWNLOADS,
                tqdm_class=Bar,
            )
        )


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError of one line; of its log, show only that it waits."""
    import huggingface_hub.utils  # noqa: F401 makes the handlers

    handlers = logging.getLogger("huggingface_hub").handlers
    for handler in handlers:
        handler.addFilter(_is_useful)
    try:
        yield
    except Exception as error:
        reason = explain_error(error)
        if reason is None:
            raise
        raise HubError(f"{repo}: {reason}") from None
    finally:
        for handler in handlers:
            handler.removeFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    """Its other warnings show addresses that are signed for a while."""
    return record.levelno >= logging.ERROR or record.getMessage().startswith("Rate limited. Waiting")


def explain_error(error: BaseException) -> str | None:
    """What a failure means and what to run, in one line; None for what neither the Hub nor the connection caused."""
    from huggingface_hub import errors

    if isinstance(error, (RuntimeError, errors.LocalEntryNotFoundError)) and error.__cause__ is not None:
        return explain_error(error.__cause__)
    reasons = {  # a class before its base class
        errors.LocalTokenNotFoundError: "you are not logged in; run: hf auth login",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set and it is not in the cache; unset it, or name a "
        "local folder",
        errors.GatedRepoError: "its owner grants access on request: accept its terms on the Hub, then run: "
        "hf auth login",
        errors.RevisionNotFoundError: "it has no such revision; leave out @REVISION for its main branch",
        errors.RepositoryNotFoundError: "no such repository, or it is private: check the name, or run: hf auth login",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    if isinstance(error, errors.HFValidationError):
        return redacted_line(error)
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error)
    if isinstance(error, ValueError) and str(error).startswith(REFUSAL_PREFIXES):
        return f"the Hub refused ({redacted_line(error)} {redacted_line(str(error).partition(chr(10))[2])})"
    if _is_token_error(error):
        return INVALID_LOGIN
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room, or move the cache with HF_HOME, and run the same command again"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if is_transport(error):
        return f"the Hub cannot be reached ({redacted_line(error)}); connect and run it again, or name a local folder"
    return None


def is_transport(error: BaseException) -> bool:
    """Whether an error may be of the connection, so that another try may help."""
    # the HTTP client's own classes change with its version
    return (isinstance(error, OSError) or "http" in type(error).__module__) and not _is_token_error(error)


def _is_token_error(error: BaseException) -> bool:
    """Whether a token does not fit into a request's head; such an error's text shows it."""
    return isinstance(error, UnicodeEncodeError) or "Illegal header value" in str(error)


def retry_on_429(call: Callable[[], Result]) -> Result:
    """`call()`, and again after the wait that the Hub asks for where it answers 429, a few times at most.

    For the requests that huggingface_hub itself makes once only.
    """
    from huggingface_hub import errors

    for usual in RETRY_SECONDS:
        try:
            return call()
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 429 or (wait := _retry_after(error) or usual) > MAX_WAIT_SECONDS:
                raise
            time.sleep(wait)
    return call()


def redacted_line(error: BaseException | str) -> str:
    """An error's first line, without anything that looks like a token."""
    return re.sub(r"\b(hf|api)_\w{6,}", r"\1_...", error_line(error, first=True))[:160]


def _refusal(error: "errors.HfHubHTTPError") -> str:
    status = error.response.status_code
    changed = "it was changed meanwhile; run the same command again"
    reasons = {
        401: "the Hub does not accept your token; run: hf auth login",
        403: "your token has no right to do this; check the name, or run: hf auth login, with a token that may write",
        409: changed,
        412: changed,
    }
    if status in reasons:
        return reasons[status]
    if status == 429:
        wait = _retry_after(error)
        return f"the Hub asks to wait{f' {wait} seconds' if wait else ''}; then run the same command again"
    if status >= 500:
        return f"the Hub is in trouble (it answers {status}); run the same command again, what is done is kept"
    return f"the Hub refused ({redacted_line(error)})"


def _retry_after(error: "errors.HfHubHTTPError") -> int | None:
    """Seconds that the Hub asks to wait, if it says so."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    seconds = error.response.headers.get("Retry-After", "")
    limit = parse_ratelimit_headers(error.response.headers)
    return int(seconds) if seconds.isdigit() else limit.reset_in_seconds if limit and limit.remaining == 0 else None
