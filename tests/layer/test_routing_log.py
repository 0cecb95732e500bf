"""Recorded routing as a file: one layer and several, what a benchmark reads, and files that are something else."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from moe_overlap import ConfigError, MoELayer, RoutingLog, RoutingRecorder, RoutingReplay
from moe_overlap.commands.bench.routing import read_file
from moe_overlap.layer.routing_log import LayerLog
from moe_overlap.routing import Recorded
from tests.layers import E, K, make, tokens
from tests.tolerances import same_bits


def same(a, b):
    assert [(one.name, one.num_experts, one.tokens) for one in a.layers] == [
        (one.name, one.num_experts, one.tokens) for one in b.layers
    ]
    for x, y in zip(a.layers, b.layers, strict=True):
        for one, two in zip(x.calls, y.calls, strict=True):
            assert torch.equal(one.ids_TK, two.ids_TK)
            assert torch.equal(one.wanted_TK, two.wanted_TK)
            assert torch.equal(one.weights_TK.float(), two.weights_TK)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("capacity", [None, 0.5])
def test_a_log_comes_back_from_its_file_and_is_replayed_from_there(tmp_path, layers, capacity):
    model = torch.nn.Sequential(*(make(capacity_factor=capacity, dtype=torch.float32) for _ in range(layers)))
    inputs = [tokens(count, seed=count, dtype=torch.float32) for count in (5, 0, 11)]
    with RoutingRecorder(model) as recorder:
        want = [model(x) for x in inputs]
    path = tmp_path / "log.safetensors"
    recorder.log.save(path)
    same(recorder.log, RoutingLog.load(path))
    with RoutingReplay(model, path, weights="recorded"):
        for x, y in zip(inputs, want, strict=True):
            same_bits(model(x), y)
    read = read_file(path, experts=E, top_k=K)
    last = recorder.log.layers[-1].calls
    assert torch.equal(read.ids_NK, torch.cat([call.ids_TK for call in last]))
    assert torch.equal(read.weights_NK, torch.cat([call.weights_TK for call in last]))


def test_a_file_of_train_is_one_call_of_one_layer_and_can_be_cut(tmp_path):
    """Such a file has a second choice also where the model has one expert for each token."""
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(12)]).to(torch.int32)
    path = tmp_path / "routing.safetensors"
    save_file({"ids": ids, "weights": torch.rand(12, 2)}, path, {"E": str(E), "K": "1", "kind": "moe", "layer": "3"})
    (layer,) = RoutingLog.load(path).layers
    assert layer.tokens == (12,) and torch.equal(layer.calls[0].ids_TK, ids[:, :1])
    log = RoutingLog(layers=(layer.cut((4, 8)),))
    model = make(top_k=1, dtype=torch.float32)
    with RoutingReplay(model, log):
        for count in (4, 8):
            model(tokens(count, dtype=torch.float32))
            first = 0 if count == 4 else 4
            found = model.stats().tokens_per_expert
            assert torch.equal(found, torch.bincount(ids[first : first + count, 0].long(), minlength=E))
    with pytest.raises(ConfigError, match="tokens"):
        layer.cut((4, 7))


def broken(tmp_path, tensors, metadata):
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path, metadata)
    return path


IDS, WEIGHTS = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
ONE = json.dumps([{"name": "", "E": 8, "K": 2, "tokens": [3]}])


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"ids": IDS}, {"E": "8"}),
        ({"ids": IDS.long(), "weights": WEIGHTS}, {"E": "8"}),
        ({"ids": IDS, "weights": WEIGHTS.double()}, {"E": "8"}),
        ({"ids": IDS, "weights": WEIGHTS}, {}),
        ({"ids": IDS, "weights": WEIGHTS}, {"E": "many"}),
        ({"ids": IDS - 2, "weights": WEIGHTS}, {"E": "8"}),
        ({"ids": IDS, "weights": WEIGHTS / 0}, {"E": "8"}),
        ({"ids": IDS, "weights": WEIGHTS}, {"layers": "[]"}),
        ({"ids": IDS, "weights": WEIGHTS}, {"layers": "[3]"}),
        ({"ids": IDS, "weights": WEIGHTS}, {"layers": ONE.replace("[3]", "[4]")}),
        ({"ids": IDS, "weights": WEIGHTS}, {"layers": ONE.replace("[3]", "[4, -1]")}),
        ({"ids": IDS, "weights": WEIGHTS}, {"layers": ONE.replace('"K": 2', '"K": 3')}),
        ({"ids": IDS, "weights": WEIGHTS}, {"layers": ONE.replace('"K": 2', '"K": true')}),
        ({"ids": IDS, "weights": WEIGHTS}, {"layers": ONE.replace("[3]", "[2, true]")}),
        ({"ids": IDS, "weights": WEIGHTS}, {"layers": ONE.replace("[3]", "[3.5]")}),
        ({"ids": IDS[:2], "weights": WEIGHTS}, {"layers": ONE}),
        ({"other": IDS}, {"layers": ONE}),
    ],
)
def test_a_file_of_something_else_is_named_with_what_was_expected(tmp_path, tensors, metadata):
    path = broken(tmp_path, tensors, metadata)
    with pytest.raises(ConfigError) as caught:
        RoutingLog.load(path)
    assert caught.value.field == "replay.file" and caught.value.value == str(path)


def test_a_torn_or_missing_file_is_named_too(tmp_path):
    path = tmp_path / "torn.safetensors"
    for data in (None, b"", b"not a file of tensors"):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ConfigError) as caught:
            RoutingLog.load(path)
        assert caught.value.field == "replay.file"


def test_records_that_are_none():
    with pytest.raises(ConfigError, match="replay.ids"):
        Recorded(ids_TK=IDS.long(), weights_TK=WEIGHTS)
    with pytest.raises(ConfigError, match="replay.weights"):
        Recorded(ids_TK=IDS, weights_TK=WEIGHTS[:1])
    with pytest.raises(ConfigError, match="replay.chosen"):
        Recorded(ids_TK=IDS, weights_TK=WEIGHTS, chosen_TK=IDS[:1])
    calls = tuple(Recorded(ids_TK=IDS[:, :k], weights_TK=WEIGHTS[:, :k]) for k in (1, 2))
    with pytest.raises(ConfigError, match="replay.top_k"):
        LayerLog(name="", num_experts=E, calls=calls)
    with pytest.raises(ConfigError, match="layer"):
        RoutingLog(layers=()).save("nowhere")


def test_a_deep_copy_of_a_layer_records_and_replays_nothing():
    layer = make()
    with RoutingRecorder(layer) as recorder:
        copied = copy.deepcopy(layer)
        copied(tokens(3))
    assert isinstance(copied, MoELayer) and recorder.log.layers[0].calls == ()
