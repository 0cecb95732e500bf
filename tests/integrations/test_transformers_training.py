"""transformers' Trainer and PEFT's adapters on experts that are computed here."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from models import MODELS, batch, model_of, save, step
from transformers import Trainer, TrainingArguments

from moe_overlap.integrations import transformers as ours
from tests.ranks import gloo_pool

STEPS = 4


class Sentences(torch.utils.data.Dataset):
    """STEPS * 4 sequences, the same in every process."""

    def __len__(self):
        return 4 * STEPS

    def __getitem__(self, at):
        ids = batch(at // 2)[at % 2]
        return {"input_ids": ids, "labels": ids}


def arguments(folder, *, save_every=0, **options):
    saving = {"save_strategy": "steps", "save_steps": save_every} if save_every else {"save_strategy": "no"}
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], max_steps=STEPS, learning_rate=1e-2, seed=3,
        lr_scheduler_type="constant", per_device_train_batch_size=2, logging_steps=1,
        disable_tqdm=True, dataloader_num_workers=0, optim="sgd", max_grad_norm=0.5, **saving, **options,
    )  # fmt: skip


def trained(model, folder, *, resume=None, **options):
    trainer = Trainer(model=model, args=arguments(folder, **options), train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    return {"losses": torch.tensor([one["loss"] for one in trainer.state.log_history if "loss" in one]),
            **{name: value.detach().clone() for name, value in model.named_parameters()}}  # fmt: skip


def same(got, want, **close):
    for name in want:
        torch.testing.assert_close(got[name], want[name], **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(autouse=True)
def _registered():
    ours.register(schedule="serial")


def test_the_trainer_on_one_rank_with_gradient_checkpointing(tmp_path):
    want = trained(model_of("qwen3_moe"), tmp_path / "a")
    model = model_of("qwen3_moe", "moe_overlap")
    got = trained(model, tmp_path / "b", gradient_checkpointing=True)
    same(got, want, rtol=1e-4, atol=1e-5)


def _trainer(model, folder):
    return Trainer(model=model, args=arguments(folder, save_every=2), train_dataset=Sentences())


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path):
    """From the model of the checkpoint: the Trainer by itself does not put experts back that the file names one by one,
    with whatever experts implementation."""
    whole = model_of("qwen3_moe", "moe_overlap")
    _trainer(whole, tmp_path / "first").train()
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    options = {"experts_implementation": "moe_overlap", "attn_implementation": "eager"}
    again = MODELS["qwen3_moe"].from_pretrained(checkpoint, **options).train()
    trainer = _trainer(again, tmp_path / "second")
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == STEPS
    same(dict(again.named_parameters()), dict(whole.named_parameters()), rtol=1e-5, atol=1e-7)


def test_an_adapter_on_the_experts(tmp_path):
    peft = pytest.importorskip("peft")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    both = []
    for implementation in ("eager", "moe_overlap"):
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=names, init_lora_weights=False)
        model = model_of("qwen3_moe", implementation)
        torch.manual_seed(5)
        model = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        found = step(model, batch(0))
        both.append({name: value for name, value in found.items() if value is not None})
    assert sum("lora_" in name for name in both[0]) == 8, "two matrices of two weights in two layers"
    assert both[0].keys() == both[1].keys()
    same(both[1], both[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- two ranks


@contextmanager
def _launched():
    """Accelerate asks the environment, as torchrun would have set it."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launched.items():
            patch.setenv(name, value)
        yield


def _spread(folder):
    ours.register(schedule="chunked(2)")
    options = {"experts_implementation": "moe_overlap", "attn_implementation": "eager"}
    return MODELS["qwen3_moe"].from_pretrained(folder, distributed_config=ours.expert_parallel(), **options).train()


def _whole(found):
    return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).numpy()
            for name, value in found.items()}  # fmt: skip


def _two(folder, out):
    with _launched():
        return _whole(trained(_spread(folder), Path(out)))


def _two_that_save(folder, out):
    """The parameters after all steps, and those of a model that is made of the last checkpoint; and what the Trainer
    says of resuming."""
    with _launched():
        first = _spread(folder)
        with pytest.raises(ValueError, match="Resuming is not supported") as said:
            Trainer(model=first, args=arguments(Path(out), save_every=2), train_dataset=Sentences())
        options = arguments(Path(out), save_every=STEPS, save_only_model=True)
        Trainer(model=first, args=options, train_dataset=Sentences()).train()
        again = _spread(str(Path(out) / f"checkpoint-{STEPS}"))
        both = [{name: value.detach() for name, value in one.named_parameters()} for one in (first, again)]
        return [_whole(one) for one in both], str(said.value)


def test_the_trainer_on_two_ranks(tmp_path):
    save(model_of("qwen3_moe"), tmp_path / "one")
    ranks = gloo_pool(2).run(_two, str(tmp_path / "one"), str(tmp_path / "two"), limit_s=200.0)
    model = model_of("qwen3_moe")
    trainer = Trainer(model=model, args=arguments(tmp_path / "three"), train_dataset=Sentences())
    trainer.args.per_device_train_batch_size = 4
    trainer._train_batch_size = 4
    trainer.train()
    for one in ranks:
        assert one["losses"].shape == (STEPS,)
        same({name: torch.from_numpy(value) for name, value in one.items()},
             {name: value.detach() for name, value in model.named_parameters()}, rtol=1e-3, atol=1e-5)  # fmt: skip


def test_checkpoints_of_two_ranks_are_models_without_an_optimizer(tmp_path):
    """transformers 5.24 refuses to resume a model that is spread when it is loaded, whoever runs its experts."""
    save(model_of("qwen3_moe"), tmp_path / "one")
    for (whole, again), said in gloo_pool(2).run(_two_that_save, str(tmp_path / "one"), str(tmp_path), limit_s=200.0):
        assert "save_only_model=True" in said
        for name, want in whole.items():
            torch.testing.assert_close(torch.from_numpy(again[name]), torch.from_numpy(want), rtol=0, atol=0)
