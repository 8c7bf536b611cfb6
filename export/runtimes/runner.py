"""What runs a member: torch, ONNX Runtime or OpenVINO, each as a `Runner`. What was asked for is never replaced."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ensemble.core.errors import ManyeyesError, UnavailableError
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models.runner import Runner
from export.runtimes.libraries import runtime_error_line
from export.runtimes.settings import RuntimeConfig

if TYPE_CHECKING:
    from ensemble.models.backbone import Member

TORCH_BATCH = 16  # images, where nobody asked for another number


def open_runner(name: str, path: Path, preprocess_config: PreprocessConfig, setting: RuntimeConfig) -> Runner:
    """An exported member, ready to run as `setting` says.

    Its `run` takes any number of images, uint8 [N, S, S, 3], and gives float32 logits [N].
    Raises UnavailableError for what this machine cannot do, also as it runs, ArtifactError for a damaged file.
    """
    if setting.runtime == "openvino":
        from export.runtimes.openvino_session import open_model as opened
    else:
        from export.runtimes.onnx_session import open_session as opened
    with _told(name, setting):
        model = opened(path, preprocess_config.size, setting)

    def run(pixels: np.ndarray) -> np.ndarray:
        with _told(name, setting):
            return model(pixels)

    return Runner(name, preprocess_config, run, setting.batch * setting.streams, setting.runtime != "onnxruntime")


@contextmanager
def _told(name: str, setting: RuntimeConfig) -> Iterator[None]:
    """Any error of the library that runs a member, such as for want of memory, as an UnavailableError."""
    try:
        yield
    except ManyeyesError:
        raise
    except Exception as error:  # their own share no public base
        remedy = "give a smaller --batch-size" if setting.batch > 1 else "free some memory, or choose another --runtime"
        raise UnavailableError(
            f"{name}: {setting} failed at batch {setting.batch}: {runtime_error_line(error)}; {remedy}"
        ) from None


def torch_runner(name: str, member: "Member", device: str, batch: int | None = None) -> Runner:
    """A torch member on `device`, cpu or cuda, `batch` images at a time."""
    import torch

    from ensemble.models.torch_runner import torch_runner as runner

    return runner(name, member, torch.device(device), batch=batch or TORCH_BATCH)


def require_torch() -> None:
    """UnavailableError, saying what to do, where the training packages are not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "timm")):
        raise UnavailableError(
            "torch members need the training packages; run: pip install 'manyeyes[train]', or use --onnx"
        )


def choose_device(device: str) -> str:
    """`auto` as cuda where torch finds a GPU, else cpu."""
    from ensemble.models.torch_runner import choose_device as choose

    return choose(device)
