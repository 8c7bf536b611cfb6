"""Files beside a member's fp32 one: fp16 for the CUDA provider, int8. Layers that break them are found and kept.

The layers of an exported member, and a search for the fewest that must stay in fp32. Reading them needs onnx.
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
from export.bundle.certificate import AUROC_LIMIT, FLIPS_LIMIT, Change, compare
from export.bundle.check_images import Training
from export.runtimes import autotune
from export.runtimes import runner as runtime
from export.runtimes.settings import ON_CPU, RuntimeConfig

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# 2 rounds of at most 16 measurements and 4 tries, however many layers there are
PARTS, SEARCH_ROUNDS = 16, 2


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
    for _ in range(SEARCH_ROUNDS):
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


# writes the second file with these nodes in fp32; roughly: calibrated by few images
Write = Callable[[Collection[str], bool], None]
FP32 = RuntimeConfig("onnxruntime")
MARGIN = 0.5  # of a certificate's limits may be used up on training images, since others decide
ROUGH = 16  # images
BATCHES, BATCHES_AGREE = (1, 4, 16), 0.02  # largest difference of p between batches, in any of which it may be run
ROUNDS = 3  # of timing


@dataclass(frozen=True)
class LowPrecisionFile:
    """A member's fp32 file, the second file in the making, and what runs that.

    In a search CUDA runs files for TensorRT: it rounds as they say, and builds no engine, which takes minutes.
    """

    name: str
    source: Path
    target: Path
    preprocess_config: PreprocessConfig
    setting: RuntimeConfig

    def runner(self, batch: int | None = None) -> Runner:
        """The second file as it is now."""
        setting = replace(self.trial, batch=batch or self.setting.batch)
        return runtime.open_runner(self.name, self.target, self.preprocess_config, setting)

    @property
    def trial(self) -> RuntimeConfig:
        """What runs the second file in a search."""
        return replace(self.setting, runtime="cuda") if self.setting.runtime == "tensorrt" else self.setting

    @property
    def higher(self) -> str:
        """The precision of layers that are kept."""
        return "fp16" if (self.setting.runtime, self.setting.precision) == ("tensorrt", "int8") else "fp32"


def add(
    folder: Path,
    name: str,
    entry: Mapping[str, Any],
    settings: Sequence[RuntimeConfig],
    training: Training | None,
    log: Log,
) -> dict[str, Any]:
    """The entry with those second files that `settings` run and it lacks; int8 needs training images."""
    extended = dict(entry)
    # of several runtimes the last, OpenVINO where it is installed
    wanted = {kind: setting for setting in settings if (kind := bundle.second_file(setting))}
    for kind, setting in wanted.items():
        int8 = setting.precision == "int8"
        if kind in entry or (int8 and training is None):
            continue
        file = f"members/{name}.{kind}.onnx"
        preprocess_config = PreprocessConfig.from_dict(entry["contract"])
        second = LowPrecisionFile(name, folder / entry["file"], folder / file, preprocess_config, setting)
        if int8 and not _open_layers(second):
            log(f"{name}: has no layers to quantize, and stays fp32")
            continue
        try:
            made = _make(second, training, log)
        except (ArtifactError, UnavailableError) as error:  # cannot be made, or cannot be run here
            log(f"{name}: stays fp32: {str(error).removeprefix(f'{name}: ')}")
            second.target.unlink(missing_ok=True)
            continue
        extended |= {kind: file, "made": {**extended.get("made", {}), kind: made}}
    return extended


def drop(folder: Path, name: str, entry: Mapping[str, Any], used: Collection[tuple[str, str | None]]) -> dict[str, Any]:
    """The entry without the second files that nothing runs, which are removed; `used`: (member, precision)."""
    lost = [kind for kind in bundle.SECOND_FILES if kind in entry and (name, kind) not in used]
    for kind in lost:
        (folder / entry[kind]).unlink(missing_ok=True)
    made = {kind: value for kind, value in entry.get("made", {}).items() if kind not in lost}
    kept = {key: value for key, value in entry.items() if key not in (*lost, "made")}
    return {**kept, "made": made} if made else kept


def _make(second: LowPrecisionFile, training: Training | None, log: Log) -> dict[str, Any]:
    """Write the file; returns how it was made. Without training images nothing is compared, and no layer kept."""
    write = _writer(second, training, log)
    write((), False)
    layers = _open_layers(second)
    made: dict[str, Any] = {"layers": len(layers), "kept": []}
    if training is None:
        return made
    if second.setting.runtime == "tensorrt":
        log(f"{second.name}: building TensorRT engines of its files, to time them; that takes minutes")
    whole = _times_fp32(second)
    found = [] if _passes(second, training) else _search(second, layers, training, write, log)
    speed = _times_fp32(second) if found else whole
    made["kept"] = [layer.name for layer in found]
    what = (
        f"kept in {second.higher} {len(found)} of {len(layers)} layers: {join_limited(made['kept'])}; " if found else ""
    )
    cost = f" ({whole:.2f} with no layer kept)" if found else ""
    log(f"{second.name}: {what}{second.setting} runs {speed:.2f} times as fast as fp32{cost}")
    made["compared_on"] = len(training.comparison.labels)
    if second.setting.precision == "int8":
        made |= {"by": _quantizer(second), "calibrated_on": len(training.calibration.labels)}
    return {**made, "times_fp32": {"whole": whole, "made": speed}}


def _quantizer(second: LowPrecisionFile) -> str:
    from export.bundle.int8 import quantizer

    return quantizer(_symmetric(second))


def _symmetric(second: LowPrecisionFile) -> bool:
    return second.setting.runtime == "tensorrt"


def _writer(second: LowPrecisionFile, training: Training | None, log: Log) -> Write:
    if second.setting.precision == "fp16":
        from export.bundle.fp16 import write_half

        return lambda kept, roughly: write_half(second.source, second.target, kept)
    from export.bundle.int8 import write_int8

    if training is None:
        raise ValueError("int8 is calibrated by training images")
    samples = check_images.samples_of(training.calibration)
    pixels = samples.pixels(second.preprocess_config)
    log(f"{second.name}: quantizing with {_quantizer(second)}, by the ranges of its values on {samples.what}")
    few = pixels[:: max(1, len(pixels) // ROUGH)]
    head = _nodes(read_layers(second.source)[-1:])
    return lambda kept, roughly: write_int8(
        second.source, second.target, few if roughly else pixels, [*kept, *head], _symmetric(second)
    )


def _open_layers(second: LowPrecisionFile) -> list[Layer]:
    """Those that may change. In int8 the last stays fp32, which costs nothing: else logits would have 256 values."""
    layers = read_layers(second.source)
    return layers[:-1] if second.setting.precision == "int8" else layers


def _search(
    second: LowPrecisionFile, layers: Sequence[Layer], training: Training, write: Write, log: Log
) -> list[Layer]:
    """Rewrite the file with the fewest layers in fp32 that bring it within MARGIN; with none where most would not."""
    log(
        f"{second.name}: with all {len(layers)} layers in {second.setting.precision} {_told(second, training)}; "
        f"searching for layers to keep in {second.higher}"
    )
    pixels = check_images.samples(training.comparison).pixels(second.preprocess_config)
    exact = runtime.open_runner(second.name, second.source, second.preprocess_config, FP32).run(pixels)

    def harm(part: Sequence[Layer]) -> float:
        write(_nodes(layer for layer in layers if layer not in part), True)
        moved = float(np.abs(second.runner().run(pixels) - exact).mean())
        return moved if np.isfinite(moved) else np.inf

    def passes(kept: Sequence[Layer]) -> bool:
        write(_nodes(kept), False)
        return _passes(second, training)

    kept = (fewest(layers, harm, passes) if layers else None) or []
    write(_nodes(kept), False)
    if not kept:
        log(f"{second.name}: no part of its layers would rescue it; the certificate decides about it as it is")
    return kept


def _nodes(layers: Iterable[Layer]) -> list[str]:
    return [node for layer in layers for node in layer.nodes]


def _compare(second: LowPrecisionFile, training: Training) -> Change:
    """fp32 against the second file on training images; those that cannot be read are left out."""
    columns = [
        member_logits.column(second.name, second.source, second.preprocess_config, FP32),
        member_logits.column(second.name, second.target, second.preprocess_config, second.trial),
    ]
    logits, errors = member_logits.compute(training.comparison.files, columns, second.setting.precision)
    read = [row for row in range(len(logits)) if row not in errors]
    fp32, lower = logits[read].astype(np.float64).T
    return compare(fp32, lower, training.comparison.labels[read])


def _passes(second: LowPrecisionFile, training: Training) -> bool:
    """Written so that NaN does not."""
    change = _compare(second, training)
    close = abs(change.auroc) <= MARGIN * AUROC_LIMIT and change.flips <= MARGIN * FLIPS_LIMIT
    return close and _between_batches(second, training) <= BATCHES_AGREE


def _between_batches(second: LowPrecisionFile, training: Training) -> float:
    """Largest |p - p'| of the same images in other batches: OpenVINO's int8 products can be wrong in some.

    Seen with 2026.4 in products of 4 to 8 rows, which gave the same logit for every image.
    """
    pixels = check_images.samples(training.comparison).pixels(second.preprocess_config)
    batches = BATCHES if second.setting.runtime in ON_CPU else ()
    found = [second.runner(batch).run(pixels).astype(np.float64) for batch in (second.setting.batch, *batches)]
    return float(np.ptp(sigmoid(np.stack(found)), axis=0).max())


def _told(second: LowPrecisionFile, training: Training) -> str:
    change = _compare(second, training)
    if not np.isfinite(change.flips):
        return "logits are not finite"
    where = f"on {len(training.comparison.labels)} training images"
    return f"AUROC moves by {change.auroc:+.4f} and {change.flips:.2%} change sides {where}"


def _times_fp32(second: LowPrecisionFile) -> float:
    """How many times as fast as the fp32 file it runs, in the same runtime and batch; the best of a few rounds."""
    plain = RuntimeConfig(second.setting.runtime, batch=second.setting.batch)
    timers = [
        autotune.timer(runtime.open_runner(second.name, file, second.preprocess_config, setting), setting)
        for file, setting in ((second.source, plain), (second.target, second.setting))
    ]
    rounds = [[once() for once in timers] for _ in range(ROUNDS)]
    before, after = (min(each[place] for each in rounds) for place in range(2))
    return before / after
