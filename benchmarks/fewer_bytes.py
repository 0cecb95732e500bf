"""Deduplication side by side with another build of this library: the same rows, the same link, turn by turn.

    python benchmarks/fewer_bytes.py --before DIR [--out FILE.jsonl] [--repeats 12] [--tokens 512] ...

DIR is a checkout of the build to compare with, its native parts built. Each build runs in two processes of its own (two
ranks over gloo behind an emulated link, real compute); a round times every row once in each of them, one build at a
time, so that whatever else the machine does hits both. The link is solved so that communication is `--share` of the
older build's serial step. A time is the maximum over ranks from a common barrier to the end. The results of a row are
first compared over the builds: where they are not equal to tolerance, the run ends.

Rows: serial; chunked (2, 4, 8); shared expert beside the exchanges; shortcut (three backbone ops). For infer and train
the table says of each kind the best of either build and the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from moe_overlap.measure.report import write_jsonl

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "benchmarks" / "fewer_bytes_worker.py"
KINDS = {
    "serial": ("serial",),
    "chunked": ("chunked(1)", "chunked(2)", "chunked(4)", "chunked(8)"),
    "shared": ("shared_expert(1)", "shared_expert(0)", "shared_chunked(2)", "shared_chunked(4)"),
    "shortcut": ("shortcut(1)", "shortcut(2)"),
}
PHASES = ("infer", "train")
TOLERANCE = 0.05  # of the largest value: what bfloat16 sums in another order differ by at most


class Build:
    """A build of the library in two processes, which answer one request at a time."""

    def __init__(self, name: str, path: Path, dedup: str, options: dict[str, Any]) -> None:
        self.name, self.dedup = name, dedup
        environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(WORKER), json.dumps(options | {"dedup": dedup})]
        self.process = subprocess.Popen(words, cwd=path, env=environment, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)  # fmt: skip

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the build {self.name!r} ended in {request}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the build to compare with")
    parser.add_argument(
        "--out", type=Path, help="JSON lines, one a row; beside them the table (.md), the picture (.png)"
    )
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--latency-us", type=float, default=50.0)
    for name, default in (("tokens", 512), ("hidden", 512), ("ffn", 1024), ("experts", 32), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dedup", choices=("on", "auto"), default="on", help="of the newer build")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--kinds", default=",".join(KINDS))
    args = parser.parse_args()
    options = {"tokens": args.tokens, "hidden": args.hidden, "ffn": args.ffn, "experts": args.experts,
               "top_k": args.top_k, "dtype": args.dtype}  # fmt: skip
    builds = [Build("before", args.before.resolve(), "", options), Build("after", ROOT, args.dedup, options)]
    rows: list[dict[str, Any]] = []
    try:
        for phase in args.phases.split(","):
            rows += _phase(builds, phase, args)
            if args.out:
                write_jsonl(args.out, [options | row for row in rows])  # so far
    finally:
        for build in builds:
            build.close()
    _write(rows, args, options)


def _phase(builds: list[Build], phase: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    names = [name for kind in args.kinds.split(",") for name in KINDS[kind]]
    before = builds[0]
    # Serial without a wire, and the bytes of a step: the link at which the rest is `share` of serial.
    alone = [before.ask(do="time", row="serial", phase=phase, wire="none") for _ in range(12)]
    nocomm_s, sent = median(a["seconds"] for a in alone[3:]), alone[0]["payload_bytes"]
    comm_s = args.share / (1 - args.share) * nocomm_s
    rate = sent / comm_s
    for build in builds:
        build.ask(do="link", bytes_per_s=rate, latency_s=args.latency_us * 1e-6)
    for name in names:
        here, there = (build.ask(do="check", row=name, phase=phase) for build in builds)
        wrong = max(abs(a - b) for a, b in zip(here, there, strict=True))
        if wrong > TOLERANCE:
            raise SystemExit(f"{phase} {name}: the builds differ by {wrong:.3f} of the largest value")
    times: dict[tuple[str, str, str], list[float]] = {}
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for turn in range(args.repeats + 1):
        for name in names:
            for build in builds if turn % 2 else builds[::-1]:
                for wire in ("link", "none") if turn % 2 else ("link",):
                    answer = build.ask(do="time", row=name, phase=phase, wire=wire)
                    if turn:
                        times.setdefault((build.name, name, wire), []).append(answer["seconds"])
                        if wire == "link":
                            seen[build.name, name] = answer
    rows = []
    for build in builds:
        for name in names:
            peak_mb = build.ask(do="peak", row=name, phase=phase)
            mine = {wire: median(times[build.name, name, wire]) for wire in ("link", "none")}
            quartiles = sorted(times[build.name, name, "link"])
            answer = seen[build.name, name]
            rows.append({
                "phase": phase, "row": name, "build": build.name, "dedup": build.dedup or "off",
                "time_ms_median": 1e3 * mine["link"], "p10_ms": 1e3 * quartiles[len(quartiles) // 10],
                "p90_ms": 1e3 * quartiles[-1 - len(quartiles) // 10], "nocomm_ms": 1e3 * mine["none"],
                "payload_bytes": answer["payload_bytes"], "row_meta_bytes": answer["row_meta_bytes"],
                "off_rank_rows_per_token": answer["rows_per_token"], "comm_cpu_ms": 1e3 * answer["comm_cpu_s"],
                "comm_ms": 1e3 * (answer["payload_bytes"] + answer["row_meta_bytes"]) / rate,
                "link": f"emulated {rate * 8e-6:.1f}mbit:{args.latency_us:.0f}us", "repeats": args.repeats,
                "rows_peak_mb": peak_mb,
            })  # fmt: skip
    return rows


def _best(rows: list[dict[str, Any]], phase: str, kind: str) -> list[dict[str, Any]]:
    """The fastest row of a kind, of the older build and of the newer."""
    of_kind = [row for row in rows if row["phase"] == phase and row["row"] in KINDS[kind]]
    return [min((row for row in of_kind if row["build"] == build), key=lambda row: row["time_ms_median"])
            for build in ("before", "after")]  # fmt: skip


def _write(rows: list[dict[str, Any]], args: argparse.Namespace, options: dict[str, Any]) -> None:
    heads = "phase|kind|best before|ms|best after|ms|faster|wire ms before, after|compute ms|rows MB".split("|")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    best = {
        (phase, kind): _best(rows, phase, kind) for phase in args.phases.split(",") for kind in args.kinds.split(",")
    }
    for (phase, kind), (b, a) in best.items():
        cells = [phase, kind, b["row"], f"{b['time_ms_median']:.1f}", a["row"], f"{a['time_ms_median']:.1f}",
                 f"{b['time_ms_median'] / a['time_ms_median']:.2f}"]  # fmt: skip
        cells += [f"{b[key]:.1f}, {a[key]:.1f}" for key in ("comm_ms", "nocomm_ms", "rows_peak_mb")]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.with_suffix(".md").write_text(text + "\n")
        _draw(best, args.out.with_suffix(".png"), options)


def _draw(best: dict[tuple[str, str], list[dict[str, Any]]], path: Path, options: dict[str, Any]) -> None:
    """Bars of the best rows of each kind, before and after; lines are that row's wire and compute alone."""
    from matplotlib.figure import Figure  # a picture is all that needs it

    figure = Figure(figsize=(2 + 1.3 * len(best), 4.2), layout="constrained")
    axes = figure.subplots()
    for place, pair in enumerate(best.values()):
        for row, shift, colour in zip(pair, (-0.2, 0.2), ("#7F7F7F", "#009E73"), strict=True):
            axes.bar(
                place + shift, row["time_ms_median"], 0.36, color=colour, label=row["build"] if not place else None
            )
            for key, style in (("comm_ms", "--"), ("nocomm_ms", "-")):
                axes.plot([place + shift - 0.18, place + shift + 0.18], [row[key]] * 2, color="black", linestyle=style,
                          linewidth=1.2, label={"comm_ms": "wire alone", "nocomm_ms": "compute alone"}[key]
                          if not place and shift < 0 else None)  # fmt: skip
        faster = pair[0]["time_ms_median"] / pair[1]["time_ms_median"]
        axes.annotate(f"{faster:.2f}x", (place + 0.2, pair[1]["time_ms_median"]), ha="center", va="bottom")
    axes.set_xticks(range(len(best)), [f"{phase}\n{kind}" for phase, kind in best])
    axes.set_ylabel("ms a step, median")
    sizes = ", ".join(f"{name} {value}" for name, value in options.items())
    axes.set_title(f"best row of each kind, two ranks, emulated link\n{sizes}", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
