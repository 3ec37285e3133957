"""What norms on CUDA have of their own: how rows are shared by threads, what is refused, and that
nothing waits. On an emulated GPU as far as that goes (FASTATTN_CUDA=emulate)."""

import pytest
import torch
from attention_options import skip_on_gpu
from cuda_cases import captured, emulated, gpu
from norm_cases import NORMS, call, check_norm, cotangents, norm_inputs, results

import fastattn.functional as fa
from fastattn import _C
from fastattn.testing import DTYPES, randn


@emulated
def test_an_emulated_kernel_runs_at_its_level_alone(level):
    before = _C.emulator_launches()
    results(fa, "add layer", norm_inputs("add layer", (3,), 40))
    assert (_C.emulator_launches() > before) == (level in _C.emulated_levels)


@pytest.mark.parametrize("norm", NORMS)
def test_float64_is_refused(cuda, norm):
    expected = r"^input: expected dtype float32, bfloat16 or float16 on CUDA, got dtype .*float64"
    for grad in (False, True):
        inputs = norm_inputs(norm, (3,), 8, torch.float64)
        with pytest.raises(TypeError, match=expected):
            call(fa, norm, {n: x.requires_grad_(grad) for n, x in inputs.items()})


# (rows, width) where a row goes from lanes of a warp to a warp, to several, to more than a block
# holds: backward with a bias, without one, and forward.
EDGES = {
    torch.bfloat16: [
        *((150, 8), (3, 16), (70, 32), (3, 128), (40, 136), (9, 1024), (7, 1032), (5, 2049)),
        *((2, 12288), (2, 12296), (2, 16392), (2, 24576), (2, 24584)),
    ],
    torch.float32: [
        *((150, 4), (3, 8), (70, 16), (3, 64), (40, 68), (9, 512), (7, 516), (5, 1025)),
        *((2, 6144), (2, 6148), (2, 8196), (2, 12288), (2, 12292)),
    ],
}


@pytest.mark.parametrize("dtype", EDGES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "add llama"])
def test_rows_of_all_tiles(cuda, dtype, norm):
    for rows, width in EDGES[dtype]:
        check_norm(norm, norm_inputs(norm, (rows,), width, dtype), what=f"{rows}x{width}")


def test_a_wider_weight_makes_wider_gradients_of_all_tiles(cuda):
    for rows, width in ((3, 16), (150, 128), (9, 1032), (3, 8192), (2, 8200)):
        inputs = norm_inputs("llama", (rows,), width, torch.bfloat16, torch.float32)
        check_norm("llama", inputs, what=f"{rows}x{width}")


@pytest.mark.parametrize("width", [40, 2056, 16400])
@pytest.mark.parametrize("norm", ["layer", "add gemma", "add layer"])
def test_gradients_do_not_depend_on_which_others_are_asked_for(cuda, norm, width):
    """Sums over rows come with the rows' gradients, or on their own, which adds them up in another
    order."""
    inputs = norm_inputs(norm, (70,) if width == 40 else (9,), width, torch.bfloat16)
    want = results(fa, norm, inputs)
    rows = [n for n in inputs if n not in ("weight", "bias")]
    for names in (rows, ["weight"], [n for n in inputs if n not in rows], [*rows, "weight"]):
        leaves = {n: x.detach().requires_grad_(n in names) for n, x in inputs.items()}
        outputs = call(fa, norm, leaves)
        wrt = [leaves[n] for n in names]
        for name, got in zip(names, torch.autograd.grad(outputs, wrt, cotangents(outputs))):
            tolerance = {"rtol": 1e-2, "atol": 1e-3} if name not in rows else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(got, want[f"d{name}"], **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 2000, 16400])
def test_results_do_not_depend_on_the_order_of_threads(cuda, dtype, width):
    inputs = norm_inputs("add layer", (130 if width == 24 else 9,), width, dtype)
    runs = []
    for seed in (1, 2, 3):
        if cuda in _C.emulated_levels:
            _C.set_emulator_seed(seed)
        runs.append(results(fa, "add layer", inputs))
    assert all(torch.equal(x, run[name]) for run in runs for name, x in runs[0].items())


def test_unaligned_tensors_give_the_bits_of_aligned_ones(cuda):
    """Every one of them, by so many elements that no 16 bytes begin where a row does."""
    for norm in ("layer", "add llama"):
        inputs = norm_inputs(norm, (5,), 264, torch.bfloat16)
        want = results(fa, norm, inputs)
        for shifted in inputs:
            moved = {}
            for name, x in inputs.items():
                memory = x.new_empty(x.numel() + 1)
                to = memory[1:] if name == shifted else memory[:-1]
                moved[name] = to.view(x.shape).copy_(x)
            got = results(fa, norm, moved)
            assert all(torch.equal(x, want[name]) for name, x in got.items()), shifted


def test_offsets_beyond_32_bits(cuda, tmp_path):
    """The second row lies 2**31 elements behind the first, in a file that is mostly a hole."""
    skip_on_gpu("its memory has no holes")
    far, inputs = 2**31 + 64, norm_inputs("add layer", (2,), 24, torch.bfloat16)
    apart = dict(inputs)
    for name in ("input", "residual"):
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(2 * (far + 24))
        memory = torch.from_file(str(path), shared=True, size=far + 24, dtype=torch.bfloat16)
        apart[name] = memory.as_strided((2, 24), (far, 1)).copy_(inputs[name])
    want = results(fa, "add layer", inputs)
    got = results(fa, "add layer", apart)
    assert all(torch.equal(x, want[name]) for name, x in got.items())


@gpu
@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_tensors_of_two_devices_are_refused(cuda, name):
    inputs = norm_inputs("add layer", (3,), 16)
    inputs[name] = inputs[name].cpu()
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor on"):
        call(fa, "add layer", inputs)


@gpu
def test_a_graph_captures_both_passes_and_repeats_them(cuda):
    """So none of them waits for the GPU, reads from it or allocates behind torch's back."""
    inputs = norm_inputs("add layer", (70,), 1000, torch.bfloat16)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    arrived = [randn(70, 1000, seed=s, dtype=torch.bfloat16) for s in (8, 9)]

    def step():
        outputs = call(fa, "add layer", leaves, dropout_p=0.1)
        return *outputs, *torch.autograd.grad(outputs, list(leaves.values()), arrived)

    results_of = captured(step)
    assert all(x.isfinite().all() for x in results_of)
    again = fa.layer_norm(results_of[1].detach(), 1000, inputs["weight"], inputs["bias"])
    assert torch.equal(results_of[0], again)
