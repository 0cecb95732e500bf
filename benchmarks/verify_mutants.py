"""What `moe_overlap.verify` finds: every mutant and every right variant of tests/verify, a row each.

    python -m benchmarks.verify_mutants [--out FOLDER] [--only TEXT]

A mutant is a published bug as a change of source. It is named where a check that has to name it has a finding which
does not follow from another one. Writes FOLDER/<date>-verify-mutants.jsonl and the same as a table, .md; exit 1 where a
mutant is missed or a right variant is not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from moe_overlap.measure.report import write_jsonl
from moe_overlap.verify.report import Finding
from tests.verify.cases import MUTANTS, VARIANTS
from tests.verify.judging import judged
from tests.verify.mutants import Mutant

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results" / "cpu-2core"


def mutant_row(layer: str, mutant: Mutant) -> Row:
    start_s = time.perf_counter()
    report = judged(layer, patches=mutant.patches, attributes=mutant.attributes)
    seconds = time.perf_counter() - start_s
    first = [finding for finding in report.findings if not finding.follows]
    by = [finding for finding in first if finding.check in mutant.named_by]
    row = {"kind": "mutant", "layer": layer, "name": mutant.name, "source": mutant.source, "named": bool(by)}
    return row | _said(by or first, report.ranks) | {"findings": len(report.findings), "seconds": round(seconds, 2)}


def variant_row(layer: str, variant: Any) -> Row:
    start_s = time.perf_counter()
    report = judged(
        layer, patches=variant.patches, attributes=variant.attributes, ranks=variant.ranks, dtype=variant.dtype
    )
    seconds = time.perf_counter() - start_s
    row = {"kind": "variant", "layer": layer, "name": variant.name, "right": report.exit_code == 0}
    row |= {"ranks": variant.ranks, "dtype": report.dtype}
    return row | _said(report.findings, report.ranks) | {"checks": len(report.passed), "seconds": round(seconds, 2)}


def _said(findings: list[Finding], ranks: int) -> Row:
    """The first of the findings."""
    if not findings:
        return {"by": "", "line": ""}
    return {"by": findings[0].check, "line": findings[0].line(ranks)}


def table(rows: list[Row]) -> str:
    """Markdown: sums for each layer, then every mutant with the line that names it, then the right variants."""
    lines = ["| layer | mutants named | false alarms | seconds for one |", "|---|---|---|---|"]
    for layer in MUTANTS:
        mutants = [row for row in rows if row["layer"] == layer and row["kind"] == "mutant"]
        variants = [row for row in rows if row["layer"] == layer and row["kind"] == "variant"]
        alarms = sum(not row["right"] for row in variants)
        seconds = sorted(row["seconds"] for row in (*mutants, *variants))
        middle = f"{seconds[len(seconds) // 2]:.1f}" if seconds else "-"
        named = sum(row["named"] for row in mutants)
        lines.append(f"| {layer} | {named} of {len(mutants)} | {alarms} of {len(variants)} | {middle} |")
    lines += ["", "| layer | mutant | reported as | named by |", "|---|---|---|---|"]
    for row in rows:
        if row["kind"] == "mutant":
            line = row["line"].split("; look at")[0] if row["named"] else f"MISSED ({row['line'] or 'nothing found'})"
            lines.append(f"| {row['layer']} | {row['name']} | {row['source']} | {line} |")
    lines += ["", "| layer | right variant | ranks | dtype | checks passed |", "|---|---|---|---|---|"]
    for row in rows:
        if row["kind"] == "variant":
            passed = row["checks"] if row["right"] else f"FALSE ALARM: {row['line']}"
            lines.append(f"| {row['layer']} | {row['name']} | {row['ranks']} | {row['dtype']} | {passed} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants and variants whose layer or name has it")
    options = parser.parse_args()
    path = options.out / f"{time.strftime('%Y-%m-%d')}-verify-mutants.jsonl"
    rows = []
    for layer in MUTANTS:
        for one in (*MUTANTS[layer], *VARIANTS[layer]):
            if options.only in f"{layer}: {one.name}":
                rows.append(mutant_row(layer, one) if isinstance(one, Mutant) else variant_row(layer, one))
                print({key: rows[-1][key] for key in ("layer", "name", "by", "seconds")}, flush=True)
                write_jsonl(path, rows)  # so far
    path.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows).split("\n\n")[0])
    return int(not all(row.get("named", True) and row.get("right", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
