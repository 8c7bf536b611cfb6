"""The sides of inference_speed.py, each in a process of its own that loads once and then runs when it is told to.

Started with a Job as JSON; each line on standard input is one pass over the files, answered by a line of JSON.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CANDIDATES = {"cpu": (1, 8), "cuda": (1, 32)}  # images a call, of which the faster is taken for each member
COMPILED_BATCH = 32
SIDE = 4096  # of the square matrices whose product is the roof
SHARE_IMAGES = {"cpu": 8, "cuda": 512}
Answer = dict[str, Any]
Pass = Callable[[], Answer]  # answers with `p`: name -> p(ai) of each file, or with `seconds` of its own


@dataclass(frozen=True)
class Job:
    """side: of SIDES; choice: what `ours` is asked for, RUNTIME[:BATCH], auto or tune."""

    side: str
    classifiers: dict[str, str]
    bundle: str
    photos: str
    device: str
    precision: str
    choice: str = ""

    @property
    def files(self) -> list[Path]:
        """The photographs."""
        return sorted(Path(self.photos).glob("*.jpg"))


def pipelines(job: Job) -> tuple[Pass, str]:
    """What users do: a pipeline a member, each reading the files itself."""
    import transformers

    files = [str(file) for file in job.files]
    made = {
        name: transformers.pipeline("image-classification", model=folder, device=job.device)
        for name, folder in job.classifiers.items()
    }

    def score(name: str, files: Sequence[str], batch: int) -> list[float]:
        found = [made[name](file) for file in files] if batch == 1 else made[name](list(files), batch_size=batch)
        return [next(each["score"] for each in scores if each["label"] == "ai") for scores in found]

    best = {name: _best_batch(lambda files, batch, name=name: score(name, files, batch), files, job) for name in made}
    kinds = sorted({type(pipe.image_processor).__name__ for pipe in made.values()})
    said = f"{_batches(best)}; {', '.join(kinds)}"
    return lambda: {"p": {name: score(name, files, best[name]) for name in made}}, said


def pil_pipelines(job: Job) -> tuple[Pass, str]:
    """The same with processors that resize by Pillow, as ours: for the agreement of the scores."""
    import transformers

    made = {}
    for name, folder in job.classifiers.items():
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        made[name] = transformers.pipeline(
            "image-classification", model=folder, image_processor=processor, device=job.device
        )

    def run() -> Answer:
        found = {name: [pipe(str(file)) for file in job.files[:4]] for name, pipe in made.items()}
        return {
            "p": {
                name: [next(each["score"] for each in scores if each["label"] == "ai") for scores in rows]
                for name, rows in found.items()
            }
        }

    return run, "one image a call"


def onnx_sessions(job: Job) -> tuple[Pass, str]:
    """ONNX Runtime fp32 sessions run in turn, pixels by transformers' processor: what optimum gives."""
    import full_size
    import transformers
    from PIL import Image

    from export.runtimes.libraries import load_onnxruntime

    onnxruntime = load_onnxruntime()
    providers = ["CUDAExecutionProvider"] if job.device == "cuda" else ["CPUExecutionProvider"]
    onnxruntime.preload_dlls() if job.device == "cuda" else None
    sessions, processors = {}, {}
    for name, folder in job.classifiers.items():
        sessions[name] = onnxruntime.InferenceSession(
            str(full_size.float_graph(Path(job.bundle), name)), providers=providers
        )
        if sessions[name].get_providers()[0] != providers[0]:
            raise RuntimeError(f"ONNX Runtime has no {providers[0]}")
        processors[name] = transformers.AutoImageProcessor.from_pretrained(folder)

    def score(name: str, files: Sequence[Path], batch: int) -> list[float]:
        logits = []
        [pixel_values] = sessions[name].get_inputs()
        for start in range(0, len(files), batch):
            images = [Image.open(file).convert("RGB") for file in files[start : start + batch]]
            pixels = processors[name](images, return_tensors="pt")["pixel_values"].numpy()
            logits.append(sessions[name].run(["logit"], {pixel_values.name: pixels})[0])
        return _sigmoid(np.concatenate(logits))

    best = {name: _best_batch(lambda f, b, name=name: score(name, f, b), job.files, job) for name in sessions}
    return lambda: {"p": {name: score(name, job.files, best[name]) for name in sessions}}, _batches(best)


