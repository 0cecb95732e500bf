"""Which implementation suits which shapes, and how the registry uses that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import expert_mlp_choice, expert_mlp_grouped, registry, triton_kernels, verified
from moe_overlap.ops.expert_mlp_choice import best
from moe_overlap.ops.expert_mlp_contract import OPS, Call, Dgrad, ExpertMlp, ExpertMlpBackward, Forward, Wgrad
from moe_overlap.schedule.builders import chunked
from moe_overlap.schedule.rows import experts_sms
from moe_overlap.schedule.run import Step
from moe_overlap.transport import groups
from moe_overlap.transport.local import LocalTransport
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests.ops.cases import weights

BF16 = torch.bfloat16
QWEN3 = {"experts": 128, "hidden": 2048, "ffn": 768}
MIXTRAL = {"experts": 8, "hidden": 4096, "ffn": 14336}
DEEPSEEK = {"experts": 32, "hidden": 7168, "ffn": 2048}


@pytest.mark.parametrize(
    "dtype, on_host, want",
    [
        (BF16, True, "triton"),
        (BF16, False, "triton"),
        (torch.float16, True, "triton"),
        (torch.float32, True, "reference"),
        (torch.float32, False, "triton"),  # a loop would have to wait for the counts
    ],
)
def test_best(dtype, on_host, want) -> None:
    assert best(dtype, on_host=on_host)[0] == want


def calls() -> dict[str, Call]:
    """A call of each operator with 3 experts, 12 rows (8 of them in the ranges of the pieces), D 4 and F 5."""
    (w_in, w_out), x, h, a = weights(3, 4, 5, "swiglu", BF16), *(torch.zeros(12, n, dtype=BF16) for n in (4, 10, 5))
    offs, starts, ends = (torch.tensor(t, dtype=torch.int32) for t in ((2, 2, 12), (0, 4, 7), (4, 4, 11)))
    row_to_token, few = torch.zeros(12, dtype=torch.int32), x[:6]
    return {
        "expert_mlp": ExpertMlp(few, w_in, w_out, offs, "swiglu", row_to_token, None, None, True),
        "expert_mlp_backward": ExpertMlpBackward(
            x, few, h, w_in, w_out, offs, "swiglu", row_to_token, None, [True] * 4, None
        ),
        "expert_mlp_forward": Forward(x, w_in, w_out, ends, starts, "swiglu", None, None, None),
        "expert_mlp_dgrad": Dgrad(x, h, w_in, w_out, ends, starts, "swiglu", None, None, None, None),
        "expert_mlp_wgrad": Wgrad(x, x, h, a, [4, 4, 11], [0, 4, 7], w_in, w_out, (0, 3), None),
    }


@pytest.mark.parametrize("op", OPS)
def test_groups_are_read_from_the_call(op) -> None:
    rows, call = 12 if op in ("expert_mlp", "expert_mlp_backward") else 8, calls()[op]
    assert call.groups.on_host and call.groups.most_rows == rows
    assert call.groups.adjacent == (rows == 12)


def test_groups_that_follow_each_other_are_seen() -> None:
    forward = calls()["expert_mlp_forward"]
    for starts, ends, want in (
        ([0, 4, 4], [4, 4, 9], True),
        ([1, 4, 4], [4, 4, 9], False),
        ([0, 4, 5], [4, 4, 9], False),
        (None, [4, 4, 9], True),
    ):
        assert replace(forward, starts=starts, ends=ends).groups.adjacent is want
    on_gpu = torch.empty(3, dtype=torch.int32, device="meta")
    assert not replace(forward, starts=on_gpu, ends=on_gpu).groups.adjacent
    assert not replace(forward, starts=on_gpu, ends=on_gpu).groups.on_host


@pytest.mark.parametrize("op", OPS)
def test_on_a_cpu_the_loop_is_chosen_with_a_reason(op) -> None:
    choice = registry.choose(op, device="cpu", dtype=BF16, arguments=[calls()[op]])
    assert choice.impl == "reference" and "runs everywhere" in choice.reason
    assert expert_mlp_choice.misfit("triton")(calls()[op]) is not None


@pytest.mark.parametrize("name, call_type", [("_expert_mlp", ExpertMlp), ("_expert_mlp_backward", ExpertMlpBackward)])
def test_a_call_has_the_arguments_of_its_operator(name, call_type) -> None:
    """In their order, so that the operator makes it of what it is given."""
    schema = getattr(torch.ops.moe_overlap, name).default._schema
    assert [argument.name for argument in schema.arguments] == [field.name for field in fields(call_type)]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An operator whose best implementation suits even numbers only, and whose last one is unverified."""
    monkeypatch.setattr(registry, "_implementations", dict(registry._implementations))
    registry.add("toy", "plain", lambda x, n: "plain", merit="plain", misfit=lambda x, n: "six" if n == 6 else None)
    registry.add("toy", "new", lambda x, n: "new", merit="-", reservation=lambda device, dtype: "not verified")
    registry.add(
        "toy",
        "even",
        lambda x, n: "even",
        merit="fast",
        limit=lambda x, n: "zero" if n == 0 else None,
        misfit=lambda x, n: "odd, or six" if n % 2 or n == 6 else None,
        preferred=True,
    )
    yield "toy"
    registry._chosen.clear()


