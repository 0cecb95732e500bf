"""What the kit says: findings, a line each, and what it did not check, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

OK, FINDINGS, COULD_NOT_RUN = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong: in which check, with what, how, on which ranks, and where to look. topic: see `Note`.
    follows: whether it may be no more than a consequence of one before it."""

    check: str
    what: str
    how: str
    look: str
    ranks: tuple[int, ...]
    topic: str
    follows: bool = False

    def line(self, world: int) -> str:
        where = "" if len(self.ranks) == world else f" on rank {', '.join(map(str, self.ranks))} alone"
        return f"{self.check}: {self.what} {self.how}{where}; look at {self.look}"


@dataclass(kw_only=True)
class Report:
    """The verdict over one adapter. `passed`: checks without a finding. `seconds`: of the whole run, on rank 0."""

    adapter: str
    ranks: int
    dtype: str
    passed: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0: nothing found; 1: findings; 2: not one check ran."""
        if self.findings:
            return FINDINGS
        return OK if self.passed else COULD_NOT_RUN

    def lines(self, *, every: bool = False) -> list[str]:
        """The report as text, findings first. every: those that may follow from others too, not their number alone."""
        lines = [f"FOUND {found.line(self.ranks)}" for found in self.findings if every or not found.follows]
        more = [] if every else [found for found in self.findings if found.follows]
        if more:
            where = ", ".join(dict.fromkeys(found.check for found in more))
            lines.append(f"and {len(more)} more that may follow from these, in {where}")
        lines += [f"not checked: {text}" for text in self.not_checked]
        lines += [f"right: {', '.join(self.passed)}"] if self.passed else []
        count = f"{len(self.findings)} finding{'' if len(self.findings) == 1 else 's'}"
        lines.append(f"{self.adapter}, 1 rank against {self.ranks}, {self.dtype}: {count}, {self.seconds:.1f} s")
        return lines

    def to_json(self) -> str:
        values = asdict(self) | {"exit_code": self.exit_code}
        for value, finding in zip(values["findings"], self.findings, strict=True):
            value["line"] = finding.line(self.ranks)
        return json.dumps(values, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        values = json.loads(text)
        del values["exit_code"]
        for value in values["findings"]:
            del value["line"]
            value["ranks"] = tuple(value["ranks"])
        values["findings"] = [Finding(**value) for value in values["findings"]]
        return cls(**values)
