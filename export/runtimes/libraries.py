"""ONNX Runtime, OpenVINO and NNCF without their telemetry: nothing is sent, and no id is written at home.

All begin as they are imported (onnxruntime from 1.29 on), so every import of them is one of these.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from typing import Any

from ensemble.core.errors import UnavailableError, error_line

TELEMETRY = "openvino_telemetry"


def load_onnxruntime() -> Any:
    """The package onnxruntime."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def load_openvino() -> Any:
    """The package openvino; ImportError where it is not installed."""
    with nullcontext() if "openvino" in sys.modules else _without_telemetry():
        import openvino
    return openvino


def runtime_error_line(error: Exception) -> str:
    """An error of a runtime as one line: its first, but OpenVINO's last, which follows lines of its source code."""
    if (text := str(error).strip()).startswith("Exception from "):
        return error_line(text.rpartition("\n")[2]).rstrip(".:")
    return error_line(error, first=True).rstrip(".:")


def out_of_memory(error: Exception) -> bool:
    """Whether an error of theirs is for want of memory; they have no class for it."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|bad_alloc|allocate", str(error), re.I))


def load_nncf() -> Any:
    """The package nncf, which logs errors only; UnavailableError where it is not installed."""
    load_onnxruntime()
    with suppress(ImportError):
        load_openvino()  # nncf imports both by itself
    # it imports torch's compiler of extensions, which complains where there is a CUDA_HOME and no GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with _without_telemetry():
        try:
            import nncf
        except ImportError:
            raise UnavailableError("nncf is not installed; run: pip install 'manyeyes[int8]'") from None
    nncf.set_log_level(logging.ERROR)
    return nncf


@contextmanager
def _without_telemetry() -> Iterator[None]:
    loaded = sys.modules.get(TELEMETRY)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # what imports it then takes its own stand-in
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]
        if loaded is not None:
            sys.modules[TELEMETRY] = loaded


@cache
def openvino_core() -> Any:
    """OpenVINO's Core, one for as long as the process lives; ImportError where it is not installed.

    Its CPU plugin gives the thread that loads it another stack for signals, and takes that away in
    whichever thread drops the Core last: the next signal, a Ctrl-C, would be a segmentation fault.
    """
    return load_openvino().Core()
