"""What the exported graph is changed into has the same values, and tells nothing of the machine."""

import numpy as np
import onnxruntime
import pytest
from helpers import ROOT
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

from export.bundle.convert import _flatten_positions, forget_paths

SHAPE = (2, 6, 3, 5)  # N, C, H, W
PLAIN, FLAT = ["Transpose"], ["Reshape", "Transpose", "Reshape"]


def turned(consumer: str, perm: tuple[int, ...] = (0, 2, 3, 1)) -> ir.Model:
    """Channels are turned last and go to a norm over them, or to a product with a matrix."""
    rng = np.random.default_rng(0)
    axes = [SHAPE[axis] for axis in perm]
    if consumer == "LayerNormalization":
        values = {"scale": rng.normal(size=axes[-1]), "bias": rng.normal(size=axes[-1])}
    else:
        values = {"matrix": rng.normal(size=(axes[-1], 4))}
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["x"], ["last"], perm=perm),
            helper.make_node(consumer, ["last", *values], ["y"]),
        ],
        "turned",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
        value_info=[helper.make_tensor_value_info("last", TensorProto.FLOAT, ["batch", *axes[1:]])],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def run(model: ir.Model) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)})[0]


def layout(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type in FLAT]


def test_channels_turned_last_for_a_norm_are_turned_by_rows_with_the_same_values():
    model = turned("LayerNormalization")
    before = run(model)
    assert layout(model) == PLAIN
    _flatten_positions(model)
    assert layout(model) == FLAT
    np.testing.assert_array_equal(run(model), before)


@pytest.mark.parametrize(
    ("consumer", "perm"),
    [("MatMul", (0, 2, 3, 1)), ("LayerNormalization", (0, 3, 2, 1))],
    ids=["product", "axes"],
)
def test_other_turns_stay_as_they_are(consumer, perm):
    """Keys of an attention are turned in the same way, and runtimes fuse that form."""
    model = turned(consumer, perm)
    _flatten_positions(model)
    assert layout(model) == PLAIN


def test_paths_are_forgotten_in_branches_and_functions_too():
    def node(**attributes):
        made = helper.make_node("If" if attributes else "Identity", ["x"], ["y"], **attributes)
        made.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=f'File "{ROOT}/x.py"')
        made.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'kept']")
        return made

    value = helper.make_tensor_value_info("x", TensorProto.BOOL, [])
    result = helper.make_tensor_value_info("y", TensorProto.BOOL, [])
    branch = helper.make_graph([node()], "branch", [], [result])
    graph = helper.make_graph([node(then_branch=branch, else_branch=branch)], "whole", [value], [result])
    opset = [helper.make_opsetid("", 20)]
    function = helper.make_function("ours", "f", ["x"], ["y"], [node()], opset)
    model = ir.from_proto(helper.make_model(graph, opset_imports=opset, functions=[function]))
    before = ir.to_proto(model).SerializeToString()
    forget_paths(model)
    after = ir.to_proto(model).SerializeToString()
    assert (before.count(str(ROOT).encode()), before.count(b"kept")) == (4, 4)
    assert (after.count(str(ROOT).encode()), after.count(b"kept")) == (0, 4)
