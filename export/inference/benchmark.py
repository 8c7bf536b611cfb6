"""Benchmark of a bundle on this machine: each member, preparing pixels, and end to end beside a sequential baseline.

`measure_costs` gives what one image takes, for the frontier of accuracy against speed.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ensemble.cascade.pareto import Costs
from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.core.log import Log, no_log
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.data import dataset
from ensemble.data.inputs import read_inputs
from ensemble.images import decode, preprocess
from ensemble.images.decode import ImageSource
from ensemble.models.runner import Runner, chunk_rows, score_stream
from export.inference.plan import PlannedMember, device_of, open_member, plan_bundle
from export.runtimes import autotune, capabilities
from export.runtimes.autotune import timer
from export.runtimes.libraries import load_openvino, openvino_core
from export.runtimes.openvino_session import TYPES
from export.runtimes.settings import ON_GPU, RuntimeConfig, RuntimeOptions

ROUNDS = 5  # in which all that is measured takes turns; times are medians over them
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product gives the peak
MIN_IMAGES, MAX_IMAGES = 8, 256  # that are scored end to end
BASELINE_SECONDS = 6.0  # of the sequential baseline in a round, which decides how many images there are
BASELINE_BATCH = 8
COST_IMAGES = 64  # on which decoding and preparing pixels are timed

Progress = Callable[[int], object]


def measure_members(
    plan: Sequence[PlannedMember], log: Log, progress: Progress
) -> tuple[list[Runner], list[dict[str, Any]]]:
    """The members ready to run, and a row of results for each, JSON-ready."""
    runners = [open_member(member, log) for member in plan]
    timers = [timer(runner, member.setting) for runner, member in zip(runners, plan, strict=True)]
    times = time_in_turns(timers, progress)
    peaks = {member.setting: peak_gflops(member.setting) for member in plan}
    rows = []
    for member, seconds in zip(plan, np.median(times, axis=0).tolist(), strict=True):
        setting, peak, views = member.setting, peaks[member.setting], member.preprocess_config.count
        rows.append(
            {
                "member": member.name,
                "runtime": setting.runtime,
                "precision": setting.precision,
                "batch": setting.batch,
                "streams": setting.streams,
                "ms": seconds * views * 1e3,
                "images_per_second": 1 / (seconds * views),
                "gflop": member.gflop * views or None,
                "share_of_roof": member.gflop / seconds / peak if member.gflop and peak else None,
                "roof_gflops": peak,
            }
        )
    return runners, rows


def peak_gflops(setting: RuntimeConfig) -> float | None:
    """GFLOP a second of a large square matrix product with the setting; None if it cannot be measured."""
    on_gpu = setting.runtime in ON_GPU
    product = _gpu_product(setting) if on_gpu else _cpu_product(setting)
    if product is None:
        return None
    product()
    side = MATRIX_SIDE["cuda" if on_gpu else "cpu"]
    return 2 * side**3 / 1e9 / statistics.median(call_seconds(product) for _ in range(ROUNDS))


def end_to_end(
    folder: Path,
    device: str,
    full: bool,
    runners: Sequence[Runner],
    sources: Sequence[ImageSource],
    progress: Progress,
) -> dict[str, Any]:
    """Images a second of a bundle, of preparing their pixels alone, and of the sequential baseline; JSON-ready."""
    options = RuntimeOptions("cuda" if device == "cuda" else "onnxruntime", "fp32", batch=BASELINE_BATCH, full=full)
    baseline = [open_member(member, no_log) for member in plan_bundle(folder, options, no_log).members]
    noops = [noop_runner(runner.preprocess_config) for runner in runners]
    sequential_baseline(sources[:1], baseline)
    image_seconds = call_seconds(lambda: sequential_baseline(sources[:1], baseline))
    count = int(min(MAX_IMAGES, max(MIN_IMAGES, BASELINE_SECONDS / image_seconds)))
    chosen = [sources[number % len(sources)] for number in range(count)]
    calls: dict[str, Callable[[], object]] = {
        "bundle": partial(score_images, chosen, runners, device),
        "preparing": partial(score_images, chosen, noops, device),
        "onnxruntime_in_turn": partial(sequential_baseline, chosen, baseline),
    }
    seconds = time_in_turns([partial(call_seconds, call) for call in calls.values()], progress)
    speeds = dict(zip(calls, (count / np.median(seconds, axis=0)).tolist(), strict=True))
    ratio = float(np.median(seconds[:, 2] / seconds[:, 0]))
    return {"images": count, "different_images": min(count, len(sources)), **speeds, "ratio": ratio}


def sequential_baseline(sources: Sequence[ImageSource], runners: Sequence[Runner]) -> None:
    """What one writes with ONNX Runtime alone: for each member, batch by batch, read, decode, resize, run."""
    for runner in runners:
        for start in range(0, len(sources), BASELINE_BATCH):
            batch = [decode.decode(source) for source in sources[start : start + BASELINE_BATCH]]
            runner.run(np.concatenate([preprocess.to_pixels(image, runner.preprocess_config) for image in batch]))


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


def benchmark_images(source: Path | None, run: Path | None, folder: Path) -> tuple[Sequence[ImageSource], str]:
    """Images to score, and what they are: those of `source`, the run's held-out images, or generated in `folder`."""
    if source is not None:
        inputs = read_inputs(source)
        return [item.source for item in inputs.items(0, min(MAX_IMAGES, inputs.count))], str(source)
    if run is not None and artifacts.dataset_path(run).is_file():
        frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
        heldout = dataset.files(frame[frame["split"] == "heldout"].head(MAX_IMAGES))
        if heldout and all(file.is_file() for file in heldout):
            return heldout, "the run's held-out images"
    return write_photographs(folder), "generated JPEGs of 512 x 384"


