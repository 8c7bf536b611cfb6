import pytest

from ensemble.core.errors import UnavailableError
from export.runtimes.capabilities import Machine
from export.runtimes.runtime_selection import certified_alternatives, choose_configs
from export.runtimes.settings import PRECISIONS, RUNTIMES, RuntimeConfig, RuntimeOptions

NO_GPU = "no NVIDIA GPU was found; use --device cpu, or check the driver with nvidia-smi"
CPU_FP32 = {("onnxruntime", precision): "its CPU provider computes in fp32" for precision in ("bf16", "fp16")}
NO_INT8 = {(runtime, "int8"): "this CPU has no int8" for runtime in ("onnxruntime", "openvino")}
NO_BF16 = {("openvino", "bf16"): "this CPU has no bf16; use --precision fp32"}
NO_FP16 = {("openvino", "fp16"): "this CPU has no fp16; use --precision fp32"}
WITHOUT_GPU = {(runtime, precision): NO_GPU for runtime in ("cuda", "tensorrt") for precision in PRECISIONS}
NO_OPENVINO = {("openvino", precision): "OpenVINO is not installed; use it not" for precision in PRECISIONS}
NO_TENSORRT = {("tensorrt", precision): "TensorRT is not installed; run: pip" for precision in PRECISIONS}
CUDA_BF16 = {("cuda", "bf16"): "ONNX Runtime's CUDA provider runs fp32 and fp16; use --precision fp16"}

OLD = Machine("AMD EPYC", 2, "", WITHOUT_GPU | CPU_FP32 | NO_INT8 | NO_BF16 | NO_FP16)
VNNI = Machine("Xeon", 2, "", WITHOUT_GPU | CPU_FP32 | NO_BF16 | NO_FP16)
AMX = Machine("Xeon", 16, "", WITHOUT_GPU | CPU_FP32 | NO_FP16)
BARE = Machine("POWER", 4, "", WITHOUT_GPU | CPU_FP32 | NO_INT8 | NO_OPENVINO)
H100 = Machine("Xeon", 16, "NVIDIA H100", CPU_FP32 | NO_FP16 | CUDA_BF16)
NO_TRT = Machine("Xeon", 16, "NVIDIA H100", CPU_FP32 | NO_FP16 | CUDA_BF16 | NO_TENSORRT)

ENTRIES = {"big": {"gflop": 111.0}, "small": {"gflop": 9.0}}
BOTH, SMALL = frozenset(ENTRIES), frozenset({"small"})
BF16, FP16, INT8 = ("openvino", "bf16"), ("cuda", "fp16"), ("openvino", "int8")
GET_ONE = "the bundle has no certificate for it; get one: python cli.py export --certify-on DATA"
FASTER_INT8 = "which is faster, but the bundle has no certificate for it; get one: python cli.py export --int8"


