"""One contract on every path: what a caller may do with a call, and with its result, does not depend on how it runs."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ConfigError, aux_loss
from moe_overlap.layer.functional import moe_forward
from tests import oracle
from tests.layer.contract import MODULES, ONE_RANK, PATHS, TRANSPARENT, Call, gradients, on
from tests.layers import D, E, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("path", [path for path in PATHS if path.startswith("deduplicated")])
def test_deduplicated_paths_send_one_row_to_a_rank_also_where_that_does_not_pay(path, top_k):
    def check(call, deduplicated):
        y = call(tokens(40)).detach()
        assert call.layer._last_step.pair.deduplicated == deduplicated
        return y, call.transport.stats.payload_bytes

    same = path.removeprefix("deduplicated").strip() or "ranks"
    plain = virtual_world(2).run(lambda me: check(Call(same, me, top_k=top_k), False))
    for (got, fewer), (want, more) in zip(on(path, lambda c: check(c, True), top_k=top_k), plain, strict=True):
        close(got, want)
        assert fewer == more if top_k == 1 else fewer < 0.6 * more


@pytest.mark.parametrize("path", PATHS)
def test_the_result_may_be_changed_in_place(path):
    def check(call):
        x1, x2 = (tokens(6).requires_grad_() for _ in range(2))
        y1 = call(x1) + x1
        y2 = call(x2)
        y2 += x2
        same_bits(y2.detach(), y1.detach())
        y2.mul_(2)
        for got, want in zip(gradients(call, y2.sum(), x2), gradients(call, 2 * y1.sum(), x1), strict=True):
            close(got, want)

    on(path, check)


@pytest.mark.parametrize("path", MODULES)
def test_functional_call(path):
    def check(call):
        x = tokens(6)
        parameters = {name: (2 * p.detach()).requires_grad_() for name, p in call.module.named_parameters()}
        y = torch.func.functional_call(call.module, parameters, (x,))
        got = torch.autograd.grad(y.square().sum(), list(parameters.values()))
        with torch.no_grad():
            for p in call.module.parameters():
                p.mul_(2)
        want_y = call.module(x)
        same_bits(y.detach(), want_y.detach())
        for g, w in zip(got, torch.autograd.grad(want_y.square().sum(), list(call.module.parameters())), strict=True):
            same_bits(g, w)

    on(path, check)


TRANSFORMS = {
    "grad": lambda call, x: torch.func.grad(lambda x: call(x).square().sum())(x),
    "vjp": lambda call, x: torch.func.vjp(call, x),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
    "vmap": lambda call, x: torch.func.vmap(call)(torch.stack([x, x])),
    "jacrev": lambda call, x: torch.func.jacrev(call)(x),
}


@pytest.mark.parametrize("path", TRANSPARENT)
def test_grad_and_vjp_of_torch_func_on_one_rank(path):
    def check(call):
        x = tokens(6).requires_grad_()
        y = call(x)
        (want,) = torch.autograd.grad(y.square().sum(), x)
        close(torch.func.grad(lambda x: call(x).square().sum())(x.detach()), want)
        seen, back = torch.func.vjp(call, x.detach())
        same_bits(seen.detach(), y.detach())
        close(back(2 * seen)[0], want)
        with pytest.raises(NotImplementedError, match="no derivative"):
            torch.func.grad(lambda x: torch.func.grad(lambda x: call(x).square().sum())(x).sum())(x.detach())

    on(path, check)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_expert_size": 8, "capacity_factor": 1.0, "aux_loss_coef": 0.1},
        {"aux_loss_coef": 0.1, "balance": "sequence"},
        {"aux_loss_coef": 0.1, "balance": "global"},
    ],
)
def test_torch_func_gives_the_gradients_of_parameters_and_of_a_loss_that_is_taken_inside(options):
    layer, x = make(**options), tokens(6)

    def loss(parameters):
        y = torch.func.functional_call(layer, parameters, (x,))
        return y.square().sum() + aux_loss(layer)

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    got, value = torch.func.grad_and_value(loss)(parameters)
    want = layer(x).square().sum() + aux_loss(layer)
    close(value, want.detach())
    for g, w in zip(got.values(), torch.autograd.grad(want, list(layer.parameters())), strict=True):
        close(g, w)
    assert aux_loss(layer) == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_another_transform_of_torch_func_is_refused_by_name_and_the_next_call_is_right(path, transform):
    if path in TRANSPARENT and transform in ("grad", "vjp", "jacrev"):
        pytest.skip("sees through; of jacrev torch says that its vmap has no rule for the backward")

    def check(call):
        before = call(tokens(6)).detach()
        with pytest.raises(ConfigError) as caught:
            TRANSFORMS[transform](call, tokens(6))
        assert caught.value.field == "transform"
        same_bits(call(tokens(6)).detach(), before)

    on(path, check)


@pytest.mark.parametrize("path", ["ranks", "tickets", "block"])
def test_a_transform_on_one_rank_is_refused_on_all(path):
    def rank(me):
        call = Call(path, me)
        with pytest.raises(ConfigError):
            (TRANSFORMS["vjp"] if me.rank == 1 else Call.__call__)(call, tokens(6))
        call(tokens(6))

    virtual_world(2).run(rank)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_takes_any_floating_x_and_computes_in_its_dtype(path, dtype):
    def check(call):
        x = tokens(9).to(dtype).requires_grad_()
        routing = call.layer.router(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(x)
        assert y.dtype == (dtype if path.endswith("block") else torch.bfloat16), "a block adds its input"
        grads = gradients(call, y.float().square().sum(), x)
        assert grads[0].dtype == dtype and all(g.dtype == torch.float32 for g in grads[1:])
        assert all(g.isfinite().all() for g in grads)
        if path in ONE_RANK:
            want = oracle.moe(x, routing.topk_ids_TK, routing.topk_weights_TK, *call.weights)
            close(call.routed(x, y).detach(), want.detach(), torch.bfloat16)

    on(path, check, dtype=torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_autocast_leaves_float64_alone_and_refuses_a_mixture(path):
    def check(call):
        x = tokens(9)
        want = call(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same_bits(call(x).detach(), want.detach())
            for bad in (x.to(torch.int64), x.to(torch.complex64)):
                with pytest.raises(ConfigError) as caught:
                    call(bad)
                assert caught.value.field == "x.dtype"

    on(path, check)

    def mixed(call):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError) as caught:
            call(tokens(9))
        assert caught.value.field == "x.dtype"

    on(path, mixed, dtype=torch.float32)


LAYOUTS = {
    "every other column": lambda: torch.randn(6, 2 * D, dtype=torch.float64)[:, ::2],
    "columns of a wider one": lambda: torch.randn(6, D + 3, dtype=torch.float64)[:, 1 : D + 1],
    "expanded": lambda: tokens(1).expand(6, D),
    "transposed": lambda: torch.randn(D, 6, dtype=torch.float64).T,
    "offset by one": lambda: torch.randn(6 * D + 1, dtype=torch.float64)[1:].view(6, D),
    "every other row": lambda: tokens(12)[::2],
    "backwards": lambda: tokens(6).flip(0),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_x_and_of_the_gradient(path, layout):
    def check(call):
        torch.manual_seed(1)
        x = LAYOUTS[layout]().detach().requires_grad_()
        plain = x.detach().contiguous().clone().requires_grad_()
        y, want = call(x), call(plain)
        close(y.detach(), want.detach())
        torch.manual_seed(2)
        seed = LAYOUTS[layout]()
        got = torch.autograd.grad(y, [x, *call.weights], seed)
        for g, w in zip(got, torch.autograd.grad(want, [plain, *call.weights], seed.contiguous()), strict=True):
            close(g, w)

    on(path, check)


@pytest.mark.parametrize("path", PATHS)
def test_x_without_a_gradient(path):
    def check(call):
        with_x, without = tokens(6).requires_grad_(), tokens(6)
        want = gradients(call, call(with_x).square().sum())
        for got, expected in zip(gradients(call, call(without).square().sum()), want, strict=True):
            same_bits(got, expected)

    on(path, check)


@pytest.mark.parametrize("path", PATHS)
def test_zero_tokens(path):
    def check(call):
        x = tokens(0).requires_grad_()
        y = call(x)
        assert y.shape == (0, D)
        y += x
        grads = gradients(call, y.sum(), x)
        assert grads[0].shape == (0, D) and not any(g.any() for g in grads)

    on(path, check)


BAD = {
    "integers": ("x.dtype", lambda: torch.zeros(6, D, dtype=torch.int64)),
    "booleans": ("x.dtype", lambda: torch.zeros(6, D, dtype=torch.bool)),
    "another dtype": ("x.dtype", lambda: tokens(6).float()),
    "another device": ("x.device", lambda: tokens(6).to("meta")),
    "too wide": ("x.shape[-1]", lambda: torch.zeros(6, D + 1, dtype=torch.float64)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_the_same_name_and_the_next_call_is_right(path, case):
    field, bad = BAD[case]

    def check(call):
        before = call(tokens(6)).detach()
        with pytest.raises(ConfigError) as caught:
            call(bad())
        assert caught.value.field == field
        same_bits(call(tokens(6)).detach(), before)

    on(path, check)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(path, mode):
    def check(call):
        x = tokens(6).requires_grad_()
        want = call(x)
        with mode():
            y = call(x)
            assert not y.requires_grad
            same_bits(y.clone(), want.detach())
            y += 1

    on(path, check)


@pytest.mark.parametrize("path", PATHS)
def test_a_second_backward_needs_a_graph_that_was_kept(path):
    def check(call):
        x = tokens(6).requires_grad_()
        loss = call(x).square().sum()
        first = torch.autograd.grad(loss, [x, *call.weights], retain_graph=True)
        for got, want in zip(torch.autograd.grad(loss, [x, *call.weights]), first, strict=True):
            same_bits(got, want)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, [x, *call.weights])

    if path in ONE_RANK:  # where ranks exchange, the error is that of the rank: its transport is closed
        on(path, check)
        return

    def kept(call):
        x = tokens(6).requires_grad_()
        loss = call(x).square().sum()
        first = torch.autograd.grad(loss, [x, *call.weights], retain_graph=True)
        for got, want in zip(torch.autograd.grad(loss, [x, *call.weights]), first, strict=True):
            same_bits(got, want)

    on(path, kept)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", ["sum", "square"])
@pytest.mark.parametrize("frozen", [False, True])
def test_double_backward_is_refused(path, loss, frozen):
    def check(call):
        call.module.requires_grad_(not frozen)
        x = tokens(6).requires_grad_()
        y = call(x)
        value = y.sum() if loss == "sum" else y.square().sum()
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable|no derivative"):
            (grad.square().sum() + x.pow(3).sum()).backward()

    on(path, check)


@pytest.mark.parametrize("path", PATHS)
def test_hooks_of_the_result_of_x_and_of_the_weights_are_called_once(path):
    def check(call):
        seen = []
        x = tokens(6).requires_grad_()
        x.register_hook(lambda g: seen.append(("x", g.clone())))
        for weight in call.weights:
            weight.register_hook(lambda g: seen.append(("weight", g.clone())))
            weight.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", p.grad.clone())))
        y = call(x)
        y.register_hook(lambda g: seen.append(("y", g.clone())) or 2 * g)
        y.sum().backward()
        assert sorted(name for name, _ in seen) == ["accumulated"] * 2 + ["weight"] * 2 + ["x", "y"]
        assert seen[0][0] == "y"
        by_name = dict(seen)
        same_bits(by_name["x"], x.grad)

    on(path, check)


@pytest.mark.parametrize("path", MODULES)
def test_hooks_of_the_module(path):
    def check(call):
        seen = []
        call.module.register_forward_pre_hook(lambda m, args: (2 * args[0], *args[1:]))
        call.module.register_forward_hook(lambda m, args, y: 3 * y)
        call.module.register_full_backward_pre_hook(lambda m, g: seen.append("pre"))
        call.module.register_full_backward_hook(lambda m, dx, dy: seen.append("full"))
        x = tokens(6).requires_grad_()
        y = call(x)
        twin = Call(path, None) if path in ONE_RANK else None
        if twin is not None:
            same_bits(y.detach(), 3 * twin(2 * x.detach()).detach())
        y.sum().backward()
        assert seen == ["pre", "full"] and x.grad.isfinite().all()

    on(path, check)


# ---------------------------------------------------------------- what only the functional form has


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_a_penalty_on_a_gradient_through_constant_weights_is_refused(schedule):
    """Nothing that comes into the backward needs a gradient, and yet x stands in it."""
    layer, x = make(), tokens(6).requires_grad_()
    routing = layer.router(x.detach())
    constant = [one.detach() for one in (routing.topk_weights_TK, *layer.expert_weights)]
    y = moe_forward(x, routing.topk_ids_TK, *constant, schedule=schedule)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|no derivative"):
        (grad.square().sum() + x.pow(3).sum()).backward()


@pytest.mark.parametrize("path", ["functional", "functional ranks"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
def test_an_id_of_others_may_mean_unused(path, dtype):
    """transformers marks a dropped slot with the number of experts."""

    def check(call):
        x = tokens(6)
        routing = call.layer.router(x)
        ids = routing.topk_ids_TK.to(dtype)
        dropped = torch.tensor([[True, False]] * 3 + [[False, False]] * 2 + [[True, True]])
        rest = (routing.topk_weights_TK.detach(), *call.weights)
        want = moe_forward(x, ids.masked_fill(dropped, -1), *rest, transport=call.transport)
        for unused in (E, 100, -7):
            got = moe_forward(x, ids.masked_fill(dropped, unused), *rest, transport=call.transport, unused_id=unused)
            same_bits(got.detach(), want.detach())
        with pytest.raises(ConfigError, match="topk_ids"):
            moe_forward(x, ids.masked_fill(dropped, E), *rest, transport=call.transport)
        for bad in (0, E - 1, "E"):
            with pytest.raises(ConfigError) as caught:
                moe_forward(x, ids, *rest, transport=call.transport, unused_id=bad)
            assert caught.value.field == "unused_id"

    on(path, check)


@pytest.mark.parametrize("field", ["topk_ids", "topk_weights"])
@pytest.mark.parametrize("path", ["functional", "functional ranks"])
def test_a_choice_that_does_not_fit(path, field):
    bad = {
        "topk_ids": [torch.full((4, 2), E), torch.full((4, 2), -2), torch.full((4, 2), 2**32), torch.zeros(4, 2),
                     torch.zeros(3, 2, dtype=torch.int64)],
        "topk_weights": [torch.ones(4, 3), torch.ones(4, 2, dtype=torch.int64), torch.ones(4, 2, device="meta")],
    }  # fmt: skip

    def check(call):
        for one in bad[field]:
            given = {"topk_ids": torch.zeros(4, 2, dtype=torch.int64), "topk_weights": torch.ones(4, 2)} | {field: one}
            with pytest.raises(ConfigError) as caught:
                moe_forward(tokens(4), *given.values(), *call.weights, transport=call.transport)
            assert caught.value.field == field

    on(path, check)
