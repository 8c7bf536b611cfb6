"""An exported member as a `Runner`, in ONNX Runtime or OpenVINO. The runtime that was asked for is never replaced."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ensemble.core.errors import ManyeyesError, UnavailableError
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models.runner import Runner
from export.runtimes.libraries import runtime_error_line
from export.runtimes.settings import RuntimeConfig


def open_runner(name: str, path: Path, preprocess_config: PreprocessConfig, config: RuntimeConfig) -> Runner:
    """An exported member, ready to run as `config` says.

    Its `run` takes any number of images, uint8 [N, S, S, 3], and gives float32 logits [N].
    Raises UnavailableError for what this machine cannot do, also as it runs, ArtifactError for a damaged file.
    """
    if config.runtime == "openvino":
        from export.runtimes.openvino_session import open_model as open_file
    else:
        from export.runtimes.onnx_session import open_session as open_file
    with _translate_errors(name, config):
        model = open_file(path, preprocess_config.size, config)

    def run(pixels: np.ndarray) -> np.ndarray:
        with _translate_errors(name, config):
            return model(pixels)

    return Runner(name, preprocess_config, run, config.batch * config.streams, config.runtime != "onnxruntime")


@contextmanager
def _translate_errors(name: str, config: RuntimeConfig) -> Iterator[None]:
    """Raise any error of the library that runs a member, such as too little memory, as an UnavailableError."""
    try:
        yield
    except ManyeyesError:
        raise
    except Exception as error:  # the libraries' own errors share no public base
        remedy = "give a smaller --batch-size" if config.batch > 1 else "free some memory, or choose another --runtime"
        raise UnavailableError(
            f"{name}: {config} failed at batch {config.batch}: {runtime_error_line(error)}; {remedy}"
        ) from None


def require_torch() -> None:
    """UnavailableError, saying what to do, where the training packages are not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "timm")):
        raise UnavailableError(
            "torch members need the training packages; run: pip install 'manyeyes[train]', or use --onnx"
        )