@pytest.mark.parametrize(
    "n, want, words",
    [(2, "even", "fast"), (3, "plain", "even does not suit"), (0, "plain", "zero"), (6, "even", "plain does not suit")],
)
def test_a_misfit_lets_the_next_go_first_but_nothing_unverified(toy, n, want, words) -> None:
    x = torch.zeros(1)
    choice = registry.choose(toy, device="cpu", dtype=x.dtype, arguments=(x, n))
    assert choice.impl == want == registry.kernel(toy)(x, n) and words in choice.reason
    with registry.force(toy, "even"):
        if n:
            assert registry.kernel(toy)(x, n) == "even"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """As on sm_90 with Triton; what it yields says how much of it has been verified with which torch."""
    monkeypatch.setattr(triton_kernels, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def verify(sources: str | None) -> None:
        def find(op: str, implementation: str, architecture: str, dtype: str) -> verified.Record | None:
            ours = triton_kernels.sources() if implementation == "triton" else sources
            return (
                None if sources is None else verified.Record(op, implementation, architecture, dtype, str(ours), "", "")
            )

        monkeypatch.setattr(verified, "find", find)
        registry._chosen.clear()

    yield verify
    registry._chosen.clear()


def choice(shapes: dict[str, int], rows: int, dtype: torch.dtype = BF16) -> registry.Choice:
    """For the operator on a GPU; its tensors have no memory here."""
    experts, hidden, ffn = shapes["experts"], shapes["hidden"], shapes["ffn"]
    x, w_in, w_out = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((rows, hidden), (experts, 2 * ffn, hidden), (experts, hidden, ffn))
    )
    offs = torch.empty(experts, dtype=torch.int32, device="meta")
    call = ExpertMlp(x, w_in, w_out, offs, "swiglu", None, None, None, True)
    return registry.choose("expert_mlp", device=torch.device("cuda", 0), dtype=dtype, arguments=[call])


def test_on_a_gpu_what_is_verified_runs(hopper) -> None:
    hopper(expert_mlp_grouped.sources())
    for dtype in (BF16, torch.float16):
        assert choice(QWEN3, 65536, dtype).impl == choice(MIXTRAL, 16384, dtype).impl == "triton"
    hopper(None)
    unverified = choice(MIXTRAL, 16384)
    assert unverified.impl == "reference" and "triton is not the default: not verified on sm_90" in unverified.reason


def test_without_triton_the_grouped_matmul_runs_where_it_can(hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(expert_mlp_grouped.sources())
    monkeypatch.setattr(triton_kernels, "missing", lambda: "no Triton")
    registry._chosen.clear()
    assert choice(MIXTRAL, 16384).impl == choice(QWEN3, 65536).impl == "grouped_mm"
    odd = choice({**MIXTRAL, "hidden": 4097}, 16384)
    assert odd.impl == "reference" and "multiples of 16 bytes" in odd.reason


def test_where_the_grouped_matmul_cannot_run(hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    assert expert_mlp_grouped._obstacle(device, BF16) is None
    assert "bfloat16 only" in str(expert_mlp_grouped._obstacle(device, torch.float16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "9.0" in str(expert_mlp_grouped._obstacle(device, BF16))


def test_the_schedule_leaves_multiprocessors_to_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu, card = torch.device("cuda", 0), torch.device("cpu"), SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for taken, want in ((0, None), (16, 116), (500, 1)):
        assert experts_sms(gpu, taken) == want and experts_sms(cpu, taken) is None


class FakeNccl:
    """What groups ask of torch's options for NCCL."""

    def __init__(self, *, is_high_priority_stream: bool) -> None:
        self.config = SimpleNamespace(max_ctas=None)


@pytest.mark.parametrize(("text", "ctas", "several", "alone"), [("", 16, 16, 0), ("0", None, 0, 0), ("24", 24, 24, 0)])
def test_one_switch_for_nccl_and_the_experts(
    text: str, ctas: int | None, several: int, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_OVERLAP_EXCHANGE_SMS", text)
    monkeypatch.setattr(groups.dist, "ProcessGroupNCCL", SimpleNamespace(Options=FakeNccl), raising=False)
    assert groups.nccl_options(timedelta(seconds=1)).config.max_ctas == ctas
    for backend, world, want in (("nccl", 8, several), ("nccl", 1, alone), ("gloo", 8, 0)):
        transport = object.__new__(ProcessGroupTransport)
        transport.backend, transport.world_size = backend, world
        assert transport.exchange_sms == want
    assert LocalTransport().exchange_sms == 0


@pytest.mark.parametrize("text", ["16.5", "nan", "inf", "-inf", "-1", "1025", "x", "1e-9"])
def test_a_switch_that_is_no_number_of_multiprocessors(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_OVERLAP_EXCHANGE_SMS", text)
    monkeypatch.setattr(groups.dist, "ProcessGroupNCCL", SimpleNamespace(Options=FakeNccl), raising=False)
    with pytest.raises(ConfigError, match="MOE_OVERLAP_EXCHANGE_SMS = .*expected an integer from 0 to 1024"):
        groups.nccl_options(timedelta(seconds=1))
    transport = object.__new__(ProcessGroupTransport)
    transport.backend, transport.world_size = "nccl", 8
    with pytest.raises(ConfigError, match="MOE_OVERLAP_EXCHANGE_SMS"):
        _ = transport.exchange_sms


@pytest.mark.parametrize("joined", [True, False])
def test_experts_leave_multiprocessors_where_an_exchange_runs_beside_them(
    joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    step = object.__new__(Step)
    step._device, step.pair = torch.device("cuda", 0), chunked(2).join(joined)
    step.transport = SimpleNamespace(exchange_sms=16)  # type: ignore[assignment]
    assert step._num_sms == (None if joined else 116)
