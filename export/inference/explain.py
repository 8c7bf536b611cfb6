"""Explain one image: each member's contribution to the score, and its heat map. Heat maps need torch and captum."""

import io
from base64 import b64encode
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ensemble.core.errors import ImageError, UnavailableError
from ensemble.core.metrics import sigmoid
from ensemble.data.inputs import Inputs, inputs_from_open_files
from ensemble.images import decode
from export.inference.ensemble import Ensemble
from export.inference.infer import member_logits

if TYPE_CHECKING:
    from ensemble.models.backbone import Member

HEATMAP_NOTE = (
    "Bright: where a member found what speaks for its own answer. Its attention, not proof; outside its crops, nothing."
)


def require_captum() -> None:
    """UnavailableError, saying what to do, where heat maps cannot be made."""
    if find_spec("captum") is None:
        raise UnavailableError("heat maps need captum; run: pip install 'manyeyes[train]'")


def explain_scores(ensemble: Ensemble, inputs: Inputs) -> dict[str, Any]:
    """The target of a single image, each member's logit and p, and what it adds to the stack's logit.

    ImageError for what is no image.
    """
    logits, failed = member_logits(inputs, ensemble)
    if failed:
        raise ImageError(failed[0])
    stacker = ensemble.stacker
    target = float(stacker.target(logits)[0])
    return {
        "target": target,
        "threshold": stacker.threshold,
        "verdict": "ai" if target >= stacker.threshold else "real",
        "logit": float(stacker.logit(logits)[0]),
        "members": {
            name: {"logit": float(logit), "p": float(sigmoid(logit)), "share": float(share)}
            for name, logit, share in zip(stacker.members, logits[0], stacker.contributions(logits)[0], strict=True)
        },
    }


def predicted_class(member: Mapping[str, float]) -> str:
    """The class that a member alone predicts. member: its entry in `explain_scores`."""
    return "ai" if member["logit"] > 0 else "real"


def explain_image(ensemble: Ensemble, networks: Mapping[str, "Member"], name: str, data: bytes) -> dict[str, Any]:
    """`explain_scores` of an encoded image, with every network's heat map over it as a PNG in a data URL.

    ensemble: runs the networks by torch.
    """
    from ensemble.evaluation.heatmaps import heatmaps, overlay

    values = explain_scores(ensemble, inputs_from_open_files([(name, io.BytesIO(data))]))
    shown = decode.decode(data, name)
    for member, network in networks.items():
        buffer = io.BytesIO()
        overlay(shown, heatmaps(network, shown)).save(buffer, "PNG")
        values["members"][member]["heat"] = f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
    return {"name": name, **values, "note": HEATMAP_NOTE}
