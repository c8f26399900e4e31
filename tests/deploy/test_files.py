"""Files of exported halves: a tensor of an ONNX model never comes from a file that was not meant."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from cem_fast.deploy.files import open_half, read_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper = pytest.importorskip("onnx.helper")
SIDES = ["batch", 4]


def outside(location: str = "weights.bin"):
    """A tensor of the number 3 in another file."""
    tensor = onnx.TensorProto(name="weight", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def inside():
    return helper.make_tensor("weight", onnx.TensorProto.FLOAT, [1], [3.0])


def sparse(values):
    return helper.make_sparse_tensor(values, helper.make_tensor("at", onnx.TensorProto.INT64, [1], [0]), [1])


def constant(key: str, value, output: str = "weight"):
    return helper.make_node("Constant", [], [output], **{key: value})


def branch(tensor, key: str = "initializer"):
    """A subgraph that returns the tensor."""
    ends = [helper.make_tensor_value_info("chosen", onnx.TensorProto.FLOAT, None)]
    identity = helper.make_node("Identity", ["weight"], ["chosen"])
    if key == "initializer":
        return helper.make_graph([identity], "branch", [], ends, [tensor])
    return helper.make_graph([constant(key, tensor), identity], "branch", [], ends)


def chosen(one, other):
    """Nodes that take the weight of one of two subgraphs."""
    truth = helper.make_tensor("truth", onnx.TensorProto.BOOL, [], [True])
    return [
        constant("value", truth, "truth"),
        helper.make_node("If", ["truth"], ["weight"], then_branch=one, else_branch=other),
    ]


def model(nodes=(), initializer=(), sparse_initializer=(), functions=(), domain=""):
    """``y = x * weight``, with the weight from wherever."""
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, SIDES) for name in "xy"]
    times = helper.make_node("Mul", ["x", "weight"], ["y"])
    graph = helper.make_graph(
        [*nodes, times], "mine", ends[:1], ends[1:], initializer, sparse_initializer=sparse_initializer
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)


def function(tensor):
    opset = [helper.make_opsetid("", 17)]
    made = helper.make_function("mine", "Weight", [], ["weight"], [constant("value", tensor)], opset)
    return model([helper.make_node("Weight", [], ["weight"], domain="mine")], functions=[made])


PLACES = {
    "initializer": lambda tensor: model(initializer=[tensor]),
    "sparse initializer": lambda tensor: model(sparse_initializer=[sparse(tensor)]),
    "attribute": lambda tensor: model([constant("value", tensor)]),
    "sparse attribute": lambda tensor: model([constant("sparse_value", sparse(tensor))]),
    "subgraph": lambda tensor: model(chosen(branch(inside()), branch(tensor))),
    "attribute of a subgraph": lambda tensor: model(chosen(branch(tensor, "value"), branch(inside()))),
    "function": function,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_in_another_file_is_refused_wherever_it_is(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(np.float32(5).tobytes())
    onnx.save(PLACES[place](outside()), "cloud.onnx")
    with pytest.raises(ValueError, match="its weights are in other files, such as 'weights.bin'"):
        open_half("cloud.onnx")
    onnx.save(PLACES[place](inside()), "whole.onnx")
    assert open_half("whole.onnx")(torch.ones(2, 4)).tolist() == [[3.0] * 4] * 2


@pytest.mark.parametrize("place", PLACES)
def test_files_next_to_a_model_are_read_where_they_are_meant(place, tmp_path):
    (tmp_path / "weights.bin").write_bytes(np.float32(5).tobytes())
    path = tmp_path / "mine.onnx"
    onnx.save(PLACES[place](outside()), str(path))
    if "sparse" in place:
        with pytest.raises(ValueError, match="read from the model's own file only"):
            read_onnx(path, neighbors=True)
        return
    content = read_onnx(path, neighbors=True)
    assert b"weights.bin" not in content
    assert np.float32(5).tobytes() in content


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "linked", "pipe", "", "."])
def test_a_tensor_elsewhere_is_never_read(place, location, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(np.float32(7).tobytes())
    (folder / "linked").symlink_to("../secret")
    os.mkfifo(folder / "pipe")
    path = folder / "mine.onnx"
    onnx.save(PLACES[place](outside(location)), str(path))
    with pytest.raises(ValueError, match="not in a file next to it"):
        read_onnx(path, neighbors=True)
