"""Whole models of transformers: one rank, two ranks from a file of one, training, generation, saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from models import LENGTH, MODELS, batch, config_of, model_of, save, step
from safetensors.torch import load_file

from moe_overlap import ConfigError, MoeTransportError
from moe_overlap.integrations import transformers as ours
from tests.ranks import gloo_pool

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def _same(got, want, **close):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], **(close or CLOSE), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(autouse=True)
def _registered():
    ours.register(schedule="serial")


@pytest.mark.parametrize("family", MODELS)
def test_a_training_step_on_one_rank(family):
    _same(step(model_of(family, "moe_overlap"), batch(0)), step(model_of(family), batch(0)))


def test_a_name_for_from_pretrained(tmp_path):
    save(model_of("qwen3_moe"), tmp_path)
    model = MODELS["qwen3_moe"].from_pretrained(
        tmp_path, experts_implementation="moe_overlap", attn_implementation="eager"
    )
    assert model.config._experts_implementation == "moe_overlap"
    _same(step(model.train(), batch(0)), step(model_of("qwen3_moe"), batch(0)))


def test_use_switches_a_model_that_exists():
    model = model_of("qwen3_moe")
    want = step(model, batch(0))
    assert ours.use(model) is model and model.config._experts_implementation == "moe_overlap"
    assert set(ours.check(model)) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    _same(step(model, batch(0)), want)


def test_gradient_checkpointing_recomputes_the_same():
    model = model_of("qwen3_moe", "moe_overlap")
    want = step(model, batch(0))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _same(step(model, batch(0)), want, rtol=0, atol=0)


def test_generation_on_one_rank():
    ids = batch(0)
    options = {"max_new_tokens": 6, "do_sample": False}
    want = model_of("qwen3_moe").eval().generate(ids, **options)
    assert torch.equal(model_of("qwen3_moe", "moe_overlap").eval().generate(ids, **options), want)


def test_router_logits_and_the_pooled_auxiliary_loss_are_the_models():
    both = []
    for implementation in ("eager", "moe_overlap"):
        model = model_of("qwen3_moe", implementation)
        out = model(input_ids=batch(0), labels=batch(0), output_router_logits=True)
        out.loss.backward()
        both.append({"aux": out.aux_loss.detach(), "gate": model.model.layers[0].mlp.gate.weight.grad,
                     **{f"logits{at}": one.detach() for at, one in enumerate(out.router_logits)}})  # fmt: skip
    _same(*both)


# ---------------------------------------------------------------- two ranks


def _load(folder, schedule):
    ours.register(schedule=schedule)
    family = "gpt_oss" if "gpt_oss" in str(folder) else "qwen3_moe"
    return MODELS[family].from_pretrained(
        folder, experts_implementation="moe_overlap", attn_implementation="eager",
        distributed_config=ours.expert_parallel(),
    )  # fmt: skip


def _train(folder, schedule):
    import torch.distributed as dist

    rank = dist.get_rank()
    model = _load(folder, schedule).train()
    held = {name: tuple(p.to_local().shape) for name, p in model.named_parameters() if ".experts." in name}
    found = step(model, batch(rank))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = step(model, batch(rank))
    equal = all(torch.equal(found[name], again[name]) for name in found)
    return {name: value.numpy() for name, value in found.items()}, held, equal


@pytest.mark.parametrize(
    ("family", "schedule"), [("qwen3_moe", "chunked(2)"), ("qwen3_moe", "auto"), ("gpt_oss", "serial")]
)
def test_two_ranks_are_one_process_with_both_batches(tmp_path, family, schedule):
    folder = tmp_path / family
    save(model_of(family), folder)
    ranks = gloo_pool(2).run(_train, str(folder), schedule, limit_s=200.0)
    alone = [step(model_of(family), batch(rank)) for rank in range(2)]
    for rank, (found, held, equal) in enumerate(ranks):
        assert equal, "a recompute gave other gradients"
        assert held and all(shape[0] == 2 for shape in held.values()), "two of four experts are here"
        got = {name: torch.from_numpy(value) for name, value in found.items()}
        want = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}  # means over the ranks
        want |= {name: alone[rank][name] for name in ("logits", "loss")}
        _same(got, want)


def _generate_and_save(folder, out):
    import torch.distributed as dist

    model = _load(folder, "serial").eval()
    tokens = model.generate(batch(dist.get_rank()), max_new_tokens=5, do_sample=False)
    model.save_pretrained(out)
    return tokens.numpy()


def test_two_ranks_generate_and_save_the_file_of_one(tmp_path):
    folder, out = tmp_path / "one", tmp_path / "two"
    model = model_of("qwen3_moe").eval()
    save(model, folder)
    ranks = gloo_pool(2).run(_generate_and_save, str(folder), str(out), limit_s=200.0)
    for rank, tokens in enumerate(ranks):
        want = model.generate(batch(rank), max_new_tokens=5, do_sample=False)
        assert torch.equal(torch.from_numpy(tokens), want)
    before, after = (load_file(Path(place) / "model.safetensors") for place in (folder, out))
    assert any("experts.3.down_proj" in name for name in before), "a name for each expert"
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _refuse():
    ours.register(schedule="serial")
    model = model_of("qwen3_moe")
    try:
        ours.expert_parallel(3)
    except ConfigError as error:
        return error.field, [name for name, _ in ours.check(model).items()]
    return None


def test_ranks_that_do_not_divide_all_are_refused():
    assert gloo_pool(2).run(_refuse, limit_s=200.0)[0] == (
        "ranks",
        ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
    )


def test_one_process_needs_no_distributed_config():
    with pytest.raises(ConfigError) as error:
        ours.expert_parallel()
    assert error.value.field == "group"


@pytest.mark.parametrize(("field", "value"), [("chunks", "chunked(99)"), ("schedule", 3), ("dedup", "maybe")])
def test_bad_options(field, value):
    with pytest.raises(ConfigError) as error:
        ours.register(**{"schedule" if field == "chunks" else field: value})
    assert error.value.field == field


def test_sizes():
    assert config_of("qwen3_moe").num_experts == 4 and batch(0).shape == (2, LENGTH)
    assert issubclass(MoeTransportError, Exception)
