"""The kit is silent on layers that are right, each of its checks finds a fault, and it ends as it should."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_overlap import ConfigError, verify
from moe_overlap.commands import cli
from moe_overlap.verify.adapters.ours import Ours, OursDeduplicated, OursInDDP
from moe_overlap.verify.adapters.plain import PlainAdapter
from moe_overlap.verify.report import Finding, Report
from moe_overlap.verify.run import CHECKS
from tests.ranks import gloo_pool
from tests.verify import faults

ROOT = Path(__file__).resolve().parents[2]
FAULTS = [one for one in vars(faults).values() if inspect.isclass(one) and hasattr(one, "found_by")]
LAYERS = {"ours": Ours, "ours deduplicated": OursDeduplicated, "ours in DDP": OursInDDP, "plain": PlainAdapter}


def run(adapter, dtype=torch.float64):
    """On a rank of a pool; the report as JSON."""
    return verify.run(adapter, dtype=dtype, timeout_s=5.0).to_json()


def reports(adapter, ranks=2, dtype=torch.float64):
    return [Report.from_json(text) for text in gloo_pool(ranks).run(run, adapter, dtype)]


def lines(report):
    return "\n".join(report.lines(every=True))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_right_layers_are_right(name, ranks):
    for report in reports(LAYERS[name], ranks):
        assert report.exit_code == 0 and not report.findings, lines(report)
        left_out = {text.split(" (")[0] for text in report.not_checked}
        assert set(report.passed) | left_out == {check.title for check in CHECKS}
        if name == "plain":
            assert not left_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_right_layers_are_right_in_coarser_dtypes(name, dtype):
    for report in reports(LAYERS[name], dtype=dtype):
        assert not report.findings, lines(report)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_in_words(fault):
    first, second = reports(fault)
    assert first.findings == second.findings and first.exit_code == 1
    found = [finding for finding in first.findings if not finding.follows]
    assert any(one.check == fault.found_by and fault.words in one.line(2) for one in found), lines(first)


def test_every_finding_is_one_line_and_says_where_to_look():
    for finding in reports(faults.WeighsTwice)[0].findings:
        assert "\n" not in finding.line(2) and "; look at " in finding.line(2)


def test_what_may_follow_is_counted_and_told_on_request():
    report = reports(faults.ExpertsTimesRanks)[0]
    assert 1 <= sum(line.startswith("FOUND") for line in report.lines()) < len(report.findings)
    assert "more that may follow from these, in AdamW step, " in "\n".join(report.lines())
    assert sum(line.startswith("FOUND") for line in report.lines(every=True)) == len(report.findings) > 1


def test_routing_that_differs_leaves_no_verdict():
    report = reports(faults.RoutesByLocalIds)[0]
    assert report.passed == ["values"] and {one.check for one in report.findings} == {"routing"}
    assert "determinism (no verdict, as routing differs)" in report.not_checked


def test_the_norm_is_named():
    (finding,) = reports(faults.NormOfThisRank)[0].findings
    assert "instead of" in finding.how


def test_a_report_survives_json():
    report = reports(faults.DecaysByRank)[0]
    assert Report.from_json(report.to_json()) == report
    values = json.loads(report.to_json())
    assert values["exit_code"] == 1 and values["findings"][0]["line"] == report.findings[0].line(2)


def test_nothing_checked_is_no_success():
    assert Report(adapter="a", ranks=2, dtype="float64").exit_code == 2
    assert Report(adapter="a", ranks=2, dtype="float64", passed=["output"]).exit_code == 0


def test_a_finding_names_ranks_unless_it_is_all():
    finding = Finding(check="c", what="w", how="h", look="l", ranks=(1,), topic="t")
    assert finding.line(1) == "c: w h; look at l"
    assert finding.line(2) == "c: w h on rank 1 alone; look at l"


def test_ranks_of_its_own():
    report = verify.check(PlainAdapter)
    assert report.exit_code == 0 and len(report.passed) == len(CHECKS), lines(report)


class EndsItself(Ours):
    def forward(self, x):
        if self.group is not None and self.group.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class NeverComesBack(Ours):
    def forward(self, x):
        if self.group is not None and self.group.rank() == 1:
            time.sleep(600)
        return super().forward(x)


def test_a_rank_that_dies_is_a_finding():
    report = verify.check(EndsItself)
    assert report.exit_code == 1
    assert "ended with status" in report.findings[0].how


def test_a_rank_that_hangs_is_a_finding():
    report = verify.check(NeverComesBack, timeout_s=2.0, limit_s=25.0)
    assert report.exit_code == 1
    assert "after routing (output: rank 0 raised TransportTimeout" in report.findings[-1].how


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"ranks": 1}, "ranks"), ({"ranks": 5}, "ranks"), ({"dtype": torch.int64}, "dtype")],
)
def test_what_cannot_be_run_is_refused(arguments, field):
    with pytest.raises(ConfigError) as refusal:
        verify.check(PlainAdapter, **arguments)
    assert refusal.value.field == field


def test_run_wants_a_group():
    with pytest.raises(ConfigError, match="torch.distributed initialised"):
        verify.run(PlainAdapter)


def moe_overlap(*words, folder=ROOT):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moe_overlap", "verify", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150, cwd=folder)


def test_the_command_finds_an_adapter_where_it_is_called(tmp_path):
    text = "from tests.verify.faults import ExpertsTimesRanks\n\n\nclass Mine(ExpertsTimesRanks):\n    pass\n"
    (tmp_path / "mine.py").write_text(text)
    done = moe_overlap("mine:Mine", "--json", "report.json", folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("FOUND gradients: the gradient of the experts")
    assert re.search(r"and \d+ more", done.stdout)
    assert Report.from_json((tmp_path / "report.json").read_text()).adapter == "Mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nobody"], "adapter = 'nobody': expected one of ours, "),
        (["tests.verify.nothing:A"], "expected a module that can be imported (No module named 'tests.verify.nothing')"),
        (["tests.verify.faults:time"], "a subclass of moe_overlap.verify.Adapter"),
        (["plain", "--ranks", "7"], "ranks = 7: expected a divisor of the adapter's 12 experts"),
        (["plain", "--json", __file__ + "/all"], f"--json = '{__file__}/all': expected a file that can be written"),
        (["plain", "--limit-s", "nan"], "--limit-s = nan: expected a number from 1 to 86400 seconds"),
    ],
)
def test_the_command_refuses_in_one_line(words, said, capsys):
    assert cli.main(["verify", *words]) == 2
    done = capsys.readouterr()
    assert done.err.startswith("moe-overlap verify: error: ") and said in done.err
    assert len(done.err.splitlines()) == 1 and not done.out


def test_under_torchrun():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run([*command, "moe_overlap", "verify", "plain"], capture_output=True, text=True,
                          env=environment, timeout=150, cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "PlainAdapter, 1 rank against 2, float64: 0 findings" in done.stdout


def test_transformers():
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers needs accelerate for its own parallelism")
    from moe_overlap.verify.adapters.transformers import Qwen3MoE

    report = verify.check(Qwen3MoE, dtype=torch.float32)
    assert not report.findings and "gradients" in report.passed, lines(report)
