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


def test_rows_of_every_function_are_in_the_default_grid(module):
    rows = [case for case in module("cases").on("cuda") if "default" in case.grids]
    passes = {(case.op, case.passes) for case in rows if case.dtype == "bf16"}
    ops = ("layer_norm", "rms_norm", "add_rms_norm", "gelu", "bias_gelu", "swiglu", "rope")
    assert passes >= {(op, way) for op in ops for way in ("fwd", "bwd")}
    assert ("kv_cache_update", "fwd") in passes
    norms = [(c.rows, c.width) for c in rows if c.op == "rms_norm" and c.passes == "bwd"]
    assert {*norms} == {(8192, 4096), (8192, 1024), (2048, 8192), (32768, 768)}


def test_a_backward_row_counts_its_own_bytes(module):
    by_id, matrix = module("cases").BY_ID, 8192 * 4096 * 2
    for name, forward, backward in (
        ("rms_norm-8192x4096", 2, 3),  # in, out; input, its output's gradient, gradient
        ("add_rms_norm-8192x4096", 4, 4),
        ("swiglu-8192x4096-two", 3, 5),
    ):
        assert by_id[f"cuda-{name}-bf16-fwd"].work == forward * matrix
        assert by_id[f"cuda-{name}-bf16-bwd"].work == backward * matrix
    rotated = by_id["cuda-rope-2x32/8x4096x128-half-bf16-fwd"]
    assert rotated.work == 2 * matrix * (32 + 8) / 32
    assert replace(rotated, backward=True).work == rotated.work
    written = by_id["cuda-kv_cache_update-1x32x8192x128-contiguous-bf16-fwd"]
    assert written.work == 4 * matrix  # keys and values, in and out


SMALL_ROWS = {  # beyond 512 a sample is compared
    "layer_norm": ("CudaNormCase", (601, 24)),
    "rms_norm": ("CudaNormCase", (601, 24)),
    "add_rms_norm": ("CudaNormCase", (601, 24)),
    "gelu": ("CudaActivationCase", (601, 24, "none")),
    "bias_gelu": ("CudaActivationCase", (601, 24, "none")),
    "swiglu": ("CudaActivationCase", (601, 24, "two")),
    "rope": ("CudaRopeCase", (2, 4, 2, 9, 16)),
}


@pytest.mark.parametrize("op", SMALL_ROWS)
def test_rows_are_right_and_only_their_gradients_timed(module, op):
    name, shape = SMALL_ROWS[op]
    kind = getattr(module("cases.cuda_rows"), name)
    case = kind(*shape, op=op, dtype="bf16", backward=True, device="cpu")
    inputs, forward = case.inputs(), case.peers["fastattn"].build(case)
    oracle = case.oracle(inputs)
    assert oracle.budget_used(module("checks").evaluate(forward, oracle.checked)) <= 1
    assert oracle.peer_obstacle(module("checks").evaluate(forward, oracle.checked)) is None
    step = module("cuda_timing")._Gradients(forward, inputs)
    assert len(step(inputs)) == len(inputs.leaves)


@pytest.mark.parametrize("kind", ["contiguous", "paged16"])
def test_a_cache_write_that_leaves_a_row_out_is_found(module, kind):
    case = module("cases.cuda_rows").CudaCacheWriteCase(
        2, 3, 21, 8, kind, op="kv_cache_update", dtype="bf16", device="cpu"
    )
    inputs = case.inputs()
    oracle = case.oracle(inputs)
    for name in ("fastattn", "eager"):
        results = case.peers[name].build(case)(inputs)
        assert oracle.peer_obstacle(results) is None
        assert not any(cache.any() for cache in results), "the next one finds what this one wrote"
    shorter = replace(inputs, key=inputs.key[:, :, :20], value=inputs.value[:, :, :20])
    results = case.peers["fastattn"].build(case)(shorter)
    assert "k_cache" in oracle.peer_obstacle(results)


def test_layers_and_models_are_right(module, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert module("cuda_models").main(["--device=cpu", f"--out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert [row["problem"] for row in rows] == ["encoder layer", "decoder block", "Llama"]
    assert all(0 < row["error_used"] <= 1 for row in rows)
    with pytest.raises(SystemExit, match="nothing to keep"):
        module("cuda_models").main(["--device=cpu", "--save"])


def test_models_that_are_compared_have_attention_of_their_own(module):
    pytest.importorskip("transformers")
    programs = module("hugging_face")
    ours, theirs = (
        programs.decoder(programs.QUICK_LLAMA, torch.float32, name) for name in ("eager", "sdpa")
    )
    assert (ours.config._attn_implementation, theirs.config._attn_implementation) == (
        "eager",
        "sdpa",
    )
    models = module("cuda_models").llama(module("cuda_models").TINY, "cpu").models
    assert [model.config._attn_implementation for model in models.values()] == ["fastattn", "sdpa"]


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


def test_a_decode_step_of_a_tiny_model_is_right(module, tmp_path):
    assert module("decode_step").main(["--device=cpu", f"--out={tmp_path}"]) == 0
    known = json.loads((tmp_path / "decode_step.json").read_text())
    assert [row["batch"] for row in known["rows"]] == [1, 3]
