"""Runs the benchmarks: `python -m fastattn bench`, or `python benchmarks/run.py`.

    FULL=1, --grid=full     the whole grid, all peers compiled (an hour or more)
    QUICK=1, --grid=quick   tiny shapes, one call each: checks the results, its times mean nothing
    SAVE=1, --save          results go to benchmarks/results/<cpu>/<level>/, or for a GPU to
                            benchmarks/results/<gpu>/, not to build/bench/
    --device=cpu|cuda       whose rows; by default those of the GPU where its kernels run
    --emulated              with QUICK=1, the rows of the GPU where fastattn's GPU is emulated
    --seconds=N             how long the default grid may take (about)
    --threads=N             threads of every peer
    --peers=A,B             some of sdpa, eager, compile, onnxruntime, openvino; for a GPU of flash,
                            cudnn, efficient, flex, math, eager, flash_attn, xformers,
                            compile, liger
    --compile=none|some|all rows in which torch.compile takes part (it costs seconds per row)
    --cold                  inputs from memory and not from caches in all rows, as in decode
                            and kv_cache
    --no-memory             leaves the memory column out
    -k EXPRESSION           rows whose name matches, as in pytest: -k "decode and bf16"

Other arguments go to pytest and to pytest-benchmark, which stores each run in build/bench/runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when every row was right, whatever it took; 1 when a result was off."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__.strip())
        return 0
    try:
        import matplotlib  # noqa: F401
        import pytest
        import pytest_benchmark  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing: pip install 'fastattn[bench]'", file=sys.stderr)
        return 1
    given = {
        name for name in ("FULL", "QUICK", "SAVE") if os.environ.get(name, "0") not in ("", "0")
    }
    if {"FULL", "QUICK"} <= given:
        print("FULL=1 and QUICK=1 exclude each other", file=sys.stderr)
        return 2
    options = ["-q", "--no-header", "--tb=short", "--disable-warnings", "--benchmark-quiet"]
    options += [f"--rootdir={HERE}", f"--benchmark-storage=file://{HERE.parent}/build/bench/runs"]
    options += ["--grid=full"] * ("FULL" in given) + ["--grid=quick"] * ("QUICK" in given)
    options += ["--save"] * ("SAVE" in given)
    if "QUICK" not in given:
        options.append("--benchmark-autosave")
    return int(pytest.main([*options, *arguments, str(HERE)]))


if __name__ == "__main__":
    sys.exit(main())
