"""manyeyes, the shipping half: ONNX, inference, submissions.

from export import Predictor
predictor = Predictor.load("runs/default")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.inference.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line starts without NumPy and pandas.
    if name == "Predictor":
        from export.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'export' has no attribute {name!r}")
