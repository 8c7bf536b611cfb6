"""Low-precision files of a member: fp16 for the CUDA provider, int8. Layers that break them are found and stay in fp32.

Reading layers needs onnx.
"""

from ast import literal_eval
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.core.errors import ArtifactError, UnavailableError, join_limited
from ensemble.core.log import Log
from ensemble.core.metrics import sigmoid
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models.runner import Runner
from export.bundle import bundle, check_images, member_logits
from export.bundle.certificate import AUROC_LIMIT, DECISION_CHANGE_LIMIT, ScoreChange, compare_scores
from export.bundle.check_images import TrainingImages
from export.bundle.fp16 import write_fp16
from export.bundle.int8 import PRODUCTS, quantizer, write_int8
from export.runtimes import autotune, runner
from export.runtimes.settings import ON_CPU, RuntimeConfig

# at most 2 rounds of 16 measurements and 4 trials, however many layers there are
SEARCH_PARTS, SEARCH_ROUNDS = 16, 2
FP32 = RuntimeConfig("onnxruntime")  # the reference that lower precisions are compared with
MARGIN = 0.5  # share of a certificate's limits that a file may use on training images; other images decide later
ROUGH_CALIBRATION_IMAGES = 16
BATCHES, BATCH_TOLERANCE = (1, 4, 16), 0.02  # batch sizes it may run in, and the largest difference of p between them
TIMING_ROUNDS = 3

# writes the low-precision file with these nodes in fp32; True: calibrated by few images
Write = Callable[[Collection[str], bool], None]


@dataclass(frozen=True)
class Layer:
    """A matrix product or convolution, and the nodes of the file up to the next one. name: of its torch module."""

    name: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class LowPrecisionFile:
    """A low-precision file `target`, made from a member's fp32 file `source`, and the config that runs it."""

    name: str
    source: Path
    target: Path
    preprocess_config: PreprocessConfig
    config: RuntimeConfig

    def runner(self, batch: int | None = None) -> Runner:
        """The file as it is now, opened by `trial_config`."""
        config = replace(self.trial_config, batch=batch or self.config.batch)
        return runner.open_runner(self.name, self.target, self.preprocess_config, config)

    @property
    def trial_config(self) -> RuntimeConfig:
        """The config in a search: CUDA for TensorRT, which rounds in the same way but builds no engine for minutes."""
        return replace(self.config, runtime="cuda") if self.config.runtime == "tensorrt" else self.config

    @property
    def layers(self) -> list[Layer]:
        """The layers that may change. In int8 the last stays fp32, at no cost: logits would have 256 values else."""
        layers = read_layers(self.source)
        return layers[:-1] if self.config.precision == "int8" else layers

    @property
    def excluded_precision(self) -> str:
        """The precision of layers that are not lowered."""
        return "fp16" if (self.config.runtime, self.config.precision) == ("tensorrt", "int8") else "fp32"

    @property
    def symmetric(self) -> bool:
        """Whether int8 is quantized as TensorRT needs it."""
        return self.config.runtime == "tensorrt"


def add_files(
    folder: Path,
    name: str,
    entry: Mapping[str, Any],
    configs: Sequence[RuntimeConfig],
    training: TrainingImages | None,
    log: Log,
) -> dict[str, Any]:
    """The entry, with the low-precision files that `configs` need added to it; int8 needs training images."""
    extended = dict(entry)
    # where several runtimes need the same file the last decides, OpenVINO where it is installed
    needed = {kind: config for config in configs if (kind := bundle.low_precision_kind(config))}
    for kind, config in needed.items():
        int8 = config.precision == "int8"
        if kind in entry or (int8 and training is None):
            continue
        path = f"members/{name}.{kind}.onnx"
        preprocess_config = PreprocessConfig.from_dict(entry["contract"])
        file = LowPrecisionFile(name, folder / entry["file"], folder / path, preprocess_config, config)
        if int8 and not file.layers:
            log(f"{name}: has no layers to quantize, and stays fp32")
            continue
        try:
            made = make(file, training, log)
        except (ArtifactError, UnavailableError) as error:  # it cannot be made, or cannot be run here
            log(f"{name}: stays fp32: {str(error).removeprefix(f'{name}: ')}")
            file.target.unlink(missing_ok=True)
            continue
        extended |= {kind: path, "made": {**extended.get("made", {}), kind: made}}
    return extended


