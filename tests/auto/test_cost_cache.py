"""The cache of cost models: a file for each thing that was measured, and none that is believed blindly."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_overlap import ShortcutBlock
from moe_overlap.auto import auto, cost_cache
from moe_overlap.auto import calibrate as measuring
from moe_overlap.commands import cli
from moe_overlap.layer.shortcut import SharedExpertOp
from tests.auto.planted import cost_model, planted
from tests.layers import D, F, make, tokens
from tests.ranks import virtual_world


def used(calls, **options):
    """How many calibrations a fresh layer needs on each of two ranks."""
    before = len(calls)
    tokens_of = options.pop("tokens", 8)

    def rank(me):
        layer = make(me.transport(), schedule="auto", **options)
        layer(tokens(tokens_of, dtype=options.get("dtype", torch.float64)))
        return layer.schedule.kept_in

    kept = virtual_world(2).run(rank)
    assert kept[1] is None
    return (len(calls) - before) / 2, kept[0]


def test_an_equal_key_is_not_measured_again_and_another_is(cache):
    with planted(cost_model()) as calls:
        assert used(calls) == (1, *cache.glob("*.json"))
        assert used(calls)[0] == 0
        for options in ({"tokens": 9}, {"dtype": torch.float32}, {"shared_expert_size": F}, {"activation": "relu"}):
            assert used(calls, **options)[0] == 1, options
        with torch.no_grad():
            assert used(calls)[0] == 1
        assert used(calls)[0] == 0
    assert len(list(cache.iterdir())) == 6, "and nothing else is left in the directory"


class Linear(nn.Linear):
    """The same parameters as its parent's, and perhaps another cost."""


def frozen(module):
    return module.requires_grad_(False)


def linear(width=D, kind=nn.Linear):
    return kind(D, width, dtype=torch.float64) if width == D else nn.Sequential(linear(), Wide(width))


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = (nn.Linear(*sizes, dtype=torch.float64) for sizes in ((D, width), (width, D)))

    def forward(self, h):
        return self.down(self.up(h))


def kept_in(shape=(8, D), *, ops=None, change=None, x_grad=True, grad=True, pre_norm=None, **options):
    """Rank 0's file of a layer, or of a block with these ops beside it."""

    def rank(me):
        layer = make(me.transport(), schedule="auto" if ops is None else "serial", **options)
        if change is not None:
            change(layer)
        model = layer if ops is None else ShortcutBlock(ops(), layer, tap=0, schedule="auto", pre_norm=pre_norm)
        x = torch.randn(*shape, dtype=options.get("dtype", torch.float64)).requires_grad_(x_grad)
        with torch.set_grad_enabled(grad):
            model(x)
        return model.schedule.kept_in, model.schedule.not_kept

    return virtual_world(2).run(rank)[0]


def frozen_experts(layer):
    for weight in layer.expert_weights:
        weight.requires_grad_(False)


def other_shared(layer):
    layer.shared_expert = nn.Sequential(Linear(D, D, dtype=torch.float64))


BLOCK = {"ops": lambda: [linear()]}
DETACHED = BLOCK | {"pre_norm": torch.Tensor.detach}  # the experts' x has no gradient, whatever h has
SHARED = {"shared_expert_size": F}
KEYS = {
    "tokens": ({}, {"shape": (9, D)}),
    "dtype": ({}, {"dtype": torch.float32}),
    "activation": ({}, {"activation": "relu"}),
    "gradients": ({}, {"grad": False}),
    "no_gradient_of_x": ({}, {"x_grad": False}),
    "frozen_experts": ({}, {"change": frozen_experts}),
    "frozen_router": ({}, {"change": lambda layer: frozen(layer.router)}),
    "a_shared_expert": ({}, SHARED),
    "width_of_the_shared_expert": (SHARED, {"shared_expert_size": 2 * F}),
    "frozen_shared_expert": (SHARED, SHARED | {"change": lambda layer: frozen(layer.shared_expert)}),
    "type_of_the_shared_expert": (SHARED, SHARED | {"change": other_shared}),
    "number_of_ops": (BLOCK, {"ops": lambda: [linear(), linear()]}),
    "width_of_an_op": (BLOCK | {"ops": lambda: [linear(4)]}, {"ops": lambda: [linear(8)]}),
    "type_of_an_op": (BLOCK, {"ops": lambda: [linear(kind=Linear)]}),
    "frozen_op": (BLOCK, {"ops": lambda: [frozen(linear())]}),
    "no_gradient_of_h": (DETACHED, DETACHED | {"x_grad": False}),
    "shape_of_h": (BLOCK, BLOCK | {"shape": (2, 4, D)}),
}


