"""`bench overlap`: its options, its report and picture from given rows, and one small sweep from end to end; over real
TCP where network namespaces can be had. No test looks at how long anything took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_overlap.commands.bench import overlap, shaped
from moe_overlap.commands.bench.overlap_options import OverlapOptions, parse
from moe_overlap.commands.bench.overlap_picture import lines_of, write_speedup
from moe_overlap.commands.bench.overlap_report import (
    agreement,
    limit,
    name_of,
    own_share,
    own_speedup,
    pairs_of,
    summary,
)
from moe_overlap.commands.bench.phases import HALVES, PHASES, has
from moe_overlap.commands.bench.rows import KEYS
from moe_overlap.errors import ConfigError
from moe_overlap.measure.report import read_jsonl, write_jsonl
from moe_overlap.transport.link import LinkSpec

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = "--tokens 32 --hidden 64 --ffn 32 --experts 4 --repeats 1 --shares 0.5 --routings balanced".split()


def row(**changes) -> dict:
    found = {
        "wire": "emulated", "routing": "balanced", "phase": "infer", "asked_share": 0.5, "case": "top2",
        "schedule": "chunked", "chunks": 2, "backward_chunks": None, "link": "emulated 80mbit:50us", "flagged": None,
        "serial_ms": 20.0, "nocomm_ms": 10.0, "time_ms_median": 12.5, "bound_ms": 11.0, "ranks": 2, "tokens": 32,
        "hidden": 64, "ffn": 32, "experts": 4, "top_k": 2, "dtype": "fp32", "compute": "real",
    }  # fmt: skip
    return found | changes


def run(words, limit_s=900.0):
    command = [sys.executable, "-m", "moe_overlap", "bench", "overlap", *words]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_s, check=False)


def test_a_sweep_over_the_emulated_link(tmp_path):
    done = run([*SMALL, "--phases", "backward", "--cases", "top2,scmoe_pos2", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "results.jsonl")
    assert {name_of(one) for one in rows} == {
        "top2 serial", "top2 chunked(2)", "top2 chunked(4)", "top2 chunked(8)", "top2 expert_groups(2)",
        "top2 fastermoe(2)", "top2 lancet(2)",
        "scmoe_pos2 serial", "scmoe_pos2 shortcut",
    }  # fmt: skip
    for one in rows:
        assert list(one) == [*KEYS, "wire", "asked_share"] and one["bit_equal"] is True
        assert (one["wire"], one["asked_share"], one["phase"]) == ("emulated", 0.5, "backward")
        assert one["link"].startswith("emulated ") and one["backward_chunks"] >= 1
        assert (one["backward_slot"] is None) == (one["case"] == "top2")
    # Half of the rows go to the other rank and come back, once: a backward alone.
    assert {one["payload_bytes"] for one in rows if one["case"] == "top2"} == {32 * 64 * 2 * 4}
    folder = tmp_path / "emulated"
    spans = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {span["name"] for span in spans if span["ph"] == "X"}
    assert "E0'" in names and "E0" not in names, "the forward is not in what was timed"
    waits = read_jsonl(folder / "waits.jsonl")
    assert all(one["half"] == "backward" for one in waits if "action" in one)
    for one in waits:
        if "action" in one:
            assert one["stood_ms"] == pytest.approx(sum(part[3] for part in one["parts"]), abs=1e-3)
    assert {one["row"] for one in waits if "why" in one} >= {"top2 serial"}
    for picture in (tmp_path / "speedup.png", folder / "speedup.png", folder / "timeline.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "emulated balanced" in done.stdout


def test_the_same_link_over_real_tcp(tmp_path):
    reason = shaped.unavailable()
    if reason is not None:
        pytest.skip(f"no shaped TCP here: {reason}")
    link = row(link="emulated 400mbit:50us")
    write_jsonl(tmp_path / "links.jsonl", [link])
    words = [*SMALL, "--phases", "infer", "--cases", "top2", "--schedules", "serial,chunked", "--wires", "tcp"]
    done = run([*words, "--links-of", str(tmp_path / "links.jsonl"), "--out", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert {(one["wire"], one["link"], one["ranks"]) for one in rows} == {("tcp", "tcp 400mbit:50us", 2)}
    assert [name_of(one) for one in rows] == ["top2 serial", *(f"top2 chunked({r})" for r in (2, 4, 8))]
    assert all(one["bit_equal"] is True for one in rows)


def namespaces() -> list[str]:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()


def test_namespaces_are_shaped_and_gone_afterwards_whatever_happens():
    reason = shaped.unavailable()
    if reason is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    with pytest.raises(ZeroDivisionError), shaped.nodes() as names:
        assert set(names) <= set(namespaces()) and len(set(names)) == 2
        shaped.shape(shaped.DEVICE, LinkSpec(bytes_per_s=5e6), 2, namespace=names[0])
        said = ["tc", "-n", names[0], "qdisc", "show", "dev", shaped.DEVICE]
        assert "tbf" in (text := subprocess.run(said, capture_output=True, text=True, check=True).stdout)
        assert "rate 80Mbit" in text, "two ranks share the device of a node"
        shaped.shape(shaped.DEVICE, None, 2, namespace=names[0])
        assert "tbf" not in subprocess.run(said, capture_output=True, text=True, check=True).stdout
        with pytest.raises(OSError, match="tc"):
            shaped.shape("none0", LinkSpec(bytes_per_s=5e6), 1, namespace=names[0])
        raise ZeroDivisionError
    assert not set(names) & set(namespaces())


def test_without_root_it_says_so_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert shaped.unavailable() == "needs root"
    monkeypatch.setattr(overlap, "torchrun", lambda *_, **__: pytest.fail("nothing is to be run"))
    assert overlap.main(["--wires", "tcp", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "tcp: skipped: needs root\n"
    assert read_jsonl(tmp_path / "results.jsonl") == []


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shaped.shutil, "which", lambda name: None if name == "tc" else f"/sbin/{name}")
    assert shaped.unavailable() == "needs the program tc (package iproute2)"


def test_options_come_back_from_their_words():
    asked = OverlapOptions(shares=("0.3",), phases=("backward",), wires=("emulated", "tcp"), dtype="bf16", repeats=3)
    assert parse(asked.words()) == asked
    assert parse(["--cases", "top2"]).schedules == OverlapOptions.schedules, "of which some have no row there"
    assert parse(["--schedules", "chunked"]).cases == OverlapOptions.cases, "likewise"
    part = replace(asked, routings=("real", "zipf")).over("tcp")
    assert part.wires == ("tcp",) and part.out == "out/overlap/tcp"
    assert part.routings == ("out/overlap/routing.safetensors", "zipf"), "the file of the whole run"
    one = part.layer("zipf", 0.3, part.out)
    assert (one.routing, one.comm_share, one.dtype, one.repeats) == ("zipf", 0.3, "bf16", 3)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--shares 0", "--shares"),
        ("--shares 0.5,x", "--shares"),
        ("--shares ,", "--shares"),
        ("--wires rdma", "--wires"),
        ("--schedules auto", "--schedules"),
        ("--cases top2 --schedules serial,shortcut", "--schedules"),
        ("--cases top2,shared1 --schedules chunked", "--cases"),
        ("--ranks 2 --ranks-per-node 2", "--ranks"),
        ("--ranks 4 --wires tcp", "--ranks"),
        ("--phases forwards", "--phases"),
        ("--routings ,", "--routings"),
        ("--routings missing.safetensors", "--routings"),
        ("--links-of missing.jsonl", "--links-of"),
        ("--device eth0", "--device"),
    ],
)
def test_bad_options_are_named(words, option, tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "run", lambda *_, **__: pytest.fail("nothing is to be run"))
    with pytest.raises(ConfigError) as caught:
        overlap.main([*words.split(), "--out", str(tmp_path)])
    assert caught.value.field == option


def test_links_of_another_run(tmp_path):
    path = tmp_path / "results.jsonl"
    write_jsonl(
        path, [row(), row(case="shared1"), row(asked_share=0.7, link="emulated 40mbit:50us"), row(phase="train")]
    )
    options = OverlapOptions(links_of=str(path), phases=("infer", "train"), routings=("balanced",))
    found = overlap.read_links(options)
    assert found is not None
    assert [(point.share, point.link) for point in found["balanced", "infer"]] == [
        (0.5, "80mbit:50us"), (0.7, "40mbit:50us")
    ]  # fmt: skip
    for asked in (replace(options, phases=("forward",)), replace(options, routings=("zipf",))):
        with pytest.raises(ConfigError, match="--links-of"):
            overlap.read_links(asked)
    for text in ("{}", "[]", "nonsense", "[" * 100_000, json.dumps(row(link="emulated fast")),
                 json.dumps(row(asked_share=True)), "\0"):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match="--links-of"):
            overlap.read_links(options)


def test_phases_and_their_halves():
    assert set(HALVES) == set(PHASES)
    assert [phase for phase in PHASES if has(phase, "backward")] == ["backward", "train"]
    assert [phase for phase in PHASES if has(phase, "forward")] == ["infer", "forward", "train"]


def test_the_limit_and_a_row_against_it():
    assert limit(0.5) == 2.0 and limit(0.2) == pytest.approx(1.25) and limit(0.75) == pytest.approx(4 / 3)
    assert own_share(row()) == 0.5 and own_share(row(nocomm_ms=21.0)) == 0.0
    (line,) = summary([row(), row(schedule="serial", time_ms_median=20.0), row(chunks=4, time_ms_median=10.0,
                                                                                flagged="inflated")])  # fmt: skip
    assert "chunked(2) 1.60x of at most 2.00x at its share of 50%" in line and "80mbit:50us" in line
    assert "every row is flagged" in summary([row(flagged="inflated")])[0]


def test_two_wires_agree_or_it_is_said_that_they_do_not():
    emulated = [row(), row(chunks=4, time_ms_median=10.0), row(phase="train")]
    near = [row(wire="tcp", link="tcp 80mbit:50us", time_ms_median=13.0)]
    far = [row(wire="tcp", link="tcp 80mbit:50us", chunks=4, time_ms_median=11.5)]
    other_rate = [row(wire="tcp", link="tcp 81mbit:50us")]
    assert len(pairs_of([*emulated, *near, *far, *other_rate])) == 2
    times, gains = agreement([*emulated, *near, *far, *other_rate])
    assert "1 of 2 within 10%" in times and "1.040 to 1.150" in times and "1 of 2 within 10%" in gains
    assert agreement(emulated) == [] and agreement([*emulated, *other_rate]) == []


def test_the_picture_has_a_line_for_every_builder(tmp_path):
    rows = [
        row(asked_share=share, chunks=chunks, time_ms_median=12.0 + chunks, case=case, schedule=schedule, wire=wire)
        for share in (0.3, 0.6)
        for chunks in (2, 4)
        for case, schedule in (("top2", "chunked"), ("top2", "serial"), ("scmoe_pos2", "shortcut"))
        for wire in ("emulated", "tcp")
    ]
    lines = lines_of(rows)
    assert set(lines) == {(wire, *what) for wire in ("emulated", "tcp")
                          for what in (("top2", "chunked"), ("scmoe_pos2", "shortcut"))}  # fmt: skip
    assert all([one["chunks"] for one in line] == [2, 2] for line in lines.values()), "the fastest at each share"
    write_speedup(tmp_path / "a.png", [*rows, row(routing="zipf", flagged="inflated", bound_ms=None)])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def committed(name: str) -> list[dict]:
    return read_jsonl(REPOSITORY / f"benchmarks/results/cpu-2core/2026-11-28-overlap-lab{name}.jsonl")


def test_committed_rows_keep_to_the_limit():
    rows = [one for one in committed("") if one["schedule"] != "serial" and one["flagged"] not in ("inflated",)]
    assert {one["phase"] for one in rows} == set(PHASES) and len(rows) >= 50
    assert all(own_speedup(one) <= 1.02 * limit(own_share(one)) and one["bit_equal"] for one in rows)


def test_committed_rows_over_tcp_agree_where_exchanges_are_cut():
    """As the notes say: and not where one exchange is under way alone."""
    ratios = {
        (tcp["phase"], name_of(tcp)): tcp["time_ms_median"] / emulated["time_ms_median"]
        for emulated, tcp in pairs_of(committed("-tcp"))
        if tcp["asked_share"] == 0.6
    }
    cut = [ratios[phase, f"top2 chunked({r})"] for phase in ("infer", "train") for r in (4, 8)]
    assert all(abs(ratio - 1) <= 0.1 for ratio in cut)
    assert min(ratios["infer", "top2 serial"], ratios["train", "top2 serial"]) > 1.4