def drop_unused_files(
    folder: Path, name: str, entry: Mapping[str, Any], used: Collection[tuple[str, str | None]]
) -> dict[str, Any]:
    """The entry without the low-precision files that no config runs, which are removed. used: (member, kind)."""
    unused = [kind for kind in bundle.LOW_PRECISION_KINDS if kind in entry and (name, kind) not in used]
    for kind in unused:
        (folder / entry[kind]).unlink(missing_ok=True)
    made = {kind: value for kind, value in entry.get("made", {}).items() if kind not in unused}
    remaining = {key: value for key, value in entry.items() if key not in (*unused, "made")}
    return {**remaining, "made": made} if made else remaining


def make(file: LowPrecisionFile, training: TrainingImages | None, log: Log) -> dict[str, Any]:
    """Write the file; returns how it was made, for bundle.json.

    Without training images nothing is compared, and all layers are lowered.
    """
    write = _writer(file, training, log)
    write((), False)
    layers = file.layers
    if training is None:
        return {"layers": len(layers), "kept": []}
    if file.config.runtime == "tensorrt":
        log(f"{file.name}: building TensorRT engines of its files, to time them; that takes minutes")
    speed = full_speed = _speedup(file)
    excluded = [] if _passes(file, training) else search_layers(file, training, write, log)
    names, what, cost = [layer.name for layer in excluded], "", ""
    if excluded:
        speed = _speedup(file)
        what = f"kept in {file.excluded_precision} {len(excluded)} of {len(layers)} layers: {join_limited(names)}; "
        cost = f" ({full_speed:.2f} with no layer kept)"
    log(f"{file.name}: {what}{file.config} runs {speed:.2f} times as fast as fp32{cost}")
    int8 = file.config.precision == "int8"
    return {
        "layers": len(layers),
        "kept": names,
        "compared_on": len(training.comparison.labels),
        **({"by": quantizer(file.symmetric), "calibrated_on": len(training.calibration.labels)} if int8 else {}),
        "times_fp32": {"whole": full_speed, "made": speed},
    }


