"""How fast a bundle is on this machine: each member, preparing pixels, end to end, beside ONNX Runtime in turn.

What an image takes of each member and of preparing its pixels, measured on this machine.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.core.log import Log
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.data import dataset
from ensemble.data.inputs import read_inputs
from ensemble.images import decode, preprocess
from ensemble.images.decode import ImageSource
from ensemble.models.runner import Runner, chunk_rows, score_stream
from ensemble.stacking.frontier import Costs
from export.inference.plan import PlannedMember, device_of, open_member, plan_bundle
from export.runtimes import autotune, capabilities
from export.runtimes.autotune import timer
from export.runtimes.libraries import load_openvino, openvino_core
from export.runtimes.openvino_session import TYPES
from export.runtimes.settings import ON_GPU, RuntimeConfig, RuntimeOptions

ROUNDS = 5
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is the roof
FEWEST, MOST, SECONDS = 8, 256, 6.0  # images end to end: as many as ONNX Runtime scores in that time
PEER_BATCH = 8

Progress = Callable[[int], object]


def measure_members(
    plan: Sequence[PlannedMember], log: Log, progress: Progress
) -> tuple[list[Runner], list[dict[str, Any]]]:
    """The members ready to run, and a row for each; members take turns, times are medians of ROUNDS."""
    runners = [open_member(member, log) for member in plan]
    timers = [timer(runner, member.setting) for runner, member in zip(runners, plan, strict=True)]
    times = [_step(lambda: [each() for each in timers], progress) for _ in range(ROUNDS)]
    roofs = {member.setting: roof(member.setting) for member in plan}
    rows = []
    for member, taken in zip(plan, np.median(times, axis=0).tolist(), strict=True):
        setting, peak = member.setting, roofs[member.setting]
        rows.append(
            {
                "member": member.name,
                "runtime": setting.runtime,
                "precision": setting.precision,
                "batch": setting.batch,
                "streams": setting.streams,
                "ms": taken * member.preprocess_config.count * 1e3,
                "images_per_second": 1 / (taken * member.preprocess_config.count),
                "gflop": member.gflop * member.preprocess_config.count or None,
                "share_of_roof": member.gflop / taken / peak if member.gflop and peak else None,
                "roof_gflops": peak,
            }
        )
    return runners, rows


def roof(setting: RuntimeConfig) -> float | None:
    """GFLOP a second of a large square matrix product where and in what the setting computes; None if unknown."""
    product = _gpu_product(setting) if setting.runtime in ON_GPU else _cpu_product(setting)
    if product is None:
        return None
    product()
    side = SIDE["cuda" if setting.runtime in ON_GPU else "cpu"]
    return 2 * side**3 / 1e9 / statistics.median(seconds(product) for _ in range(ROUNDS))


def end_to_end(
    folder: Path,
    device: str,
    full: bool,
    runners: Sequence[Runner],
    sources: Sequence[decode.ImageSource],
    progress: Progress,
) -> dict[str, Any]:
    """Images a second of a bundle, of preparing their pixels alone, and of ONNX Runtime in turn, alternating."""
    peer = RuntimeOptions("cuda" if device == "cuda" else "onnxruntime", "fp32", batch=PEER_BATCH, full=full)
    peers = [open_member(member, lambda line: None) for member in plan_bundle(folder, peer, lambda line: None).members]
    idlers = [idle(runner.preprocess_config) for runner in runners]
    in_turn(sources[:1], peers)
    pace = seconds(lambda: in_turn(sources[:1], peers))
    count = int(min(MOST, max(FEWEST, SECONDS / pace)))
    chosen = [sources[number % len(sources)] for number in range(count)]
    ways: Mapping[str, Callable[[], object]] = {
        "bundle": lambda: score(chosen, runners, device),
        "preparing": lambda: score(chosen, idlers, device),
        "onnxruntime_in_turn": lambda: in_turn(chosen, peers),
    }
    rounds = [
        {name: _step(lambda way=way: seconds(way), progress) for name, way in ways.items()}  # type: ignore[misc]
        for _ in range(ROUNDS)
    ]
    speeds = {name: count / statistics.median(each[name] for each in rounds) for name in ways}
    ratio = statistics.median(each["onnxruntime_in_turn"] / each["bundle"] for each in rounds)
    return {"images": count, "different_images": min(count, len(sources)), **speeds, "ratio": ratio}


def in_turn(sources: Sequence[decode.ImageSource], runners: Sequence[Runner]) -> None:
    """What one writes with ONNX Runtime alone: for each member, batch by batch, read, decode, resize, run."""
    for runner in runners:
        for start in range(0, len(sources), PEER_BATCH):
            batch = sources[start : start + PEER_BATCH]
            runner.run(
                np.concatenate([preprocess.to_pixels(decode.decode(each), runner.preprocess_config) for each in batch])
            )


def write_photographs(folder: Path, count: int = 32) -> list[Path]:
    """JPEGs of 512 x 384 that cost what photographs do: noise of every scale, from large shapes to grain."""
    from PIL import Image

    rng = np.random.default_rng(0)
    files = [folder / f"{number:02}.jpg" for number in range(count)]
    for file in files:
        layers = [
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (3 * scale, 4 * scale, 3), dtype=np.uint8)).resize((512, 384)),
                dtype=np.float32,
            )
            / scale**0.5
            for scale in (1, 4, 16, 64)
        ]
        picture = np.sum(layers, axis=0) / sum(scale**-0.5 for scale in (1, 4, 16, 64))
        Image.fromarray(picture.astype(np.uint8)).save(file, quality=90)
    return files


def pictures(source: Path | None, run: Path | None, place: Path) -> tuple[Sequence[decode.ImageSource], str]:
    """Images to score and what they are: those given, the run's held-out images, or generated ones in `place`."""
    if source is not None:
        inputs = read_inputs(source)
        return [item.source for item in inputs.items(0, min(MOST, inputs.count))], str(source)
    if run is not None and artifacts.dataset_path(run).is_file():
        frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
        held = dataset.files(frame[frame["split"] == "heldout"].head(MOST))
        if held and all(file.is_file() for file in held):
            return held, "the run's held-out images"
    return write_photographs(place), "generated JPEGs of 512 x 384"