def compiled(job: Job) -> tuple[Pass, str]:
    """torch.compile with our own decoding, weights and activations in the precision, a fixed batch."""
    import torch

    from ensemble.models import backbone, processor
    from ensemble.models import runner as score

    torch.set_float32_matmul_precision("high")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[job.precision]

    def runner(name: str, folder: Path) -> score.Runner:
        network, config = backbone.load_classifier(folder)
        preprocess_config = processor.from_checkpoint(folder, config)
        network = torch.compile(network.to(job.device, dtype).to(memory_format=torch.channels_last))
        mean, std = (
            torch.tensor(each, device=job.device).view(1, 3, 1, 1)
            for each in (preprocess_config.mean, preprocess_config.std)
        )

        def run(pixels: np.ndarray) -> np.ndarray:
            found = []
            with torch.inference_mode():
                for part in np.split(pixels, range(COMPILED_BATCH, len(pixels), COMPILED_BATCH)):
                    padded = np.zeros((COMPILED_BATCH, *part.shape[1:]), np.uint8)
                    padded[: len(part)] = part
                    x = torch.from_numpy(padded).to(job.device).permute(0, 3, 1, 2).float()
                    logits = network(pixel_values=((x / 255 - mean) / std).to(dtype)).logits.float()
                    found.append((logits[:, 1] - logits[:, 0])[: len(part)])
            return torch.cat(found).cpu().numpy()

        run(np.zeros((1, preprocess_config.size, preprocess_config.size, 3), np.uint8))  # compiles
        return score.Runner(name, preprocess_config, run)

    runners = [runner(name, Path(folder)) for name, folder in job.classifiers.items()]

    def run() -> Answer:
        logits, errors = score.score_images(job.files, runners)
        assert not errors, errors  # noqa: S101
        return {"p": {runner.name: _sigmoid(logits[:, column]) for column, runner in enumerate(runners)}}

    return run, f"{job.precision}, batch {COMPILED_BATCH}"


def ours(job: Job) -> tuple[Pass, str]:
    """`infer --bundle`, in process."""
    from ensemble.data.inputs import read_inputs
    from export.inference.infer import infer

    ensemble, said = _ensemble(job)

    def run() -> Answer:
        result, errors = infer(read_inputs(Path(job.photos)), ensemble, with_members=True)
        assert errors.empty, errors  # noqa: S101
        return {"p": {name: result[name].tolist() for name in ensemble.stacker.members}}

    run()  # what is set up once
    return run, said


def shares(job: Job) -> tuple[Pass, str]:
    """Our members alone, without decoding, and beside them the product of two square matrices."""
    import torch

    ensemble, said = _ensemble(job)
    count = SHARE_IMAGES[job.device]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[job.precision]
    left, right = torch.randn(2, SIDE, SIDE, dtype=dtype, device=job.device)
    draw = np.random.default_rng(0)

    def product() -> float:
        started, done = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < 0.5 or done < 2:
            (left @ right).sum().item()  # waits for a GPU
            done += 1
        return passed / done

    def run() -> Answer:
        seconds = {}
        for runner in ensemble.runners:
            size = runner.preprocess_config.size
            pixels = draw.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
            started = time.perf_counter()
            runner.run(pixels)
            seconds[runner.name] = (time.perf_counter() - started) / count
        return {"members": seconds, "roof": 2 * SIDE**3 / product() / 1e9}

    run()
    return run, said


SIDES = {
    "pipelines": pipelines,
    "pipelines pil": pil_pipelines,
    "onnxruntime": onnx_sessions,
    "compiled": compiled,
    "ours": ours,
    "shares": shares,
}


def _ensemble(job: Job) -> tuple[Any, str]:
    from export.inference.loading import load_bundle
    from export.runtimes.settings import RuntimeOptions

    lines: list[str] = []
    name, _, batch = job.choice.partition(":")
    runtime = "auto" if name == "tune" else name
    wanted = RuntimeOptions(runtime, job.precision, job.device, int(batch) if batch else None, tune=name == "tune")
    return load_bundle(Path(job.bundle), wanted, lines.append), "; ".join(lines)


def _best_batch(score: Callable[[Sequence[Any], int], object], files: Sequence[Any], job: Job) -> int:
    """The faster of CANDIDATES on as many files as the largest of them takes."""
    candidates = CANDIDATES[job.device]
    few = (list(files) * candidates[-1])[: candidates[-1]]
    score(few[:1], 1)
    seconds = {}
    for batch in candidates:
        started = time.perf_counter()
        score(few, batch)
        seconds[batch] = time.perf_counter() - started
    return min(seconds, key=lambda batch: seconds[batch])


def _batches(best: dict[str, int]) -> str:
    return "batch " + ", ".join(f"{batch} ({name})" for name, batch in best.items())


def _sigmoid(logits: np.ndarray) -> list[float]:
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).tolist()


def peak_mib() -> int:
    """This process's largest resident memory. Not ru_maxrss: a child inherits its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) // 1024


def serve(job: Job, requests: Iterator[str], answer: Callable[[Answer], object]) -> None:
    """Load, then a pass for each line."""
    started = time.perf_counter()
    run, said = SIDES[job.side](job)
    answer({"said": said, "loaded": time.perf_counter() - started})
    for _ in requests:
        started, worked = time.perf_counter(), time.process_time()
        found = run()
        took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
        answer({**took, "peak_mib": peak_mib(), **found})


def start(job: Job) -> list[str]:
    """The command of a side's process."""
    return [sys.executable, __file__, json.dumps(asdict(job))]


def main() -> None:
    warnings.simplefilter("ignore")
    # Libraries print what they like; the answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**json.loads(sys.argv[1]))

    def answer(values: Answer) -> None:
        channel.write(json.dumps(values) + "\n")
        channel.flush()

    serve(job, iter(sys.stdin.readline, ""), answer)


if __name__ == "__main__":
    main()
