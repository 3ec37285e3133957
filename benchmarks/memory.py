"""Peak memory of one call: what the process grows by, at its worst, while it runs (outputs and
gradients included).

Each measurement is a process of its own, so that nothing which an earlier row left in the heap or
in a workspace hides what this one needs. Starting Python and importing torch for each would take
seconds; instead one server process imports them once, runs no parallel code itself (so that it may
fork), and forks a child per measurement.

Linux only: the child resets its high-water mark through /proc/self/clear_refs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path


class MemoryMeter:
    """The client: `measure(case_id, peer)` returns bytes, or the reason why there is no figure."""

    def __init__(self, threads: int):
        command = [sys.executable, str(Path(__file__).resolve()), str(threads)]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self, case_id: str, peer: str) -> int | str:
        assert self.server.stdin and self.server.stdout
        try:
            self.server.stdin.write(json.dumps([case_id, peer]) + "\n")
            self.server.stdin.flush()
            answer = self.server.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else "the measuring process died"

    def close(self) -> None:
        self.server.communicate()


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is resident now, VmHWM was at its highest."""
    with open("/proc/self/status") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith(name)))


def _growth(case_id: str, peer: str) -> int | str:
    import torch

    from cases import BY_ID
    from checks import evaluate
    from timing import reason

    case = BY_ID[case_id]
    small = case.tiny()
    try:
        with torch.set_grad_enabled(case.backward):
            # Libraries, kernels and threads are loaded by a first, tiny call: they are not this
            # call's memory.
            evaluate(case.peers[peer].build(small), small.inputs())
            inputs, forward = case.inputs(), case.peers[peer].build(case)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # pages that the heap would reuse are not free memory
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            results = evaluate(forward, inputs)
            grown = _status("VmHWM") - before
            del results
            return grown
    except Exception as error:
        return reason(error)


def _serve() -> None:
    import fastattn.functional  # noqa: F401  loaded once, before the forks
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    for line in sys.stdin:
        case_id, peer = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            answer = json.dumps(_growth(case_id, peer))
            os.write(writer, answer.encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        print(answer or json.dumps(f"ended by signal {os.WTERMSIG(status)}"), flush=True)


if __name__ == "__main__":
    _serve()
