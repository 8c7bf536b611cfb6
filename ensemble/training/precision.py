"""Number format (fp32, bf16, fp16), memory layout and memory allocation of training.

The measurements behind the choices are in bench/results/training_speed_notes.txt.
"""

import copy
import ctypes
import platform
import statistics
import time

import torch
from torch import nn

from ensemble.core import answer_cache, artifacts
from ensemble.core.errors import UnavailableError
from ensemble.core.recipe import Train
from ensemble.models.backbone import Member

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
BF16_ON_CPU = ("amx_bf16", "avx512_bf16")  # torch.cpu.get_capabilities
MIN_BF16_SPEEDUP = 1.1  # bf16 is less exact, so it is chosen only if it is this much faster
TRIAL_IMAGES, TRIALS = 4, 3

CACHE_FILE = "tuned.json"


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory for the next step, instead of returning it to the system; whether that was done.

    For the whole process; glibc only. EfficientNet and MobileNet train up to 1.5 times as fast.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def prefers_channels_last(network: nn.Module) -> bool:
    """Whether a network is convolutional: some kernel is larger than its stride, unlike kernels that cut patches."""
    return any(
        size > step
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
        for size, step in zip(module.kernel_size, module.stride, strict=True)
    )


def choose_precision_and_layout(member: Member, train: Train, device: str) -> tuple[str, bool]:
    """(precision, channels last) of a training on cpu or cuda: the recipe's, or what suits network and machine."""
    layout = prefers_channels_last(member.backbone) if train.channels_last is None else train.channels_last
    return choose_precision(member, train, device), layout


def choose_precision(member: Member, train: Train, device: str) -> str:
    """fp32, bf16 or fp16 for `train.precision` on cpu or cuda; `auto` takes what trains fastest here.

    A CPU with bf16 instructions is timed once for each network and the answer stored in the user's cache, so that a
    repeated run decides alike. Raises UnavailableError for a precision that the device does not support.
    """
    check_precision(train.precision, device)
    if train.precision != "auto":
        return train.precision
    capable = _bf16_capable(device)
    if device == "cuda":
        return "bf16" if capable else "fp16"
    return _timed_precision(member) if capable else "fp32"


def check_precision(precision: str, device: str) -> None:
    """UnavailableError, with what to use instead, for a precision that this machine's cpu or cuda does not support."""
    capable = _bf16_capable(device)
    if precision == "fp16" and device == "cpu":
        other = "bf16" if capable else "fp32"
        raise UnavailableError(f"train.precision fp16 needs a GPU; set it to {other}, or auto")
    if precision == "bf16" and not capable:
        where, other = ("CPU", "fp32") if device == "cpu" else ("GPU", "fp16")
        raise UnavailableError(
            f"train.precision bf16: this {where} does not compute in bf16; set it to {other}, or auto"
        )


def trial_seconds(member: Member, half: bool) -> float:
    """Wall seconds of one forward and backward pass on random images, under bf16 autocast if `half`.

    Changes the member's gradients and normalisation statistics, and draws from torch's generator.
    """
    size = member.preprocess_config.size
    pixels = torch.randint(0, 256, (TRIAL_IMAGES, size, size, 3), dtype=torch.uint8)
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = member(pixels).sum()
    loss.backward()
    return time.perf_counter() - started


def _bf16_capable(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BF16_ON_CPU)


def _timed_precision(member: Member) -> str:
    """The cached answer for this network on this machine, or one found now on a copy of it."""
    key = _key(member)
    if (known := answer_cache.get(CACHE_FILE, key)) in ("fp32", "bf16"):
        return str(known)
    trial = copy.deepcopy(member).train()
    with torch.random.fork_rng(devices=[]):  # a run draws the same numbers, timed or not
        trial_seconds(trial, False), trial_seconds(trial, True)  # the first passes set up
        pairs = [(trial_seconds(trial, False), trial_seconds(trial, True)) for _ in range(TRIALS)]
    fp32, bf16 = (statistics.median(column) for column in zip(*pairs, strict=True))
    answer = "bf16" if fp32 >= MIN_BF16_SPEEDUP * bf16 else "fp32"
    answer_cache.put(CACHE_FILE, key, answer)
    return answer


def _key(member: Member) -> str:
    """The cache key: processor, threads, torch, and the network with its input size."""
    network = member.backbone
    parameters = [[name, list(p.shape), p.requires_grad] for name, p in network.named_parameters()]
    processor = torch.cpu.get_capabilities().get("cpu_name")
    version, threads = torch.__version__, torch.get_num_threads()
    kind, digest, size = type(network).__name__, artifacts.json_sha256(parameters)[:16], member.preprocess_config.size
    return f"precision of {kind} {digest} at {size}: {processor}, {threads} threads, torch {version}"
