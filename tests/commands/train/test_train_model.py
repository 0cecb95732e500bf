"""The job's model, its learning rate and its routing file."""

import json
import math

import pytest
import torch

from moe_overlap.commands.train.files import read_tensors
from moe_overlap.commands.train.loop import learning_rate
from moe_overlap.commands.train.model import LanguageModel, initialise, moe_layers, split_parameters
from moe_overlap.commands.train.options import KINDS, TrainOptions
from moe_overlap.commands.train.seeds import generator
from tests.commands.train.jobs import SMALL, events, run, run_on_two
from tests.tolerances import same_bits


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_causal_and_positions_matter(kind):
    options = TrainOptions(**(vars(SMALL) | {"kind": kind}))
    model = LanguageModel(options, None)
    initialise(model, seed=0, rank=0)
    tokens = torch.randint(0, 300, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 300
    with torch.no_grad():
        a, b = model(tokens), model(changed)
        same = model(torch.zeros(1, 32, dtype=torch.int64))
    torch.testing.assert_close(a[0, :20], b[0, :20], rtol=1e-4, atol=1e-5)
    assert (a[0, 20:] - b[0, 20:]).abs().max() > 1e-3
    assert same.shape == (1, 32, 300)
    assert len(moe_layers(model)) == options.layers // 2


def test_initial_values_do_not_depend_on_the_number_of_ranks():
    def weights(rank):
        model = LanguageModel(SMALL, None)
        initialise(model, seed=5, rank=rank)
        return split_parameters(model)

    (dense_a, experts_a), (dense_b, experts_b) = weights(0), weights(1)
    assert all(torch.equal(dense_a[name], dense_b[name]) for name in dense_a)
    assert not any(torch.equal(experts_a[name], experts_b[name]) for name in experts_a)


@pytest.mark.parametrize(("kind", "layer"), [("scmoe_pos2", "pairs.0.moe"), ("top2", "pairs.0.3.branch.1")])
def test_expert_weights_start_as_they_did_when_the_layer_held_them(kind, layer):
    """A seed stands for the same run as before the experts were a module: their names drew the numbers."""
    model = LanguageModel(TrainOptions(**(vars(SMALL) | {"kind": kind})), None)
    initialise(model, seed=5, rank=0)
    _, experts = split_parameters(model)
    assert set(experts) == {f"{layer}.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    for name in ("gate_up_proj", "down_proj"):
        weight = experts[f"{layer}.experts.{name}"]
        for expert, matrix in enumerate(weight):
            drawn = torch.randn(matrix.shape, generator=generator(f"{layer}.{name}[{expert}]", 5))
            same_bits(matrix, drawn * (1 / math.sqrt(matrix.shape[1])))


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    options = TrainOptions(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize("ranks", [1, 2])
def test_saved_routing_holds_the_best_experts_in_order(ranks, text, tmp_path):
    file = tmp_path / "routing.safetensors"
    options = ("--steps", 2, "--save-routing", file)
    if ranks == 1:
        assert run(text, tmp_path, "--ranks", 1, *options) == 0
    else:
        assert run_on_two(text, tmp_path, *options) == [0, 0]
    tensors, metadata = read_tensors(file)
    ids, weights = tensors["ids"], tensors["weights"]
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert ids.shape == weights.shape == (512, 2) and metadata["E"] == "4"
    assert (weights[:, 0] >= weights[:, 1]).all() and (ids[:, 0] != ids[:, 1]).all()
    assert ((ids >= 0) & (ids < 4)).all()
    assert (metadata["router"], metadata["mu"]) == ("linear", "0.0")
    assert sum(json.loads(metadata["rank_tokens"])) == 512 and len(json.loads(metadata["rank_tokens"])) == ranks
    load = torch.bincount(ids[:, 0].long(), minlength=4).tolist()
    assert load == events(tmp_path, "end")[0]["expert_load"][-1], "the first choice is where the tokens went"