def noop_runner(preprocess_config: PreprocessConfig) -> Runner:
    """A member whose pixels are prepared, and which does nothing with them."""
    return Runner("noop", preprocess_config, lambda pixels: np.zeros(len(pixels), np.float32))


def score_images(sources: Sequence[ImageSource], runners: Sequence[Runner], device: str) -> None:
    """Score as `infer` does, without a cascade; ArtifactError for an image that cannot be read, which takes no time."""
    chunk = chunk_rows([runner.preprocess_config for runner in runners], device)
    stream = score_stream(
        sources, lambda source, large: decode.decode(source, None, large), runners, chunk, together=device == "cuda"
    )
    for scored in stream:
        for error in scored.errors.values():
            raise ArtifactError(f"{error}; time on images that can be read: give others with --images")


def _cpu_product(setting: RuntimeConfig) -> Callable[[], object] | None:
    matrix = np.random.default_rng(0).random((MATRIX_SIDE["cpu"], MATRIX_SIDE["cpu"]), dtype=np.float32)
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
    """A product by torch, where it is installed for this GPU; ONNX Runtime has none of its own."""
    if find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    matrix = torch.rand((MATRIX_SIDE["cuda"], MATRIX_SIDE["cuda"]), dtype=dtypes[setting.precision], device="cuda")

    def product() -> None:
        matrix @ matrix
        torch.cuda.synchronize()

    return product


def time_in_turns(timers: Sequence[Callable[[], float]], progress: Progress) -> np.ndarray:
    """The seconds that the timers return, [ROUNDS, timers]: in each round all take turns."""
    seconds = np.empty((ROUNDS, len(timers)))
    for position in np.ndindex(seconds.shape):
        seconds[position] = timers[position[1]]()
        progress(1)
    return seconds


def call_seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_costs(plans: Mapping[str, Sequence[PlannedMember]], sources: Sequence[ImageSource], log: Log) -> Costs:
    """What one of these images takes. plans: the same members at each precision, whose times are cached."""
    (*_, plan) = plans.values()
    device = device_of(plan)
    views = list({member.preprocess_config.view: member.preprocess_config for member in plan}.values())
    positions = {config.view: position for position, config in enumerate(views)}
    timings = sum(map(len, plans.values())) + ROUNDS * (1 + len(views))
    with tqdm(total=timings, desc="timing", leave=False, disable=None) as bar:
        decoding, *preparing = _pixel_milliseconds(views, sources, device, bar.update)
        machine = capabilities.available()
        members: dict[str, dict[str, float]] = {precision: {} for precision in plans}
        for precision, each in plans.items():
            for member in each:  # one at a time: together they might not fit into memory
                seconds = autotune.seconds_per_image(open_member(member, log), member.setting, member.sha256, machine)
                members[precision][member.name] = 1000 * seconds
                bar.update()
    return Costs(
        decoding,
        tuple(max(milliseconds - decoding, 0.0) for milliseconds in preparing),
        {member.name: positions[member.preprocess_config.view] for member in plan},
        members,
        {name: frozenset(m.name for m in each if m.setting.precision != "fp32") for name, each in plans.items()},
        overlap=device == "cuda",
    )


def _pixel_milliseconds(
    views: Sequence[PreprocessConfig], sources: Sequence[ImageSource], device: str, progress: Progress
) -> list[float]:
    """Milliseconds an image: to decode it alone, then to decode it and prepare each view."""
    images = list(islice(cycle(sources), COST_IMAGES))
    noops = [[], *([noop_runner(view)] for view in views)]
    timers = [partial(call_seconds, partial(score_images, images, runners, device)) for runners in noops]
    return [1000 * seconds / COST_IMAGES for seconds in np.median(time_in_turns(timers, progress), axis=0).tolist()]
