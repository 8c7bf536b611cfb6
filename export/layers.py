"""The layers of an exported member, and a search for the fewest that must stay in fp32. Reading them needs onnx."""

from ast import literal_eval
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# 2 rounds of at most 16 measurements and 4 tries, however many layers there are
PARTS, ROUNDS = 16, 2


@dataclass(frozen=True)
class Layer:
    """A matrix product or convolution and the nodes of the file up to the next one. name: the module's, in torch."""

    name: str
    nodes: tuple[str, ...]


def read_layers(path: Path) -> list[Layer]:
    """Layers in the file's order; what comes before the first belongs to it."""
    import onnx

    names: list[str] = []
    parts: list[list[str]] = [[]]
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type in PRODUCTS:
            if names:
                parts.append([])
            names.append(_module(node))
        parts[-1].append(node.name)
    return [Layer(name, tuple(nodes)) for name, nodes in zip(names, parts, strict=bool(names))]


def fewest(
    layers: Sequence[Layer], harm: Callable[[Sequence[Layer]], float], passes: Callable[[Sequence[Layer]], bool]
) -> list[Layer] | None:
    """The layers to keep in fp32 so that the member passes, in order; None where most of it would not do.

    Parts of the member are ranked by the harm that each does alone, and a bisection finds how
    many of the most harmful must be kept; a second round looks into those. harm: of these layers
    alone at the lower precision, infinite where a logit is. passes: with these kept.
    """
    kept = list(layers)
    for _ in range(ROUNDS):
        places = np.array_split(np.arange(len(kept)), min(PARTS, len(kept)))
        ranked = sorted(([kept[place] for place in part] for part in places), key=harm, reverse=True)
        counts = range(1, len(ranked))
        count = 1 + bisect_left(counts, True, key=lambda number: passes(list(chain(*ranked[:number]))))
        if count == len(ranked):
            break
        kept = list(chain(*ranked[:count]))
    return [layer for layer in layers if layer in kept] if len(kept) < len(layers) else None


def _module(node: Any) -> str:
    """As the exporter noted it: scopes from the whole member down to the operation; else the node's own name."""
    scopes = next((note.value for note in node.metadata_props if note.key == "pkg.torch.onnx.name_scopes"), "[]")
    found = [scope for scope in literal_eval(scopes)[:-1] if scope]
    return found[-1] if found else node.name
