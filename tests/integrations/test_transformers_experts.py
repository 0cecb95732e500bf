"""Experts classes of transformers' families, computed here and by transformers: forward and all gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

pytest.importorskip("transformers")

from families import FAMILIES, REFUSED, D, E, F, K, distance, error, experts_of, gradients, tokens
from transformers.integrations.moe import batched_mm_experts_forward

from moe_overlap import ConfigError
from moe_overlap.integrations.recipe import Recipe, recipe_of
from moe_overlap.integrations.transformers import TokenDispatch, check, experts_forward, register
from moe_overlap.ops import activation_kinds
from tests.ranks import gloo_pool

FLOAT32 = 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_in_float32(family):
    experts = experts_of(family, FAMILIES[family])
    ours = gradients(experts, partial(experts_forward, experts), torch.float32)
    theirs = gradients(experts, experts, torch.float32)
    assert max(error(ours, theirs).values()) <= FLOAT32


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_further_from_float32_than_their_own(family):
    experts = experts_of(family, FAMILIES[family], torch.bfloat16)
    ours = gradients(experts, partial(experts_forward, experts), torch.bfloat16)
    # The eager form of one family computes in float32 all through; its other forms do not.
    run = partial(batched_mm_experts_forward, experts) if family == "openai_privacy_filter" else experts
    theirs = gradients(experts, run, torch.bfloat16)
    exact = experts_of(family, FAMILIES[family], torch.bfloat16).float()
    want = gradients(exact, exact, torch.float32, drawn=torch.bfloat16)
    mine, other = distance(ours, want), distance(theirs, want)
    for name in want:
        assert mine[name] <= 1.05 * other[name], name


def _spread(family, name, schedule):
    """This rank's half of the experts, on this rank's half of the tokens."""
    register(schedule=schedule)
    rank = dist.get_rank()
    meshes = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "tp"))
    whole = experts_of(family, name)
    half = slice(rank * E // 2, (rank + 1) * E // 2)
    for key, parameter in list(whole.named_parameters()):
        setattr(whole, key, torch.nn.Parameter(parameter.detach()[half].clone()))
    whole.num_experts = E // 2
    dispatch = TokenDispatch(whole, meshes["ep"], meshes["tp"])
    found = gradients(whole, dispatch, torch.float32, part=(rank, 2))
    return {key: value.numpy() for key, value in found.items()}


def _spread_all(families, schedule):
    return {family: _spread(family, FAMILIES[family], schedule) for family in families}


FORMS = ["aria", "deepseek_v4", "gemma4", "gpt_oss", "inkling2", "mixtral", "nemotron_h", "openai_privacy_filter"]
"""A family of each form of experts."""


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_two_ranks_compute_what_transformers_does_on_one(schedule):
    ranks = gloo_pool(2).run(_spread_all, FORMS, schedule, limit_s=200.0)
    for family in FORMS:
        experts = experts_of(family, FAMILIES[family])
        want = gradients(experts, experts, torch.float32)
        both = [{key: torch.from_numpy(value) for key, value in one[family].items()} for one in ranks]
        got = {key: torch.cat([one[key] for one in both]) for key in want}
        assert max(error(got, want).values()) <= FLOAT32, family


def test_every_form_is_among_the_forms():
    """Of each combination of activation and layout that the families have."""
    recipes = {family: recipe_of(experts_of(family, FAMILIES[family])) for family in FAMILIES}
    assert set(recipes.values()) == {recipes[family] for family in (*FORMS, "minimax_m3_vl")}
    assert recipes["qwen3_moe"] == Recipe(activation="swiglu", first="gate_up_proj", transposed=False, biased=False)


def test_an_activation_of_no_known_form_is_taken_as_it_is():
    experts = experts_of("mixtral", "MixtralExperts")
    experts.act_fn = torch.nn.Mish()
    ours = gradients(experts, partial(experts_forward, experts), torch.float32)
    theirs = gradients(experts, experts, torch.float32)
    assert max(error(ours, theirs).values()) <= FLOAT32
    name = recipe_of(experts).activation
    assert name.startswith("MixtralExperts ") and activation_kinds.registered(name).gated
    assert recipe_of(experts).activation == name


def test_no_tokens_and_one_token():
    experts = experts_of("gpt_oss", "GptOssExperts")
    x, ids, weights = tokens(count=1)
    assert torch.allclose(experts_forward(experts, x, ids, weights), experts(x, ids, weights), atol=1e-6)
    assert experts_forward(experts, x[:0], ids[:0], weights[:0]).shape == (0, D)


def test_autocast():
    experts = experts_of("mixtral", "MixtralExperts")
    x, ids, weights = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = experts_forward(experts, x, ids, weights), experts(x, ids, weights)
    assert ours.dtype == theirs.dtype == torch.float32
    want = experts(x, ids, weights)
    assert (ours - want).norm() <= 1.05 * (theirs - want).norm()


# ---------------------------------------------------------------- what is refused


def _state(experts):
    return {name: value.clone() for name, value in experts.state_dict().items()}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_expressed_is_named_with_the_reason(family):
    name, why = REFUSED[family]
    experts = experts_of(family, name)
    before = _state(experts)
    with pytest.raises(ConfigError, match=why) as error:
        recipe_of(experts)
    assert error.value.field == "experts" and name in str(error.value)
    if why != "norm":
        with pytest.raises(ConfigError, match=name):
            check(torch.nn.ModuleDict({"experts": experts}))
    assert all(torch.equal(value, before[key]) for key, value in experts.state_dict().items())


def test_quantised_experts():
    experts = experts_of("mixtral", "MixtralExperts")
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.detach().to(torch.float8_e4m3fn), False)
    with pytest.raises(ConfigError, match="MixtralExperts of mixtral.*not quantised"):
        recipe_of(experts)


def test_scales_beside_the_weights():
    experts = experts_of("mixtral", "MixtralExperts")
    experts.gate_up_proj_scale_inv = torch.nn.Parameter(torch.ones(E, 1, 1))
    with pytest.raises(ConfigError, match="gate_up_proj_scale_inv"):
        recipe_of(experts)


def test_an_activation_with_weights():
    experts = experts_of("mixtral", "MixtralExperts")
    experts.act_fn = torch.nn.PReLU()
    with pytest.raises(ConfigError, match="PReLU"):
        recipe_of(experts)


class Centred(torch.nn.Module):
    def forward(self, gate):
        return gate - gate.mean(dim=0)


def test_an_activation_over_all_rows():
    experts = experts_of("mixtral", "MixtralExperts")
    experts.act_fn = Centred()
    with pytest.raises(ConfigError, match="each row alone"):
        recipe_of(experts)


def test_a_model_without_experts():
    with pytest.raises(ConfigError, match="Linear"):
        check(torch.nn.Linear(2, 2))


def test_sizes_of_the_examples():
    """So that every expert has rows and limits are reached."""
    _, ids, _ = tokens()
    assert ids.unique().numel() == E and ids.shape[1] == K and F != D
    h = torch.nn.functional.linear(tokens()[0], experts_of("deepseek_v4", "DeepseekV4Experts").gate_up_proj[0])
    assert (h.abs() > 1.5).float().mean() > 0.05


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_result_is_no_view(family):
    """FSDP2 warns of a module that returns one."""
    y = experts_forward(experts_of(family, FAMILIES[family]), *tokens())
    assert not y._is_view() and y.is_contiguous()
