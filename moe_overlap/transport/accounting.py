"""How much CPU time the threads of a transport use beside the thread that computes."""

from __future__ import annotations

import time


class CommCpu:
    """CPU seconds of all other threads of this process while the block runs: `with CommCpu() as cpu: ...; cpu.seconds`.

    With one compute thread these are the threads of the transport (gloo's workers and its network loop). With more
    compute threads (OMP_NUM_THREADS above 1) their time is in it too, so measure with one.
    """

    seconds: float = 0.0

    def __enter__(self) -> CommCpu:
        self._process_s, self._thread_s = time.process_time(), time.thread_time()
        return self

    def __exit__(self, *exc_info: object) -> None:
        process_s, thread_s = time.process_time() - self._process_s, time.thread_time() - self._thread_s
        self.seconds = max(0.0, process_s - thread_s)
