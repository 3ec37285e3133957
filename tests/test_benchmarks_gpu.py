"""Benchmarks of the GPU, as far as they go without one: what is counted, which rows there are, and
`make gpu`, which must tell how each of its stages ended, whatever that was."""

import importlib
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_rows_of_the_gpu_have_names_of_their_own(module):
    cases = module("cases")
    assert len(cases.BY_ID) == len(cases.ALL)
    assert all(case.id.startswith("cuda-") for case in cases.on("cuda"))
    assert not any(case.id.startswith("cuda-") for case in cases.on("cpu"))


def test_the_default_grid_holds_the_tokens(module):
    rows = [case for case in module("cases").on("cuda") if "default" in case.grids]
    whole = [case for case in rows if case.op == "attention"]
    assert {(case.batch * case.queries, case.heads * case.head_dim) for case in whole} == {
        (16384, 2048)
    }
    bf16 = {(c.keys, c.head_dim, c.mask, c.passes) for c in whole if c.dtype == "bf16"}
    assert len(bf16) == 6 * 3 * 2 * 2
    assert len([case for case in rows if case.op == "decode" and case.dtype == "bf16"]) == 9


def test_work_is_what_the_papers_count(module):
    cases = module("cases")
    forward = cases.BY_ID["cuda-attention-4x16x4096x128-none-bf16-fwd"]
    assert forward.work == 4 * 4 * 16 * 4096 * 4096 * 128
    assert replace(forward, mask="causal").work == forward.work / 2
    assert replace(forward, backward=True).work == 2.5 * forward.work
    decode = cases.BY_ID["cuda-decode-8x32/8x1>32768x128-none-bf16-fwd"]
    cache = 2 * 8 * 8 * 32768 * 128 * 2
    assert decode.input_bytes == cache < decode.work < 1.001 * cache


def test_peers_that_cannot_run_say_why(module):
    cases, base = module("cases"), module("cases.base")
    huge = cases.BY_ID["cuda-attention-1x32x16384x64-none-bf16-fwd"]
    for name in ("math", "eager"):
        with pytest.raises(base.Unavailable, match="96 GiB"):
            huge.peers[name].build(huge)
    padded = replace(huge, mask="padded")
    with pytest.raises(base.Unavailable, match="mask"):
        padded.peers["flex"].build(padded)


@pytest.mark.parametrize("mask", ["none", "causal", "padded"])
def test_the_backward_pass_is_timed_alone_and_right(module, mask):
    kind = module("cases.cuda_attention").CudaAttentionCase
    case = kind(2, 2, 2, 70, 70, 16, mask, op="attention", backward=True, device="cpu")
    inputs, forward = case.inputs(), case.peers["fastattn"].build(case)
    results = module("checks").evaluate(forward, inputs)
    assert case.oracle(inputs).budget_used(results) <= 1
    step = module("cuda_timing")._Gradients(forward, inputs)
    for _ in range(2):  # of the same forward pass
        assert all(map(torch.equal, step(inputs), results[1:]))


def test_samples_of_another_clock_reach_pytest_benchmark(module):
    class Benchmark:
        def pedantic(self, target, rounds):
            self.samples = [-self._timer() + self._timer() for _ in range(rounds)]

    benchmark = Benchmark()
    module("cuda_timing")._keep(benchmark, [0.25, 0.5])
    assert benchmark.samples == [0.25, 0.5]


@pytest.fixture
def gpu(module, monkeypatch, tmp_path):
    """The program, with its logs and OUT elsewhere; `gpu.stage(name, code)` is a stage."""
    gpu = module("gpu")
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))

    def stage(name, code, **options):
        return gpu.Stage(name, [sys.executable, "-c", code], 60, folder=tmp_path, **options)

    monkeypatch.setattr(gpu, "stage", stage, raising=False)
    return gpu


def test_every_stage_runs_and_tells_how_it_ended(gpu, monkeypatch, tmp_path, capsys):
    chosen = [
        gpu.stage("good", "print('all well')"),
        gpu.stage("bad", "print('oh'); raise SystemExit(3)"),
        gpu.stage("absent", "", obstacle="not installed"),
        gpu.stage("last", "import os; print(os.environ['W'])", environment={"W": "still run"}),
    ]
    monkeypatch.setattr(gpu, "stages", lambda: chosen)
    assert gpu.main([]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("4 stages, 1 failed")
    lines = [" ".join(line.split()) for line in said[-5:-1]]
    assert lines[0].startswith("good ok") and lines[0].endswith("all well")
    assert lines[1].startswith("bad FAILED: exit status 3") and lines[1].endswith("oh")
    assert lines[2].startswith("absent skipped: not installed")
    assert lines[3].startswith("last ok") and lines[3].endswith("still run")
    assert gpu.main(["good", "last"]) == 0
    known = json.loads((tmp_path / "provenance.json").read_text())
    assert [stage["stage"] for stage in known["stages"]] == ["good", "last"]
    assert known["kernels"] and known["date"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gpu.tar.gz",
        "summary.txt",
    ]
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as archive:
        assert archive.getnames() == ["provenance.json", "logs/good.log", "logs/last.log"]


def test_a_stage_without_end_is_stopped_with_its_children(gpu, tmp_path):
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("{tmp_path}/child", "w").write(str(child.pid))
print("begun", flush=True)
child.wait()
"""
    outcome = gpu.run(gpu.stage("endless", code), 5)
    assert outcome.failed and outcome.result == "FAILED: stopped after 5 seconds"
    assert "begun" in (tmp_path / "endless.log").read_text()
    status = Path(f"/proc/{(tmp_path / 'child').read_text()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_stages_name_what_is_there(gpu, monkeypatch):
    monkeypatch.delenv("FULL", raising=False)
    real, dry = gpu.stages(), gpu.dry_stages()
    assert [stage.name for stage in real] == [stage.name for stage in dry]
    assert sum(stage.seconds for stage in real) < 600
    for stage in real + dry:
        files = [word for word in stage.command if word.endswith(".py")]
        assert all((stage.folder / word).exists() for word in files)


def test_calls_for_the_sanitizer_run(module, capsys):
    assert module("kernel_calls").main(["--device=cpu"]) == 0
    assert capsys.readouterr().out.endswith(" calls, 0 failed\n")