@pytest.mark.parametrize(
    ("machine", "wanted", "allowed", "runtime", "precisions", "lines"),
    [
        (OLD, {}, {}, "openvino", "fp32 fp32", ["openvino fp32 on 2 cores of AMD EPYC: this CPU has no bf16"]),
        (
            OLD,
            {},
            {BF16: BOTH},
            "openvino",
            "fp32 fp32",
            ["openvino fp32 on 2 cores of AMD EPYC: this CPU has no bf16"],
        ),
        (AMX, {}, {BF16: BOTH}, "openvino", "bf16 bf16", ["openvino bf16 on 16 cores of Xeon: certified"]),
        (AMX, {"precision": "fp32"}, {BF16: BOTH}, "openvino", "fp32 fp32", ["openvino fp32 on 16 cores of Xeon"]),
        (
            AMX,
            {},
            {("tensorrt", "bf16"): BOTH},
            "openvino",
            "fp32 fp32",
            [f"openvino fp32 on 16 cores of Xeon: this CPU also computes in bf16, which is faster, but {GET_ONE}"],
        ),
        (
            AMX,
            {},
            {BF16: SMALL},
            "openvino",
            "fp32 bf16",
            ["openvino fp32 and bf16 on 16 cores of Xeon: certified", "fp32, for want of a certificate: big"],
        ),
        (
            BARE,
            {},
            {BF16: BOTH},
            "onnxruntime",
            "fp32 fp32",
            ["onnxruntime fp32 on 4 cores of POWER: OpenVINO is not installed"],
        ),
        (
            AMX,
            {"runtime": "onnxruntime"},
            {BF16: BOTH},
            "onnxruntime",
            "fp32 fp32",
            ["onnxruntime fp32 on 16 cores of Xeon: as chosen"],
        ),
        (VNNI, {}, {INT8: BOTH}, "openvino", "int8 int8", ["openvino int8 on 2 cores of Xeon: certified"]),
        (
            VNNI,
            {"runtime": "onnxruntime"},
            {("onnxruntime", "int8"): BOTH},
            "onnxruntime",
            "fp32 fp32",
            ["onnxruntime fp32 on 2 cores of Xeon: as chosen"],  # often slower there: only tuning takes it
        ),
        (
            VNNI,
            {},
            {},
            "openvino",
            "fp32 fp32",
            [f"openvino fp32 on 2 cores of Xeon: this CPU also computes in int8, {FASTER_INT8}"],
        ),
        (AMX, {}, {BF16: BOTH, INT8: BOTH}, "openvino", "bf16 bf16", ["openvino bf16 on 16 cores of Xeon: certified"]),
        (AMX, {}, {BF16: SMALL, INT8: BOTH}, "openvino", "int8 int8", ["openvino int8 on 16 cores of Xeon: certified"]),
        (H100, {}, {("tensorrt", "fp16"): BOTH}, "tensorrt", "fp16 fp16", ["tensorrt fp16 on NVIDIA H100: certified"]),
        (H100, {}, {("tensorrt", "bf16"): BOTH}, "tensorrt", "bf16 bf16", ["tensorrt bf16 on NVIDIA H100: certified"]),
        (
            NO_TRT,
            {},
            {FP16: BOTH},
            "cuda",
            "fp16 fp16",
            ["cuda fp16 on NVIDIA H100: TensorRT is not installed; certified"],
        ),
        (
            NO_TRT,
            {"device": "cuda"},
            {FP16: BOTH},
            "cuda",
            "fp16 fp16",
            ["cuda fp16 on NVIDIA H100: TensorRT is not installed; certified"],
        ),
        (
            NO_TRT,
            {"runtime": "cuda"},
            {},
            "cuda",
            "fp32 fp32",
            [f"cuda fp32 on NVIDIA H100: as chosen; this GPU also computes in fp16, which is faster, but {GET_ONE}"],
        ),
        (
            H100,
            {"device": "cpu"},
            {BF16: BOTH},
            "openvino",
            "bf16 bf16",
            ["openvino bf16 on 16 cores of Xeon: certified"],
        ),
        (
            H100,
            {"runtime": "openvino"},
            {BF16: BOTH},
            "openvino",
            "bf16 bf16",
            ["openvino bf16 on 16 cores of Xeon: as chosen; certified"],
        ),
    ],
)
def test_auto_takes_what_the_machine_can_do_and_the_certificate_allows(
    machine, wanted, allowed, runtime, precisions, lines
):
    settings, told = choose_configs(ENTRIES, allowed, RuntimeOptions(**wanted), machine)
    assert told == lines
    assert {name: (each.runtime, each.precision) for name, each in settings.items()} == {
        name: (runtime, precision) for name, precision in zip(ENTRIES, precisions.split(), strict=True)
    }


def test_large_members_take_all_cores_at_once_and_small_ones_run_side_by_side():
    settings, _ = choose_configs(ENTRIES, {BF16: BOTH}, RuntimeOptions(), AMX)
    assert settings == {
        "big": RuntimeConfig("openvino", "bf16", batch=8, streams=1, threads=16),
        "small": RuntimeConfig("openvino", "bf16", batch=4, streams=4, threads=16),
    }
    asked, _ = choose_configs(ENTRIES, {}, RuntimeOptions(batch=3), AMX)
    assert [setting.batch for setting in asked.values()] == [3, 3]
    on_gpu, _ = choose_configs(ENTRIES, {}, RuntimeOptions(), H100)
    assert set(on_gpu.values()) == {RuntimeConfig("tensorrt", batch=64)}