@pytest.mark.parametrize("field", KEYS)
def test_what_a_measurement_depends_on_has_a_file_of_its_own(field):
    first, second = KEYS[field]
    ops = 0 if "ops" not in first else 1
    with planted(cost_model(ops)):
        one, again = kept_in(**first), kept_in(**first)
    with planted(cost_model(2 if field == "number_of_ops" else ops)):
        other = kept_in(**second)
    assert one == again and one[0] is not None
    assert other[0] not in (None, one[0])


@pytest.mark.parametrize("names", ["aabb", "abab", "abcd"])
def test_ranks_that_share_a_host_are_told_from_ranks_that_do_not(names, monkeypatch):
    local = threading.local()
    monkeypatch.setattr(cost_cache, "host_name", lambda: local.name)

    def rank(me):
        local.name = f"host {names[me.rank]} of this run"
        return cost_cache.hosts_of(me.transport(), torch.device("cpu"))

    assert virtual_world(4).run(rank) == [["abcd".index(name) for name in names]] * 4


def test_another_layout_of_the_hosts_is_another_file(monkeypatch):
    with planted(cost_model()):
        one = kept_in()
        monkeypatch.setattr(auto, "hosts_of", lambda *_: [0, 1])
        assert one[0] != kept_in()[0]


@pytest.mark.parametrize(("name", "value"), [("MOE_OVERLAP_EXCHANGE_SMS", "8"), ("MOE_OVERLAP_TILES", "dealt")])
def test_what_kernels_leave_to_exchanges_is_another_file(name, value, monkeypatch):
    with planted(cost_model()):
        one = kept_in()
        monkeypatch.setenv(name, value)
        assert kept_in()[0] not in (None, one[0])


@pytest.mark.parametrize(
    ("ops", "why"),
    [
        (lambda: [torch.tanh], "a function"),
        (lambda: [linear(), nn.Sequential(nn.ReLU())], "Sequential, which has no parameters"),
        (
            lambda: [SharedExpertOp(torch.tanh, D, gated=True, reference=torch.ones(1, dtype=torch.float64))],
            "a function",
        ),
    ],
)
def test_ops_whose_cost_no_key_tells_are_measured_each_time(ops, why, cache):
    """Nothing is read and nothing kept, though a file of that name would be there."""
    with planted(cost_model(len(ops()))) as calls:
        for number in (1, 2):
            path, reason = kept_in(ops=ops)
            assert path is None and why in reason and len(calls) == 2 * number
    assert not cache.exists()


BAD_TEXTS = ["", "{", "[]", '{"key": 1}', "null", "\0" * 40, "[" * 100_000, b"\xff\xfe"]
BAD_ENTRIES = {
    "other_key": lambda entry: entry.update(key={}),
    "no_model": lambda entry: entry.update(model={}),
    "huge_rows": lambda entry: entry["model"].update(measured_rows=10**400),
    "huge_slowdown": lambda entry: entry["model"]["slowdown"].update(compute=10**400),
    "absurd_slowdown": lambda entry: entry["model"]["slowdown"].update(wire=1e308),
    "no_wire": lambda entry: entry["model"].update(exchange={}),
    "other_wire": lambda entry: entry["model"].update(exchange={"intra": entry["model"]["experts"]}),
    "an_op": lambda entry: entry["model"].update(backbone_s=[1e-3], backbone_backward_s=[1e-3]),
    "many_ops": lambda entry: entry["model"].update(backbone_s=[1e-3] * 300, backbone_backward_s=[1e-3] * 300),
    "long_source": lambda entry: entry["model"].update(source="x" * 100_000),
    "source_of_odd_characters": lambda entry: entry["model"].update(source="\ud800"),
    "a_truth_as_slowdown": lambda entry: entry["model"]["slowdown"].update(wire=True),
    "a_text_as_slowdown": lambda entry: entry["model"]["slowdown"].update(wire="1"),
    "an_op_in_one_phase": lambda entry: entry["model"].update(backbone_s=[1e-3]),
} | {
    f"alpha_{str(bad)[:8]}": lambda entry, bad=bad: entry["model"]["exchange"]["inter"].update(alpha_s=bad)
    for bad in (10**400, 1e308, 1e10, -1, 5e-324, -1e-19, True, "1", None, float("nan"))
}  # fmt: skip