def _writer(file: LowPrecisionFile, training: TrainingImages | None, log: Log) -> Write:
    if file.config.precision == "fp16":
        return lambda excluded, roughly: write_fp16(file.source, file.target, excluded)
    if training is None:
        raise ValueError("int8 is calibrated by training images")
    images = check_images.all_images(training.calibration)
    pixels = images.pixels(file.preprocess_config)
    log(
        f"{file.name}: quantizing with {quantizer(file.symmetric)}, by the ranges of its values on {images.description}"
    )
    few = pixels[:: max(1, len(pixels) // ROUGH_CALIBRATION_IMAGES)]
    head = _nodes(read_layers(file.source)[-1:])
    return lambda excluded, roughly: write_int8(
        file.source, file.target, few if roughly else pixels, [*excluded, *head], file.symmetric
    )


def search_layers(file: LowPrecisionFile, training: TrainingImages, write: Write, log: Log) -> list[Layer]:
    """Rewrite the file with the fewest layers in fp32 that bring it within MARGIN; none where most were needed."""
    layers = file.layers
    change = _compare(file, training)
    damage = "logits are not finite"
    if np.isfinite(change.decision_changes):
        where = f"on {len(training.comparison.labels)} training images"
        damage = f"AUROC moves by {change.auroc:+.4f} and {change.decision_changes:.2%} change sides {where}"
    log(
        f"{file.name}: with all {len(layers)} layers in {file.config.precision} {damage}; "
        f"searching for layers to keep in {file.excluded_precision}"
    )
    pixels = check_images.sample_images(training.comparison).pixels(file.preprocess_config)
    exact = runner.open_runner(file.name, file.source, file.preprocess_config, FP32).run(pixels)

    def error(part: Sequence[Layer]) -> float:
        write(_nodes(layer for layer in layers if layer not in part), True)
        difference = float(np.abs(file.runner().run(pixels) - exact).mean())
        return difference if np.isfinite(difference) else np.inf

    def passes(excluded: Sequence[Layer]) -> bool:
        write(_nodes(excluded), False)
        return _passes(file, training)

    excluded = (fewest_layers(layers, error, passes) if layers else None) or []
    write(_nodes(excluded), False)
    if not excluded:
        log(f"{file.name}: no part of its layers would rescue it; the certificate decides about it as it is")
    return excluded


def fewest_layers(
    layers: Sequence[Layer], error: Callable[[Sequence[Layer]], float], passes: Callable[[Sequence[Layer]], bool]
) -> list[Layer] | None:
    """The layers to keep in fp32 so that the member passes, in order; None where most of them would be needed.

    The layers are split into parts, ranked by the error that each part causes alone. A bisection finds
    how many of the worst parts must stay in fp32; a second round does the same within those.
    error: of these layers alone at the lower precision, infinite where a logit is. passes: with these in fp32.
    """
    excluded = list(layers)
    for _ in range(SEARCH_ROUNDS):
        positions = np.array_split(np.arange(len(excluded)), min(SEARCH_PARTS, len(excluded)))
        ranked = sorted(([excluded[position] for position in part] for part in positions), key=error, reverse=True)
        counts = range(1, len(ranked))
        count = 1 + bisect_left(counts, True, key=lambda number: passes(list(chain(*ranked[:number]))))
        if count == len(ranked):
            break
        excluded = list(chain(*ranked[:count]))
    return [layer for layer in layers if layer in excluded] if len(excluded) < len(layers) else None


def read_layers(path: Path) -> list[Layer]:
    """Layers in the file's order; nodes before the first product belong to the first layer."""
    import onnx

    names: list[str] = []
    parts: list[list[str]] = [[]]
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type in PRODUCTS:
            if names:
                parts.append([])
            # the torch module in the exporter's note of scopes, from the whole member to the operation; else the node
            notes = (note.value for note in node.metadata_props if note.key == "pkg.torch.onnx.name_scopes")
            modules = [scope for scope in literal_eval(next(notes, "[]"))[:-1] if scope]
            names.append(modules[-1] if modules else node.name)
        parts[-1].append(node.name)
    return [Layer(name, tuple(nodes)) for name, nodes in zip(names, parts, strict=bool(names))]


def _nodes(layers: Iterable[Layer]) -> list[str]:
    return [node for layer in layers for node in layer.nodes]


def _compare(file: LowPrecisionFile, training: TrainingImages) -> ScoreChange:
    """fp32 against the low-precision file on training images; those that cannot be read are left out."""
    columns = [
        member_logits.logit_column(file.name, file.source, file.preprocess_config, FP32),
        member_logits.logit_column(file.name, file.target, file.preprocess_config, file.trial_config),
    ]
    readable, logits, _ = member_logits.compute_logits(training.comparison.files, columns, file.config.precision)
    fp32, lower = logits.T
    return compare_scores(fp32, lower, training.comparison.labels[readable])


def _passes(file: LowPrecisionFile, training: TrainingImages) -> bool:
    """Whether the file is within MARGIN of the limits, and the same in other batches. NaN does not pass.

    OpenVINO's int8 products can be wrong in some: seen with 2026.4 in products of 4 to 8 rows, which gave
    the same logit for every image.
    """
    change = _compare(file, training)
    if not (abs(change.auroc) <= MARGIN * AUROC_LIMIT and change.decision_changes <= MARGIN * DECISION_CHANGE_LIMIT):
        return False
    pixels = check_images.sample_images(training.comparison).pixels(file.preprocess_config)
    batches = BATCHES if file.config.runtime in ON_CPU else ()
    logits = [file.runner(batch).run(pixels).astype(np.float64) for batch in (file.config.batch, *batches)]
    return bool(np.ptp(sigmoid(np.stack(logits)), axis=0).max() <= BATCH_TOLERANCE)


def _speedup(file: LowPrecisionFile) -> float:
    """How many times as fast as the fp32 file it is, in the same runtime and batch; the best of a few rounds."""
    fp32 = RuntimeConfig(file.config.runtime, batch=file.config.batch)
    timers = [
        autotune.timer(runner.open_runner(file.name, path, file.preprocess_config, config), config)
        for path, config in ((file.source, fp32), (file.target, file.config))
    ]
    rounds = [[timer() for timer in timers] for _ in range(TIMING_ROUNDS)]
    before, after = (min(seconds) for seconds in zip(*rounds, strict=True))
    return before / after
