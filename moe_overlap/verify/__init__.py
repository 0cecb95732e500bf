"""Is a Mixture-of-Experts layer on n ranks the same layer as on one? Of any module, through a small adapter."""

from moe_overlap.verify.adapter import Adapter, gathered, own_part
from moe_overlap.verify.report import Finding, Report
from moe_overlap.verify.run import check, run

__all__ = ["Adapter", "Finding", "Report", "check", "gathered", "own_part", "run"]
