"""`bench layer` from end to end on small sizes: files, keys, correctness, the ways in which it ends."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from moe_overlap.commands.bench import check, layer, phase, setting
from moe_overlap.commands.bench.cases import BlockPair, Sizes
from moe_overlap.commands.bench.planned import CasePlan
from moe_overlap.commands.bench.routing import load
from moe_overlap.commands.bench.rows import KEYS, flag_of
from moe_overlap.launch.launch import World
from moe_overlap.measure.report import read_jsonl
from moe_overlap.schedule.builders import serial
from moe_overlap.transport.local import LocalTransport
from tests.ranks import gloo_pool
from tests.tolerances import TOLERANCES

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = "--tokens 96 --hidden 64 --ffn 64 --experts 4 --repeats 2".split()
ISSUE_KEYS = (
    "case schedule phase routing chunks slot time_ms_median time_ms_p10 time_ms_p90 serial_ms nocomm_ms bound_ms "
    "comm_share exposed_ms overlap_eff timeline_overlap headroom speedup_vs_serial speedup_vs_top2 comm_cpu_ms "
    "payload_bytes meta_bytes peak_mem_mb bit_equal max_rel_err ranks ranks_per_node threads tokens hidden ffn experts "
    "top_k dtype repeats compute flagged hardware link torch commit date"
).split()
ROWS = [
    ("top2", "serial", 1),
    ("top2", "chunked", 2),
    ("top2", "chunked", 4),
    ("top2", "chunked", 8),
    ("shared1", "serial", 1),
    ("shared1", "shared_expert", 1),
    ("scmoe_pos2", "serial", 1),
    ("scmoe_pos2", "shortcut", 1),
]


def start(words, **more) -> subprocess.Popen:
    command = [sys.executable, *more.pop("before", ["-m", "moe_overlap"]), "bench", "layer", *words]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen, limit_s: float = 900.0) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=limit_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def on_ranks(ranks: int, words: list[str]) -> str:
    """What rank 0 says on stderr, of ranks that are there already. The run is to be right."""
    ended = gloo_pool(ranks).run(one_of_them, [*words, "--ranks", str(ranks)], limit_s=900.0)
    assert [status for status, _ in ended] == [0] * ranks, ended
    return ended[0][1]


def one_of_them(argv: list[str]) -> tuple[int, str]:
    rank = dist.get_rank()
    world = World(rank=rank, size=dist.get_world_size(), local_rank=rank, group=dist.group.WORLD)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        status = layer.run_rank(world, argv)
    return status, said.getvalue()


def test_two_ranks_over_a_link(tmp_path):
    status, out, err = finish(start([*SMALL, "--link", "200mbit:100us", "--out", str(tmp_path)]))
    assert status == 0, err
    rows = read_jsonl(tmp_path / "results.jsonl")
    assert [(r["case"], r["schedule"], r["chunks"]) for r in rows] == ROWS * 2
    assert [r["phase"] for r in rows] == ["infer"] * 8 + ["train"] * 8
    for row in rows:
        assert list(row) == KEYS and set(ISSUE_KEYS) <= set(KEYS)
        assert row["bit_equal"] is True and 0 < row["max_rel_err"] < 2e-2
        assert row["time_ms_p10"] <= row["time_ms_median"] <= row["time_ms_p90"]
        assert (row["bound_ms"] is None) == (row["schedule"] == "serial")
        assert row["overlap_eff"] == 0 or row["schedule"] != "serial"
        assert (row["slot"] is None) == (row["case"] == "top2" or row["case"] + row["schedule"] == "shared1serial")
        assert (row["ranks"], row["tokens"], row["repeats"], row["compute"]) == (2, 96, 2, "real")
        assert row["link"] == "emulated 200mbit:100us" and row["routing"] == "balanced" and row["dtype"] == "bf16"
        # The first choices of a round robin over two are every second expert.
        assert row["max_over_mean"] == (1.0 if row["case"] == "top2" else 2.0) and row["local_share"] == 0.5
        assert row["router"] is None and row["mu"] is None
        assert row["exposed_ms"] >= 0 and 0 <= row["timeline_overlap"] <= 1 and row["meta_bytes"] > 0
        # At least h, 2 F wide in bf16, of the rows of every slot.
        least_mb = 96 * (2 if row["case"] == "top2" else 1) * 2 * 64 * 2 / 2**20
        assert least_mb <= row["rows_peak_mb"] + 1e-3 and row["rows_peak_mb"] < row["peak_mem_mb"]
        if row["flagged"] in ("inflated", "oversubscribed"):
            assert row["speedup_vs_serial"] is None and row["speedup_vs_top2"] is None
        else:
            assert row["speedup_vs_serial"] == pytest.approx(row["serial_ms"] / row["time_ms_median"], rel=1e-3)
    # Half of the (token, expert) pairs go to the other rank, and come back; backward does it again. ScMoE sends half.
    top2 = 96 * 64 * 2 * 2
    assert [r["payload_bytes"] for r in rows] == [top2] * 4 + [top2 // 2] * 4 + [2 * top2] * 4 + [top2] * 4
    assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"
    spans = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"attn1", "D0", "C1", "E0", "shared", "mlp'", "W0", "N"} <= {event["name"] for event in spans}
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["results.jsonl"]
    assert "scmoe_pos2" in out and "solving" not in err and "round 2 of 2" in err


def test_the_planner_predicts_every_row_and_adds_its_own(tmp_path):
    words = "--schedules serial,chunked,shortcut,auto --cases top2,scmoe_pos2 --link 20mbit:100us".split()
    err = on_ranks(2, [*SMALL, *words, "--out", str(tmp_path)])
    rows = read_jsonl(tmp_path / "results.jsonl")
    for phase_name in ("infer", "train"):
        for case in ("top2", "scmoe_pos2"):
            mine = {r["schedule"]: r for r in rows if (r["phase"], r["case"]) == (phase_name, case)}
            assert {"serial", "auto"} <= set(mine) <= {"serial", "chunked", "shortcut", "auto", "mirrored"}
            assert "mirrored" not in mine or phase_name == "train"
            for row in mine.values():
                assert list(row) == KEYS and row["bit_equal"] is True
                assert row["predicted_ms"] > 0 and (row["backward_chunks"] is None) == (phase_name == "infer")
            # Predicted before timing, by one model: nothing it knows is faster than what it chose.
            best = min(row["predicted_ms"] for row in mine.values())
            assert mine["auto"]["predicted_ms"] <= 1.05 * best
            assert mine["auto"]["predicted_ms"] <= mine["serial"]["predicted_ms"]
    assert "calibrating scmoe_pos2" in err and "auto for top2: P D0" in err


def test_it_predicts_deduplicated_rows_too(tmp_path):
    words = "--schedules serial,auto --cases top2 --phases train --link 20mbit:100us".split()
    choice = "--experts 8 --top-k 4 --dedup on".split()
    err = on_ranks(2, [*SMALL, *words, *choice, "--out", str(tmp_path)])
    rows = {row["schedule"]: row for row in read_jsonl(tmp_path / "results.jsonl")}
    assert {"serial", "auto"} <= set(rows) <= {"serial", "auto", "mirrored"} and "auto for top2: P M D0" in err
    for row in rows.values():
        assert row["dedup"] == "on" and row["row_meta_bytes"] > 0 and row["bit_equal"] is True
        assert 0 < rows["auto"]["predicted_ms"] <= 1.001 * row["predicted_ms"]


def test_a_share_is_solved_for(tmp_path):
    words = "--phases infer --cases top2 --schedules serial --comm-share 0.6".split()
    err = on_ranks(2, [*SMALL, *words, "--out", str(tmp_path)])
    (row,) = read_jsonl(tmp_path / "results.jsonl")
    assert row["link"].startswith("emulated ") and row["link"].endswith(":50us")
    assert "solving for the link of a 60% share" in err
    # What a busy machine makes of steps of a few milliseconds is no matter of the solver's: see test_wires.py.
    assert row["comm_share"] is not None


def test_a_row_to_each_node(tmp_path):
    words = "--ranks-per-node 2 --compute slept --cases top2 --phases train --schedules serial,chunked".split()
    choice = "--experts 8 --top-k 4 --routing uniform --dedup hierarchical --link 1gbit".split()
    on_ranks(4, [*SMALL, *words, *choice, "--out", str(tmp_path)])
    rows = read_jsonl(tmp_path / "results.jsonl")
    assert [(r["schedule"], r["chunks"]) for r in rows] == [(name, chunks) for _, name, chunks in ROWS[:4]]
    ids = [load("uniform", out="", tokens=96, experts=8, top_k=4, rank=rank, ranks=4)[0] for rank in range(4)]
    # To the other node, and back from this node to the rank in the same place there; backward does it again.
    away = [int((one // 4 == 1 - rank // 2).any(dim=1).sum()) for rank, one in enumerate(ids)]
    across = [2 * (away[rank] + away[(rank + 2) % 4]) * 64 * 2 for rank in range(4)]
    for row in rows:
        assert row["dedup"] == "hierarchical" and row["routing"] == "uniform" and row["bit_equal"] is True
        assert row["inter_node_bytes"] == max(across) < row["payload_bytes"]
        assert row["row_meta_bytes"] > 0


def test_a_saved_routing_is_replayed_and_its_spread_is_in_the_rows(tmp_path):
    """Uneven tokens of four ranks on two nodes; the bytes are those of the routing, and the key of its training too."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.rand(150, 4, generator=generator).topk(2).indices.to(torch.int32)
    ids[3, 0] = ids[7, 1] = -1
    counts = [60, 10, 50, 30]
    metadata = {"E": "4", "K": "1", "rank_tokens": json.dumps(counts), "router": "locmoe", "mu": "0.25"}
    path = tmp_path / "routing.safetensors"
    save_file({"ids": ids, "weights": torch.full((150, 2), 0.5)}, path, metadata)
    words = "--ranks-per-node 2 --compute slept --cases top2,shared1 --phases infer --schedules serial".split()
    on_ranks(4, [*SMALL, *words, "--experts", "4", "--routing", str(path), "--link", "1gbit", "--out", str(tmp_path)])
    whose = [row.tolist() for row in ids.split(counts)]
    for row, width in zip(read_jsonl(tmp_path / "results.jsonl"), (2, 1), strict=True):
        mine = [[part[t % len(part)][:width] for t in range(96)] for part in whose]
        chosen = [(rank, e) for rank, rows in enumerate(mine) for choices in rows for e in choices if e >= 0]
        most = max(sum(e == expert for _, e in chosen) for expert in range(4))
        near = sum(rank // 2 == e // 2 for rank, e in chosen) / len(chosen)
        assert (row["router"], row["mu"], row["routing"]) == ("locmoe", 0.25, "routing.safetensors")
        assert row["max_over_mean"] == pytest.approx(most * 4 / len(chosen), abs=1e-4)
        assert row["local_share"] == pytest.approx(near, abs=1e-4)
        moved = [[sum(r == a and e == b for r, e in chosen) for b in range(4)] for a in range(4)]
        across = [sum(moved[a][b] + moved[b][a] for b in range(4) if a // 2 != b // 2) for a in range(4)]
        assert row["inter_node_bytes"] == max(across) * 64 * 2


def test_slept_compute_is_labelled_and_not_oversubscribed(tmp_path):
    words = "--ranks-per-node 2 --compute slept --cases scmoe_pos2 --phases train".split()
    on_ranks(4, [*SMALL, *words, "--link", "1gbit", "--out", str(tmp_path)])
    rows = read_jsonl(tmp_path / "results.jsonl")
    assert [(r["case"], r["schedule"]) for r in rows] == [("scmoe_pos2", "serial"), ("scmoe_pos2", "shortcut")]
    assert {row["compute"] for row in rows} == {"slept"} and all(row["bit_equal"] for row in rows)
    assert all(row["flagged"] != "oversubscribed" and row["ranks_per_node"] == 2 for row in rows)


def test_torchrun_gives_the_ranks(tmp_path):
    before = "-m torch.distributed.run --standalone --nproc-per-node 2 -m moe_overlap".split()
    words = [*SMALL, "--ranks", "7", "--phases", "infer", "--schedules", "serial", "--cases", "top2"]
    status, _, err = finish(start([*words, "--out", str(tmp_path)], before=before))
    assert status == 0, err
    (row,) = read_jsonl(tmp_path / "results.jsonl")
    assert (row["ranks"], row["case"], row["link"]) == (2, "top2", "none")


def test_a_killed_rank_ends_all(tmp_path):
    process = start(["--tokens", "2048", "--repeats", "500", "--link", "100mbit", "--out", str(tmp_path)])
    children: list[int] = []
    deadline = time.monotonic() + 200  # of a busy machine
    while len(children) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        children = ranks_of(process.pid)
    time.sleep(4.0)
    os.kill(children[-1], signal.SIGKILL)
    status, _, err = finish(process)
    assert status == 1 and "signal 9" in err, err
    assert not [child for child in children if os.path.exists(f"/proc/{child}")], "no orphan"
    assert not (tmp_path / "results.jsonl").exists()


def ranks_of(pid: int) -> list[int]:
    """Grandchildren of `pid` below the fork server, oldest first."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
    children = {child for child, parent in parents.items() if parent == pid}
    return sorted(child for child, parent in parents.items() if parent in children)


# ---------------------------------------------------------------- in this process, one rank


def one_rank(tmp_path, *words) -> int:
    return layer.main([*SMALL, "--ranks", "1", "--out", str(tmp_path), *words])


def test_one_rank_has_nothing_to_overlap(tmp_path):
    assert one_rank(tmp_path, "--cases", "top2,scmoe_pos1,scmoe_pos3", "--dtype", "fp64") == 0
    rows = read_jsonl(tmp_path / "results.jsonl")
    assert {row["case"] for row in rows} == {"top2", "scmoe_pos1", "scmoe_pos3"}
    for row in rows:
        assert row["bit_equal"] and row["max_rel_err"] < 1e-12 and row["payload_bytes"] == 0
        empty = ("comm_share", "exposed_ms", "timeline_overlap", "headroom")
        assert [row[key] for key in empty] == [None] * 4


def test_more_ranks_than_cores_claim_no_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(setting, "cores_here", lambda: 0)
    assert one_rank(tmp_path, "--phases", "infer", "--cases", "top2") == 0
    rows = read_jsonl(tmp_path / "results.jsonl")
    assert len(rows) == 4 and {row["flagged"] for row in rows} == {"oversubscribed"}
    assert {row["speedup_vs_serial"] for row in rows} == {row["speedup_vs_top2"] for row in rows} == {None}


@pytest.mark.parametrize("broken", ["bits", "numbers"])
def test_no_speed_on_a_failed_check(tmp_path, monkeypatch, capsys, broken):
    (tmp_path / "results.jsonl").write_text("{}\n")
    if broken == "bits":
        monkeypatch.setattr(phase, "same_bits", lambda a, b: False)
    else:
        monkeypatch.setattr(phase, "max_rel_err", lambda y, y64: math.nan)
    assert one_rank(tmp_path, "--phases", "infer") == 1
    said = capsys.readouterr()
    assert "correctness" in said.err and not (tmp_path / "results.jsonl").exists()


def test_the_limits_are_those_of_the_tolerance_table():
    assert check.MAX_REL_ERR == {dtype: TOLERANCES[dtype].rtol for dtype in check.MAX_REL_ERR}


def test_same_bits_tells_zero_from_minus_zero():
    zero = torch.zeros(3)
    assert check.same_bits([zero], [zero.clone()])
    assert not check.same_bits([zero], [-zero])
    assert not check.same_bits([zero], [zero, zero])


@pytest.mark.parametrize("case", ["top2", "shared1", "scmoe_pos1", "scmoe_pos2", "scmoe_pos3"])
def test_the_reference_sees_a_wrong_expert(case):
    sizes = Sizes(tokens=300, hidden=64, ffn=64, experts=4, top_k=2)
    ids, weights = load("zipf", out=".", tokens=300, experts=4, top_k=2, rank=0, ranks=4)
    model = BlockPair(case, sizes, ids, weights, LocalTransport(), dtype=torch.float32)
    if model.position:
        model.use(model.window_pair(1), model.moe.transport)
    x_TD = torch.randn(300, 64)
    double = check.reference(World(), model, ids, weights)
    with torch.no_grad():
        right = double(x_TD.double())
        assert check.max_rel_err(model(x_TD), right) < 1e-5
        model.moe.experts.down_proj[0] *= 1.01
        assert check.max_rel_err(model(x_TD), right) > 1e-5


def test_gradients_are_part_of_the_comparison():
    ids, weights = load("balanced", out=".", tokens=32, experts=4, top_k=2, rank=0, ranks=4)
    sizes = Sizes(tokens=32, hidden=64, ffn=64, experts=4, top_k=2)
    model = BlockPair("top2", sizes, ids, weights, LocalTransport(), dtype=torch.float32)
    model.use(serial(), model.moe.transport)
    x_TD, dy_TD = torch.randn(32, 64), torch.randn(32, 64)
    result = check.run(model, "train", x_TD, dy_TD)
    assert len(result) == 2 + len(list(model.parameters())), "y, dx, and every parameter's gradient"
    assert check.same_bits(result, check.run(model, "train", x_TD, dy_TD))


def test_the_gravest_flag_wins():
    names = ("oversubscribed", "inflated", "noisy", "drifted")
    for first, name in enumerate(names):
        assert flag_of(**{other: place >= first for place, other in enumerate(names)}) == name
    assert flag_of(**dict.fromkeys(names, False)) is None


@pytest.mark.parametrize(("serial_s", "drifted"), [(1.09, False), (1.11, True), (0.91, False), (0.89, True)])
def test_ten_percent_beside_the_calibration_is_drift(serial_s, drifted):
    assert CasePlan(schedule=None, exchange=None, serial_s=1.0).drifted(serial_s) == drifted


def test_a_case_that_drifted_says_so_and_keeps_its_speed(tmp_path, monkeypatch):
    real = phase.make_rows
    late = CasePlan(schedule=None, exchange=None, serial_s=1e-9)
    monkeypatch.setattr(phase, "make_rows", lambda *given: real(*given[:-1], {"top2": late}))
    monkeypatch.setattr(phase, "is_noisy", lambda times: False)
    assert one_rank(tmp_path, "--phases", "infer", "--cases", "top2,shared1", "--schedules", "serial") == 0
    flags = {row["case"]: row["flagged"] for row in read_jsonl(tmp_path / "results.jsonl")}
    assert flags == {"top2": "drifted", "shared1": None}
    for row in read_jsonl(tmp_path / "results.jsonl"):
        assert row["speedup_vs_serial"] == 1.0
