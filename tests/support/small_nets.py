"""A network in ONNX that shows what lower precisions break, and a run whose members are such networks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from helpers import PREPROCESS_CONFIG, make_frame, noisy_logits, save_graph, write_bundle, write_member, write_stacker
from PIL import Image

from ensemble.core import artifacts
from ensemble.core.recipe import find_recipes, load_recipes, recipes_folder
from export.bundle import bundle

LAYERS = ("first", "makes", "reads", "last")
WIDTH = 16
# grey pictures of every second brightness, each with a black and a white pixel
PIXELS = np.repeat(np.arange(0, 256, 2, dtype=np.uint8), 192).reshape(-1, 8, 8, 3)
PIXELS[:, 0, :2] = [[0], [255]]


def write_network(path: Path, huge: float, scale: float = 4) -> Path:
    """logit = scale * (mean brightness - 0.5), by way of a channel of `huge` * brightness that nothing uses.

    Layer `makes` puts that channel beside the brightness, `reads` gives it a weight of 0: in int8 both share
    one scale, in fp16 a number beyond 65,504 is infinite.
    """
    from onnx import TensorProto, helper

    first = np.full((3, WIDTH), 1 / 3 / 255)
    makes = np.eye(WIDTH)
    makes[:, -1] = huge / WIDTH
    reads = np.eye(WIDTH, WIDTH - 4)
    last = np.full((WIDTH - 4, 1), scale / (WIDTH - 4))
    weights = {"first": first, "makes": makes, "reads": reads, "last": last}
    constants = {"axes": np.array([1, 2, 3]), "half": np.float32(scale / 2)}
    constants |= {f"w_{name}": weight.astype(np.float32) for name, weight in weights.items()}
    values = ["floats", *LAYERS]
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], "cast", to=TensorProto.FLOAT),
        *(
            helper.make_node("MatMul", [before, f"w_{name}"], [name], name)
            for before, name in zip(values, LAYERS, strict=False)
        ),
        helper.make_node("ReduceMean", ["last", "axes"], ["mean"], "mean", keepdims=0),
        helper.make_node("Sub", ["mean", "half"], ["logit"], "sub"),
    ]
    return save_graph(path, nodes, constants)


def write_picture(path: Path, brightness: int) -> None:
    """Grey with a black and a white pixel, so that a picture's own range is that of all, as in photographs."""
    pixels = np.full((PREPROCESS_CONFIG.size, PREPROCESS_CONFIG.size), brightness, dtype=np.uint8)
    pixels[0, :2] = 0, 255
    artifacts.ensure_folder(path.parent)
    Image.fromarray(pixels).save(path)


def write_image_run(run: Path, huge: Mapping[str, float], groups: int = 64) -> pd.DataFrame:
    """A stacked and exported run: in each split `groups` groups of 4 grey images, ai the bright ones.

    No p is near 0.5. huge: of the members one and two.
    """
    frame = make_frame(2 * groups)
    frame = frame[frame["split"] == "heldout"].reset_index(drop=True)
    frame.loc[: 4 * groups - 1, "split"] = "train"
    values = frame.groupby("split").cumcount() * 256 // (4 * groups)
    frame["label"] = (values >= 128).astype("int8")
    frame["root"] = str(run.parent / "images")
    for path, value in zip(frame["path"], values, strict=True):
        write_picture(run.parent / "images" / path, value // 2 if value < 128 else 255 - value // 4)
    artifacts.write_parquet(artifacts.dataset_path(run), frame)
    for seed, name in enumerate(("one", "two")):
        write_member(run, name, frame, noisy_logits(frame, 2, seed))
    write_stacker(run)
    folder = write_bundle(run)
    for name, value in huge.items():
        write_network(folder / "members" / f"{name}.fp32.onnx", value)
    bundle.write_bundle(folder, bundle.read_contents(folder)["members"])
    return frame


QUICK = {recipe.name: recipe for recipe in load_recipes(find_recipes(recipes_folder() / "quick"))}
