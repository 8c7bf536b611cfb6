import inspect
import subprocess
import sys

import pytest
import torch
from small_nets import QUICK

from ensemble.core.errors import UnavailableError
from ensemble.core.recipe import Train
from ensemble.models.backbone import build_member
from ensemble.training import precision

FAULTS = """
import ctypes, platform, resource
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.empty(64 << 20, np.uint8)[:: 1 << 12] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
print(int(keep_freed_memory()))
faults()
print(plain, faults())
"""


def train(precision="auto"):
    return Train(lr=1e-3, epochs=1, batch_size=2, precision=precision)


@pytest.fixture
def member():
    return build_member(QUICK["vit_small"], None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path))
    return tmp_path / "tuned.json"


@pytest.fixture
def with_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "a CPU", "amx_bf16": True})


@pytest.fixture
def without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "a CPU", "avx2": True})


def clock(fp32, bf16):
    return lambda _, half: bf16 if half else fp32


def never(*_):
    raise AssertionError("timed")


@pytest.fixture
def choose(monkeypatch):
    def call(member, train, device, seconds=never):
        monkeypatch.setattr(precision, "trial_seconds", seconds)
        return precision.choose_precision(member, train, device)

    return call


def test_freed_memory_is_faulted_in_again_until_it_is_kept():
    # the function by itself, in a new process, since it is for a whole process; importing its module takes seconds
    constants = f"M_TRIM_THRESHOLD, M_MMAP_MAX = {precision.M_TRIM_THRESHOLD}, {precision.M_MMAP_MAX}"
    code = f"{constants}\n{FAULTS.replace('def faults', inspect.getsource(precision.keep_freed_memory) + 'def faults')}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, plain, after = map(int, done.stdout.split())
    if not kept:
        pytest.skip("not glibc")
    assert plain > 100  # large pages fault less often
    assert after < plain / 10


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(precision.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(precision.ctypes, "CDLL", never)
    assert not precision.keep_freed_memory()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("efficientnet_lite0", True), ("mobilenet_v2", True), ("convnext_small", True),
        ("vit_small", False), ("swin_small", False), ("swinv2_small", False),
    ],
)  # fmt: skip
def test_convolutional_networks_prefer_channels_last(name, expected):
    recipe = QUICK[name]
    backbone = recipe.backbone.model_copy(update={"weights": None, "weights_match": "name"})
    member = build_member(recipe.model_copy(update={"backbone": backbone}), None)
    assert precision.prefers_channels_last(member) is expected


def test_a_cpu_without_bf16_trains_in_fp32_untimed(choose, member, cache, without_bf16):
    assert choose(member, train(), "cpu") == "fp32"
    assert not cache.exists()


@pytest.mark.parametrize(("bf16", "expected"), [(0.5, "bf16"), (0.9, "bf16"), (0.95, "fp32"), (20.0, "fp32")])
def test_bf16_on_a_cpu_must_win_by_a_tenth(choose, member, cache, with_bf16, bf16, expected):
    assert choose(member, train(), "cpu", clock(1.0, bf16)) == expected


def test_a_repeated_run_decides_alike_without_timing(choose, member, cache, with_bf16):
    assert choose(member, train(), "cpu", clock(1.0, 0.5)) == "bf16"
    assert choose(member, train(), "cpu") == "bf16"
    other = build_member(QUICK["convnext_small"], None)
    assert choose(other, train(), "cpu", clock(0.5, 1.0)) == "fp32"
    assert choose(member, train(), "cpu") == "bf16"
    cache.write_text("{")
    assert choose(member, train(), "cpu", clock(0.5, 1.0)) == "fp32"


@pytest.mark.parametrize("change", ["threads", "frozen"])
def test_another_job_is_timed_again(choose, member, cache, with_bf16, monkeypatch, change):
    choose(member, train(), "cpu", clock(1.0, 0.5))
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    else:
        next(member.parameters()).requires_grad_(False)
    assert choose(member, train(), "cpu", clock(0.5, 1.0)) == "fp32"


def test_timing_leaves_member_and_generator_as_they_were(choose, cache, with_bf16):
    backbone = QUICK["mobilenet_v2"].backbone.model_copy(update={"weights": None, "weights_match": "name"})
    image = QUICK["mobilenet_v2"].image.model_copy(update={"size": 32})
    member = build_member(QUICK["mobilenet_v2"].model_copy(update={"backbone": backbone, "image": image}), None)
    before = {name: value.clone() for name, value in member.state_dict().items()}
    state = torch.get_rng_state()
    calls, one_pass = [], precision.trial_seconds

    def counted(trial, half):
        calls.append(half)
        return one_pass(trial, half=False)  # bf16 is slow where it is emulated

    choose(member, train(), "cpu", counted)
    assert calls == [False, True] * 4
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in member.state_dict().items())
    assert all(parameter.grad is None for parameter in member.parameters())
    one_pass(member.train(), half=False)  # the member itself would have been changed
    assert any(not torch.equal(value, before[name]) for name, value in member.state_dict().items())


def test_what_is_asked_for_is_kept_where_it_exists(choose, member, cache, with_bf16):
    assert choose(member, train("bf16"), "cpu") == "bf16"
    assert choose(member, train("fp32"), "cpu") == "fp32"


@pytest.mark.parametrize(
    ("device", "name", "message"),
    [("cpu", "fp16", "needs a GPU; set it to fp32"), ("cpu", "bf16", "CPU .*set it to fp32"),
     ("cuda", "bf16", "GPU .*set it to fp16")],
)  # fmt: skip
def test_a_precision_that_is_not_here_says_what_to_use(
    choose, member, without_bf16, monkeypatch, device, name, message
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(UnavailableError, match=message):
        choose(member, train(name), device)


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_takes_bf16_where_it_can(choose, member, monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert choose(member, train(), "cuda") == expected