@pytest.mark.parametrize(
    ("machine", "wanted", "allowed", "message"),
    [
        (OLD, {"device": "cuda"}, {}, f"cuda cannot run here: {NO_GPU}"),
        (OLD, {"runtime": "tensorrt"}, {}, f"tensorrt cannot run here: {NO_GPU}"),
        (NO_TRT, {"runtime": "tensorrt"}, {}, "tensorrt cannot run here: TensorRT is not installed; run: pip"),
        (BARE, {"runtime": "openvino"}, {}, "openvino cannot run here: OpenVINO is not installed; use it not"),
        (
            OLD,
            {"precision": "bf16"},
            {BF16: BOTH},
            "openvino cannot run bf16 here: this CPU has no bf16; use --precision fp32",
        ),
        (
            AMX,
            {"runtime": "onnxruntime", "precision": "bf16"},
            {BF16: BOTH},
            "onnxruntime cannot run bf16 here: its CPU provider computes in fp32",
        ),
        (
            AMX,
            {"precision": "bf16"},
            {BF16: SMALL},
            f"big may not run at openvino bf16: {GET_ONE}, or take the risk: python cli.py export --uncertified",
        ),
        (
            H100,
            {"precision": "fp16"},
            {FP16: BOTH},
            f"big, small may not run at tensorrt fp16: {GET_ONE}, or take the risk: python cli.py export --uncertified",
        ),
        (
            VNNI,
            {"precision": "int8"},
            {INT8: SMALL},
            "big may not run at openvino int8: the bundle has no certificate for it; get one: "
            "python cli.py export --int8, or take the risk: python cli.py export --int8 --uncertified",
        ),
        (
            AMX,
            {"runtime": "torch"},
            {},
            "--runtime torch runs a run's own members, not a bundle; leave out --onnx or --bundle, "
            "or choose another --runtime",
        ),
    ],
)
def test_what_cannot_or_may_not_run_is_refused_in_one_line(machine, wanted, allowed, message):
    with pytest.raises(UnavailableError) as caught:
        choose_configs(ENTRIES, allowed, RuntimeOptions(**wanted), machine)
    assert str(caught.value) == message


def test_a_precision_that_was_asked_for_and_is_certified_runs():
    settings, lines = choose_configs(ENTRIES, {BF16: BOTH}, RuntimeOptions(precision="bf16"), AMX)
    assert {setting.precision for setting in settings.values()} == {"bf16"}
    assert lines == ["openvino bf16 on 16 cores of Xeon"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"device": "cuda", "runtime": "openvino"},
            "openvino runs on the CPU; for the GPU use --runtime cuda or tensorrt",
        ),
        (
            {"device": "cuda", "runtime": "onnxruntime"},
            "onnxruntime runs on the CPU; for the GPU use --runtime cuda or",
        ),
        ({"device": "cpu", "runtime": "cuda"}, "cuda needs a GPU; leave out --device cpu, or use --runtime openvino"),
        ({"device": "cpu", "runtime": "tensorrt"}, "tensorrt needs a GPU; leave out --device cpu, or use --runtime"),
    ],
)
def test_a_device_and_a_runtime_that_exclude_each_other_are_wrong_use(wanted, message):
    with pytest.raises(UnavailableError, match=message):
        RuntimeOptions(**wanted)
    assert RuntimeOptions(**{key: value for key, value in wanted.items() if key == "runtime"}).runtime in RUNTIMES


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"device": "cuda:0"}, "there is no device 'cuda:0'; choose one of: auto, cpu, cuda"),
        (
            {"runtime": "onnx"},
            "there is no runtime 'onnx'; choose one of: auto, torch, onnxruntime, openvino, cuda, te",
        ),
        ({"precision": "FP32"}, "there is no precision 'FP32'; choose one of: auto, fp32, bf16, fp16, int8"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(wanted, message):
    with pytest.raises(UnavailableError, match=message):
        RuntimeOptions(**wanted)


def kinds_of(allowed, machine=VNNI, **wanted):
    return [
        [each.precision for each in one.values()]
        for one in certified_alternatives(ENTRIES, allowed, RuntimeOptions(**wanted), machine)
    ]


def test_tuning_has_every_precision_that_one_certificate_covers_to_choose_from():
    int8 = ("onnxruntime", "int8")
    assert kinds_of({BF16: BOTH, INT8: SMALL}, AMX) == [["bf16", "bf16"], ["fp32", "int8"]]
    assert kinds_of({int8: BOTH}, runtime="onnxruntime") == [["fp32", "fp32"], ["int8", "int8"]]
    assert kinds_of({INT8: BOTH}) == [["int8", "int8"]]
    assert kinds_of({BF16: BOTH, INT8: BOTH}, AMX, precision="bf16") == [["bf16", "bf16"]]
    assert kinds_of({("tensorrt", "fp16"): BOTH, ("tensorrt", "bf16"): BOTH}, H100) == [["fp16", "fp16"]]