@pytest.mark.parametrize("bad", [*BAD_TEXTS, *BAD_ENTRIES], ids=lambda bad: str(bad)[:40])
def test_a_file_that_cannot_be_used_is_measured_again(bad, cache, caplog):
    with planted(cost_model()) as calls:
        _, path = used(calls)
        text = bad
        if bad in BAD_ENTRIES:
            entry = json.loads(path.read_text())
            BAD_ENTRIES[bad](entry)
            text = json.dumps(entry)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert used(calls)[0] == 1
        assert "measuring again" in caplog.text and str(path) in caplog.text
        assert used(calls)[0] == 0


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "huge", "of a process"])
def test_what_is_no_file_of_ours_is_neither_waited_for_nor_replaced(kind, cache, caplog, monkeypatch):
    """A file of another kind in the cache's place: measured again, kept for this process, with the reason."""
    monkeypatch.setattr(cost_cache, "_unwritten", {})
    with planted(cost_model()) as calls:
        _, path = used(calls)
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "huge":
            with open(path, "wb") as file:
                file.truncate(1 << 40)  # sparse
        else:
            path.symlink_to("/proc/self/stat")
        before = path.lstat()
        assert used(calls)[0] == 1
        assert "measuring again" in caplog.text and str(path) in caplog.text
        if kind != "huge":
            assert "cannot be written" in caplog.text and path.lstat().st_ino == before.st_ino
        assert used(calls)[0] == 0


def test_a_directory_that_cannot_be_written_costs_one_measurement_a_process(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cost_cache, "_unwritten", {})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_OVERLAP_CACHE_DIR", str(tmp_path / "file" / "below"))
    with planted(cost_model()) as calls:
        assert used(calls) == (1, None)
        assert "cannot be written" in caplog.text
        assert used(calls)[0] == 0


def test_a_user_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cost_cache, "_unwritten", {})
    for name in ("MOE_OVERLAP_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with planted(cost_model()) as calls:
        assert used(calls) == (1, None)


@pytest.mark.parametrize("frozen_part", ["nothing", "x", "experts", "everything"])
def test_probes_compute_the_gradients_that_the_step_needs(frozen_part):
    """Whatever is frozen, all of backward's schedule runs, as it does in a step."""
    found = []

    def rank(me):
        layer = make(me.transport(), schedule="auto")
        if frozen_part in ("experts", "everything"):
            frozen_experts(layer)
        if frozen_part == "everything":
            frozen(layer.router)
        x = tokens(8, me.rank).requires_grad_(frozen_part in ("nothing", "experts"))
        layer(x).sum().backward()
        return x.grad is not None

    def fitted(joined, *_, **__):
        found.append(joined[0].seconds)
        return cost_model()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "ROUNDS", (1, 1))
        patch.setattr(measuring, "fit", fitted)
        with_dx = virtual_world(2).run(rank)
    seconds = found[0]
    assert with_dx == [seconds["Dt0"] > 0] * 2 and seconds["Ct0"] > 0 and seconds["Ed0"] > 0


def test_clear_removes_what_was_kept_and_nothing_else(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MOE_OVERLAP_CACHE_DIR", str(tmp_path))
    for name in (f"{'0a' * 12}.json", f"{'1b' * 12}.json", "notes.json"):
        (tmp_path / name).write_text("{}")
    assert cli.main(["calibrate", "--clear"]) == 0
    assert "removed 2 cost models" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]
    assert cli.main(["calibrate", "--clear", "--ranks", "4"]) == 2


def test_a_model_of_a_busy_machine_is_used_and_not_kept(cache):
    """Another process, which has nothing else beside it, measures anew."""
    with planted(cost_model(misfit=0.3)) as calls:
        path, reason = kept_in()
        assert path is None and "30% wrong, over 25%" in reason and not list(cache.glob("*"))
        kept_in()
        assert len(calls) == 2 * 2, "on two ranks, twice"
    with planted(cost_model(misfit=0.2)):
        assert kept_in()[0] is not None