def idle(preprocess_config: PreprocessConfig) -> Runner:
    """A member for which pixels are prepared, and which does nothing with them."""
    return Runner("idle", preprocess_config, lambda pixels: np.zeros(len(pixels), np.float32))


def score(sources: Sequence[decode.ImageSource], runners: Sequence[Runner], device: str) -> None:
    """As `infer` does, without a cascade; ArtifactError for an image that cannot be read, which would take no time."""
    chunk = chunk_rows([runner.preprocess_config for runner in runners], device)
    stream = score_stream(
        sources, lambda source, large: decode.decode(source, None, large), runners, chunk, together=device == "cuda"
    )
    for scored in stream:
        for error in scored.errors.values():
            raise ArtifactError(f"{error}; time on images that can be read: give others with --images")


def _cpu_product(setting: RuntimeConfig) -> Callable[[], object] | None:
    matrix = np.random.default_rng(0).random((SIDE["cpu"], SIDE["cpu"]), dtype=np.float32)
    try:
        openvino = load_openvino()
    except ImportError:
        return lambda: matrix @ matrix
    given = openvino.opset13.parameter(matrix.shape, np.float32)
    model = openvino.Model([openvino.opset13.matmul(given, openvino.opset13.constant(matrix), False, False)], [given])
    options = {"INFERENCE_PRECISION_HINT": TYPES[setting.precision], "INFERENCE_NUM_THREADS": str(setting.threads)}
    request = openvino_core().compile_model(model, "CPU", options).create_infer_request()
    return lambda: request.infer([matrix], share_inputs=True, share_outputs=True)


def _gpu_product(setting: RuntimeConfig) -> Callable[[], object] | None:
    """By torch, where it is installed for this GPU; ONNX Runtime alone has no product to offer."""
    if find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    matrix = torch.rand((SIDE["cuda"], SIDE["cuda"]), dtype=kinds[setting.precision], device="cuda")

    def product() -> None:
        matrix @ matrix
        torch.cuda.synchronize()

    return product


def seconds(call: Callable[[], object]) -> float:
    """That one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _step(call: Callable[[], Any], progress: Progress) -> Any:
    found = call()
    progress(1)
    return found


IMAGES, COST_ROUNDS = 64, 5


def measure(plans: Mapping[str, Sequence[PlannedMember]], sources: Sequence[ImageSource], log: Log) -> Costs:
    """Costs on these images. plans: the same members at each precision; members are remembered, as `--tune` is."""
    (*_, plan) = plans.values()
    device = device_of(plan)
    views = list({member.preprocess_config.view: member.preprocess_config for member in plan}.values())
    places = {preprocess_config.view: place for place, preprocess_config in enumerate(views)}
    with tqdm(total=sum(map(len, plans.values())) + COST_ROUNDS, desc="timing", leave=False, disable=None) as bar:
        decode, *more = _pixels(views, sources, device, bar.update)
        members = {precision: _members(each, log, bar.update) for precision, each in plans.items()}
    return Costs(
        decode,
        tuple(max(taken - decode, 0.0) for taken in more),
        {member.name: places[member.preprocess_config.view] for member in plan},
        members,
        {precision: _lower(each) for precision, each in plans.items()},
        overlap=device == "cuda",
    )


def _members(plan: Sequence[PlannedMember], log: Log, progress: Callable[[int], object]) -> dict[str, float]:
    machine, found = capabilities.available(), {}
    for member in plan:  # one at a time: together they might not fit into memory
        runner = open_member(member, log)
        found[member.name] = 1000 * autotune.seconds_per_image(runner, member.setting, member.sha256, machine)
        progress(1)
    return found


def _pixels(
    views: Sequence[PreprocessConfig], sources: Sequence[ImageSource], device: str, progress: Callable[[int], object]
) -> list[float]:
    """Milliseconds an image: to decode it, then to decode it and prepare each view; medians of rounds in turn."""
    drawn = list(islice(cycle(sources), IMAGES))
    ways = [[], *([idle(view)] for view in views)]
    rounds = []
    for _ in range(COST_ROUNDS):
        rounds.append([seconds(lambda way=way: score(drawn, way, device)) for way in ways])  # type: ignore[misc]
        progress(1)
    return [1000 * statistics.median(times) / IMAGES for times in zip(*rounds, strict=True)]


def _lower(plan: Sequence[PlannedMember]) -> frozenset[str]:
    return frozenset(member.name for member in plan if member.setting.precision != "fp32")
