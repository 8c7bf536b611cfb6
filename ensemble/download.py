"""Checkpoints from the Hugging Face Hub into its local cache. Only what a caller names is fetched."""

from pathlib import Path

from ensemble.errors import BackboneError

CLASSIFIER_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "*.index.json",
)


def download_classifier(repo: str, revision: str | None = None) -> Path:
    """A Hub classifier's config, processor and weights as a local folder; safetensors if it has them."""
    folder = download(repo, CLASSIFIER_FILES, revision)
    if not any(folder.glob("*.safetensors")):
        # Older repositories have the PyTorch form only; it is read as tensors, never as code.
        folder = download(repo, (*CLASSIFIER_FILES, "pytorch_model.bin"), revision)
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{repo} on the Hub has no config.json, so it is not a checkpoint of transformers or timm")
    return folder


def download(repo: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    """Fetch files of a Hub repository that match, or find them in the cache; BackboneError says why not."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        reason = "its owner grants access on request: accept its terms on the Hub, then run: hf auth login"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = "no such repository, or it is private: check the name, or run: hf auth login"
    except errors.HFValidationError as error:
        reason = str(error)
    except errors.HfHubHTTPError as error:
        reason = f"the Hub cannot be reached or refused ({_brief(error)}); connect, or name a local folder"
    except Exception as error:  # the HTTP client's own errors change with its version
        if not isinstance(error, OSError) and "http" not in type(error).__module__:
            raise
        reason = f"the Hub cannot be reached ({_brief(error)}); connect, or name a local folder"
    raise BackboneError(f"{repo}: {reason}")


def _brief(error: Exception) -> str:
    lines = str(error).split("\n")
    return lines[0].strip()[:120] or type(error).__name__
