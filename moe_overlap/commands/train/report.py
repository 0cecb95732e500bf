"""What a run says while it runs: one JSON line per event in OUT/train.jsonl, a progress bar on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_overlap.commands.train.placing import say_moves

PLAIN_LINES = 10


class RunLog:
    """Writes events on rank 0; on the other ranks it does nothing. Use as a context manager."""

    def __init__(self, path: Path, *, active: bool, append: bool, steps: int) -> None:
        self.active = active
        self.steps = steps
        self.file: TextIO | None = None
        self.progress: Progress | None = None
        if active:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a" if append else "w", encoding="utf-8")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_bar()
        if self.file is not None:
            self.file.close()

    def write(self, event: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(event) + "\n")
            self.file.flush()

    def begin_bar(self, title: str, first: int) -> None:
        if not self.active:
            return
        self.end_bar()
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=console)
            self.progress.add_task(title, total=self.steps, completed=first)
            self.progress.start()
        self.title = title

    def step(self, event: dict[str, Any]) -> None:
        """Log a step and move the bar; without a terminal, a plain line at every tenth of the run."""
        self.write(event)
        if not self.active:
            return
        for moved in event.get("placement", ()):
            self.say(say_moves(event["step"], moved))
        done = event["step"] + 1
        text = f"{self.title}  loss {event['loss']:.3f}  {event['tokens_per_s']:,.0f} tokens/s"
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=done, description=text)
        elif done == self.steps or done % max(1, self.steps // PLAIN_LINES) == 0:
            self.say(f"{text}  step {done}/{self.steps}")

    def end_bar(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def say(self, text: str) -> None:
        """A line for the user, rank 0 only."""
        if self.active:
            print(text, file=sys.stderr, flush=True)
