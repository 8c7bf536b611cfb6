"""RuntimeConfig, how one member is run, and RuntimeOptions, what the user asked for. Light: no NumPy, no runtime."""

from dataclasses import dataclass

from ensemble.core.errors import UnavailableError

# torch runs a run's own members, the others its bundle; cuda and tensorrt are ONNX Runtime's providers
ON_CPU, ON_GPU = ("onnxruntime", "openvino"), ("cuda", "tensorrt")
RUNTIMES = ("torch", *ON_CPU, *ON_GPU)
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
TORCH_BATCH = 16  # images, unless the user asks for another number
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class RuntimeConfig:
    """How one member is run.

    batch: images that run together. streams: batches that run side by side, each on its share
    of the threads. threads: 0 means every core that this process may use.
    """

    runtime: str
    precision: str = "fp32"
    batch: int = 8
    streams: int = 1
    threads: int = 0

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision}"


def parse_config(text: str) -> RuntimeConfig:
    """The config of a runtime and precision as files name them, such as "openvino bf16"; ValueError for other text."""
    runtime, precision = text.split()
    return RuntimeConfig(runtime, precision)


@dataclass(frozen=True)
class RuntimeOptions:
    """What the user asked for; auto and None leave the choice to the machine.

    device: auto, cpu or cuda. tune: measure which config is fastest, and remember it.
    cascade: the loss in AUROC for which members may be left out of an image, above 0 and below
    0.5; None runs all. full: all members, whatever frontier chose for the bundle.
    """

    runtime: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    batch: int | None = None
    tune: bool = False
    cascade: float | None = None
    full: bool = False

    def __post_init__(self) -> None:
        known = {"runtime": ("auto", *RUNTIMES), "precision": ("auto", *PRECISIONS), "device": DEVICES}
        for kind, values in known.items():
            if (given := getattr(self, kind)) not in values:
                raise UnavailableError(f"there is no {kind} {given!r}; choose one of: {', '.join(values)}")
        if self.cascade is not None and not 0 < self.cascade < 0.5:
            raise UnavailableError(f"a cascade loses more than 0 and less than 0.5 of AUROC, not {self.cascade:g}")
        if self.device == "cuda" and self.runtime in ON_CPU:
            raise UnavailableError(f"{self.runtime} runs on the CPU; for the GPU use --runtime cuda or tensorrt")
        if self.device == "cpu" and self.runtime in ON_GPU:
            raise UnavailableError(f"{self.runtime} needs a GPU; leave out --device cpu, or use --runtime openvino")
