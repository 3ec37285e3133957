"""Writes into caches store what the reference stores, and touch no other byte."""

import math
import random

import pytest
import torch
from attention_options import is_on_cuda, skip_without_kernels
from cache_cases import Caches, rope_tables
from test_attention_ecosystem import Recorder
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import DTYPES, assert_accurate, covering_sample, one_thread, randn, restride

AXES = {
    "storage": ("contiguous", "ring", "paged"),
    "dtype": (*DTYPES, torch.float64),
    "quantized": (False, True),
    "layout": ("bhsd", "bshd"),
    "aligned": (False, True),
    "head_dim": (1, 3, 8, 17, 40, 64, 128, 129),
    "value_dim": (None, None, 1, 24),
    "kv_heads": (1, 2, 3),
    "page_size": (1, 3, 16, 17, 64),
    "positions": ("int", "batch", "rows", "packed", "slots"),
    "new": (0, 1, 2, 7, 20),
    "lengths": (False, True),
}


def fits(case):
    if case["lengths"]:
        return case["positions"] not in ("packed", "slots")
    return case["positions"] != "slots" or case["storage"] != "ring"


CASES = covering_sample(AXES, 120, 7, fits)


def place(case, caches, pick):
    """(positions, options, whether the rows are packed) of the write of a case."""
    batch, new, room = caches.batch, case["new"], caches.capacity
    most = 3 * room if case["storage"] == "ring" else room
    integer = pick.choice([torch.int32, torch.int64])

    def draw(*shape, low=0, high):
        drawn = [pick.randrange(low, high) for _ in range(math.prod(shape))]
        return torch.tensor(drawn, dtype=integer).reshape(shape)

    options = {"lengths": draw(batch, high=new + 1)} if case["lengths"] else {}
    if case["positions"] == "int":
        return pick.randrange(most - new + 1), options, False
    if case["positions"] == "batch":
        return draw(batch, high=most - new + 1), options, False
    if case["positions"] == "rows":
        return draw(batch, new, low=-3, high=most), options, False
    if case["positions"] == "packed":
        *inner, last = sorted(pick.randrange(new + 1) for _ in range(batch))
        options["cu_seqlens"] = torch.tensor([0, *inner, last], dtype=integer)
        return draw(batch, high=most - new + 1), options, True
    caches.block_table = None
    slots = caches.views["k_cache"].shape[0] * caches.rows
    return draw(new, low=-3, high=slots), options, True


def caches_of(case, seed, **more):
    names = ("dtype", "quantized", "layout", "aligned", "head_dim", "value_dim", "storage")
    shape = {n: case[n] for n in (*names, "kv_heads", "page_size") if n in case}
    return Caches(**shape, batch=3, capacity=29, seed=seed, **more)


def write_both(caches, key, value, positions, **options):
    """The caches after the same write by the op, and by the reference."""
    meant = caches.copy()
    pair = (key, value)
    fa.kv_cache_update(*caches.tensors(), *pair, positions, **caches.options(), **options)
    with one_thread():
        reference.kv_cache_update(*meant.tensors(), *pair, positions, **meant.options(), **options)
    return caches, meant


@pytest.mark.parametrize("seed", range(len(CASES)))
def test_every_byte_is_that_of_the_reference(level, seed):
    skip_without_kernels(CASES[seed]["dtype"])
    caches = caches_of(CASES[seed], seed)
    positions, options, packed = place(CASES[seed], caches, random.Random(seed))
    pair = caches.rows_of(CASES[seed]["new"], seed=seed, packed=packed)
    got, want = write_both(caches, *pair, positions, **options)
    assert got.same_bytes_as(want)


@pytest.mark.parametrize("kind", ["transposed", "fused", "strided", "columns", "guarded"])
@pytest.mark.parametrize("quantized", [False, True])
def test_any_strides_of_key_and_caches(level, kind, quantized):
    caches = Caches("paged", batch=3, capacity=20, head_dim=19, quantized=quantized)
    for name in ("k_cache", "v_cache"):
        caches.buffers[name] = caches.buffers[name].transpose(1, 3).contiguous().transpose(1, 3)
        caches.views[name] = caches.buffers[name][1:-1, 1:-1, 1:-1, 1:-1]
    pair = (restride(x, kind) for x in caches.rows_of(6, seed=1))
    got, want = write_both(caches, *pair, torch.tensor([0, 14, 3]))
    assert got.same_bytes_as(want)


def test_an_expanded_key_is_written_to_every_request(level):
    caches = Caches(batch=3)
    key, value = (x[:1].expand(3, -1, -1, -1) for x in caches.rows_of(4, seed=1))
    got, want = write_both(caches, key, value, 5)
    assert got.same_bytes_as(want)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 16, 38, 40])
@pytest.mark.parametrize("aligned", [False, True])
def test_keys_are_rotated_by_their_positions(level, dtype, interleaved, rotary_dim, aligned):
    skip_without_kernels(dtype)
    for storage, table_dtype in (("contiguous", dtype), ("paged", torch.float32)):
        caches = Caches(storage, head_dim=40, dtype=dtype, aligned=aligned)
        rope = rope_tables(32, rotary_dim, dtype=table_dtype)
        key, value = caches.rows_of(6, seed=rotary_dim)
        exact = caches.copy()
        for name in ("k_cache", "v_cache"):
            exact.views[name] = exact.views[name].double()
        options = {"rope": rope, "interleaved": interleaved}
        got, plain = write_both(caches, key, value, torch.tensor([3, 26]), **options)
        reference.kv_cache_update(
            *exact.tensors(),
            *(key.double(), value.double(), torch.tensor([3, 26])),
            **exact.options(),
            rope=tuple(x.double() for x in rope),
            interleaved=interleaved,
        )
        (k, v), (_, plain_v) = got.tensors(), plain.tensors()
        assert torch.equal(v.nan_to_num(9.0), plain_v.nan_to_num(9.0))
        assert_accurate(k, exact.tensors()[0], plain.tensors()[0], "k_cache", magnitude=3.0)


@pytest.mark.parametrize("form", ["rows", "slots"])
def test_rope_positions_may_be_others_than_those_of_the_rows(level, form):
    caches = Caches(batch=2)
    rope = rope_tables(50, 8)
    key, value = caches.rows_of(4, seed=3)
    turns = torch.tensor([[40, 3, 3, 0], [7, 8, 9, 49]])
    at = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    options = {"rope": rope, "rope_positions": turns}
    positions = at
    if form != "rows":
        key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
        options["rope_positions"] = turns.flatten()
        positions = (at + torch.tensor([[0], [32]])).flatten()
    got, want = write_both(caches, key, value, positions, **options)
    for name, view in got.views.items():
        torch.testing.assert_close(view, want.views[name], equal_nan=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("aligned", [False, True])
def test_int8_rotates_before_it_rounds(level, interleaved, dtype, aligned):
    caches = Caches(quantized=True, head_dim=48, dtype=dtype, aligned=aligned)
    rope = rope_tables(32, 32)
    pair = caches.rows_of(9, seed=2)
    got, want = write_both(caches, *pair, 4, rope=rope, interleaved=interleaved)
    torch.testing.assert_close(got.views["k_scale"], want.views["k_scale"], equal_nan=True)
    apart = got.views["k_cache"].int() - want.views["k_cache"].int()
    assert apart.abs().max() <= 1  # a tie that the last bit of a float32 decides
    assert (apart != 0).float().mean() < 0.01


def test_int8_rows_of_zeros_infinities_and_nan(level):
    caches = Caches(quantized=True, batch=1, kv_heads=1, head_dim=5)
    key = torch.tensor(
        [
            [0.0, -0.0, 0.0, 0.0, 0.0],
            [1.0, math.nan, 0.0, 0.0, 0.0],
            [1.0, math.inf, 0.0, 0.0, 0.0],
            [-math.inf, math.nan, 0.0, 0.0, 0.0],
            [127.0, 0.5, 1.5, -2.5, -126.5],
            [3e38, -3e38, 1e38, 1.0, 0.0],
            [1e-38, 0.0, -1e-38, 1e-45, 0.0],
            [1e-45, 0.0, 0.0, 0.0, 0.0],
        ]
    )[None, None]
    got, want = write_both(caches, key, key, 0)
    for name, view in got.views.items():
        torch.testing.assert_close(view, want.views[name], rtol=0, atol=0, equal_nan=True)
    assert got.views["k_cache"][0, 0, 4].tolist() == [127, 0, 2, -2, -126]
    scale = got.views["k_scale"][0, 0, :8]
    assert scale[0] == 0 and scale[1:4].isnan().all() and scale[4] == 1


@pytest.mark.parametrize("quantized", [False, True])
def test_int8_is_off_by_at_most_half_a_step(level, quantized):
    caches = Caches(quantized=True, head_dim=64, capacity=64)
    key, value = caches.rows_of(64, seed=5)
    fa.kv_cache_update(*caches.tensors(), key, value, 0, **caches.options())
    for x, numbers, scale in ((key, "k_cache", "k_scale"), (value, "v_cache", "v_scale")):
        step = caches.views[scale].double().unsqueeze(-1)
        error = (caches.views[numbers] * step - x.double()).abs()
        assert (error <= step * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("storage", ["contiguous", "ring", "paged"])
@pytest.mark.parametrize("count", [1, 4])
def test_the_later_of_two_rows_stays(level, threads, storage, count):
    threads(count)
    caches = Caches(storage, capacity=8, kv_heads=4, head_dim=64)
    new = 400
    pick = random.Random(3)
    positions = torch.tensor([[pick.randrange(8) for _ in range(new)] for _ in range(2)])
    got, want = write_both(caches, *caches.rows_of(new, seed=1), positions)
    assert got.same_bytes_as(want)


def test_on_the_cpu_the_later_of_two_sequences_stays(level):
    if is_on_cuda(level):
        pytest.skip("CUDA: one of two rows stays, where sequences meet in a page")
    caches = Caches("paged", capacity=8, kv_heads=4, head_dim=64)
    caches.block_table[1] = caches.block_table[0]
    got, want = write_both(caches, *caches.rows_of(8, seed=1), torch.tensor([0, 0]))
    assert got.same_bytes_as(want)


def test_a_ring_keeps_the_last_rows_of_a_long_write(level):
    caches = Caches("ring", capacity=5, batch=1)
    key, value = caches.rows_of(17, seed=1)
    fa.kv_cache_update(*caches.tensors(), key, value, 100, **caches.options())
    for p in range(112, 117):
        assert torch.equal(caches.views["k_cache"][:, :, p % 5], key[:, :, p - 100])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_large_writes_are_the_same_for_any_number_of_threads(level, threads, count):
    threads(count)
    caches = Caches("paged", batch=3, capacity=200, page_size=7, head_dim=65, kv_heads=3)
    got, want = write_both(caches, *caches.rows_of(190, seed=1), torch.tensor([0, 7, 10]))
    assert got.same_bytes_as(want)


# Guard bands


class Fuzz:
    """Random writes, valid or not, to a pool of caches that keep what they hold."""

    def __init__(self, seed):
        self.pick = random.Random(seed)
        self.pool = []
        for storage in ("contiguous", "ring", "paged"):
            for quantized in (False, True):
                for layout in ("bhsd", "bshd"):
                    shape = {"batch": 2, "kv_heads": 2, "capacity": 7, "head_dim": 5}
                    more = {"page_size": 3, "layout": layout, "quantized": quantized}
                    caches = Caches(storage, **shape, **more, seed=len(self.pool))
                    self.pool.append((caches, caches.copy()))
        self.rows = {
            (layout, packed, new): Caches(layout=layout, head_dim=5).rows_of(
                new, seed=new, packed=packed
            )
            for layout in ("bhsd", "bshd")
            for packed in (False, True)
            for new in range(4)
        }

    def integer(self, low, high):
        return self.pick.randint(low, high)

    def tensor(self, rows):
        return torch.tensor(rows, dtype=self.pick.choice([torch.int32, torch.int64]))

    def call(self, caches):
        """(key and value, positions, options), often with positions out of the cache."""
        new, room = self.integer(0, 3), caches.capacity
        options = caches.options()
        form = self.pick.choice(["int", "batch", "rows", "packed", "slots"])
        packed = form in ("packed", "slots")
        if form == "int":
            positions = self.integer(-1, room)
        elif form in ("batch", "packed"):
            positions = self.tensor([self.integer(-1 if self.integer(0, 9) == 0 else 0, room)] * 2)
            positions[1] = self.integer(0, room - 1)
        elif form == "rows":
            rows = [[self.integer(-1, room) for _ in range(new)] for _ in range(2)]
            positions = self.tensor(rows).reshape(2, new)
        else:
            options.pop("block_table", None)
            options.pop("ring", None)
            slots = caches.views["k_cache"].shape[0] * caches.rows
            positions = self.tensor([self.integer(-1, slots) for _ in range(new)]).reshape(new)
        if form == "packed":
            options["cu_seqlens"] = self.tensor(sorted([0, self.integer(0, new), new]))
        if not packed and self.integer(0, 3) == 0:
            options["lengths"] = self.tensor([self.integer(0, new) for _ in range(2)])
        if "block_table" in options and self.integer(0, 4) == 0:
            table = options["block_table"].clone()
            others = [page for page in range(-2, 13) if page not in table]  # some are in the pool
            table[self.integer(0, 1), self.integer(0, 2)] = self.pick.choice(others)
            options["block_table"] = table
        return self.rows[caches.layout, packed, new], positions, options

    def spoiled(self, pair, positions, options):
        """The call with an argument that cannot be right."""
        key, value = pair
        how = self.integer(0, 9)
        if how == 0:
            key = key.double()
        elif how == 1:
            value = value[..., :-1]
        elif how == 2:
            key = torch.cat([key, key], -1)
        elif how == 3:
            positions = torch.zeros(3, 3, 3, dtype=torch.int64)
        elif how == 4:
            positions = torch.full((2,), 0.5)
        elif how == 5:
            options = options | {"lengths": torch.tensor([0, 99])}
        elif how == 6:
            options = options | {"layout": "sbhd"}
        elif how == 7:
            options = options | {"rope": rope_tables(4, 64)}
        elif how == 8:
            options = options | {"k_scale": torch.zeros(1)}
        else:
            options = options | {"cu_seqlens": torch.tensor([0, 3, 1])}
        return (key, value), positions, options


def test_ten_thousand_writes_touch_nothing_else_and_invalid_ones_nothing_at_all():
    fuzz = Fuzz(0)
    refused = 0
    with one_thread():
        for _ in range(10_000):
            got, want = fuzz.pick.choice(fuzz.pool)
            pair, positions, options = fuzz.call(got)
            if fuzz.integer(0, 4) == 0:
                pair, positions, options = fuzz.spoiled(pair, positions, options)
                valid = False
            else:
                meant = options | {n: x for n, x in want.options().items() if "scale" in n}
                try:
                    reference.kv_cache_update(*want.tensors(), *pair, positions, **meant)
                    valid = True
                except ValueError:
                    valid = False
            if valid:
                fa.kv_cache_update(*got.tensors(), *pair, positions, **options)
            else:
                refused += 1
                with pytest.raises((ValueError, TypeError)):
                    fa.kv_cache_update(*got.tensors(), *pair, positions, **options)
            assert got.same_bytes_as(want)
    assert 3_000 < refused < 7_000


# Errors


def right():
    caches = Caches(batch=2, kv_heads=3, capacity=8, head_dim=6, value_dim=4)
    key, value = caches.rows_of(3, seed=1)
    k_cache, v_cache = caches.tensors()
    return {"k_cache": k_cache, "v_cache": v_cache, "key": key, "value": value, "positions": 0}


def paged():
    caches = Caches("paged", batch=2, kv_heads=3, capacity=8, head_dim=6, value_dim=4)
    return right() | dict(zip(("k_cache", "v_cache"), caches.tensors())) | caches.options()


def quantized():
    caches = Caches(quantized=True, batch=2, kv_heads=3, capacity=8, head_dim=6, value_dim=4)
    return right() | dict(zip(("k_cache", "v_cache"), caches.tensors())) | caches.options()


def packed():
    key, value = Caches(kv_heads=3, head_dim=6, value_dim=4).rows_of(5, seed=1, packed=True)
    bounds = torch.tensor([0, 2, 5])
    return right() | {
        "key": key,
        "value": value,
        "cu_seqlens": bounds,
        "positions": torch.tensor([0, 1]),
    }


def slots():
    arguments = packed() | {"positions": torch.tensor([0, 1, 2, 9, 15])}
    del arguments["cu_seqlens"]
    return arguments


def rotated():
    return right() | {"rope": rope_tables(8, 6)}


def row_by_row():
    return rotated() | {"positions": torch.tensor([[0, 1, 7], [-1, 0, 2]])}


zeros, i64 = torch.zeros, torch.int64
ERRORS = [
    (right, {"k_cache": None}, TypeError, "k_cache"),
    (right, {"key": [1.0]}, TypeError, "key"),
    (right, {"positions": "0"}, TypeError, "positions"),
    (right, {"positions": 1.5}, TypeError, "positions"),
    (right, {"positions": torch.tensor([0.0, 1.0])}, TypeError, "positions"),
    (right, {"positions": -1}, ValueError, "positions"),
    (right, {"positions": 6}, ValueError, "positions"),
    (right, {"positions": torch.tensor([0, 6])}, ValueError, "positions"),
    (right, {"positions": torch.tensor([0, 2**40])}, ValueError, "positions"),
    (right, {"positions": torch.tensor([0, 1, 2])}, ValueError, "positions"),
    (right, {"positions": zeros(2, 4, dtype=i64)}, ValueError, "positions"),
    (right, {"positions": torch.tensor([[0, 1, 8], [0, 1, 2]])}, ValueError, "positions"),
    (right, {"k_cache": zeros(2, 3, 8, 6, dtype=torch.bfloat16)}, TypeError, "k_cache"),
    (right, {"k_cache": zeros(2, 3, 8, 5)}, ValueError, "key|k_cache"),
    (right, {"k_cache": zeros(2, 2, 8, 6)}, ValueError, "key|[kv]_cache"),
    (right, {"k_cache": zeros(3, 8, 6)}, ValueError, "k_cache"),
    (right, {"v_cache": zeros(2, 3, 7, 4)}, ValueError, "v_cache"),
    (right, {"v_cache": zeros(2, 3, 8, 5)}, ValueError, "value|v_cache"),
    (right, {"value": zeros(2, 3, 2, 4)}, ValueError, "value"),
    (right, {"value": zeros(2, 3, 3, 4).double()}, TypeError, "value"),
    (right, {"key": zeros(3, 3, 3, 6)}, ValueError, "key|value"),
    (right, {"key": zeros(2, 3, 3, 6, dtype=i64)}, TypeError, "key|k_cache"),
    (right, {"layout": "sbhd"}, ValueError, "layout"),
    (right, {"lengths": torch.tensor([0, 4])}, ValueError, "lengths"),
    (right, {"lengths": torch.tensor([0, -1])}, ValueError, "lengths"),
    (right, {"lengths": torch.tensor([1])}, ValueError, "lengths"),
    (right, {"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths"),
    (right, {"k_scale": zeros(2, 3, 8)}, (ValueError, TypeError), "k_scale|k_cache"),
    (right, {"k_cache": zeros(1, 1, 1, 6).expand(2, 3, 8, 6)}, ValueError, "k_cache"),
    (paged, {"block_table": torch.tensor([[7, 0], [1, 2]])}, ValueError, "block_table"),
    (paged, {"block_table": torch.tensor([[0, 1], [-1, 2]])}, ValueError, "block_table"),
    (paged, {"block_table": torch.tensor([[0, 1]])}, ValueError, "block_table|key"),
    (paged, {"block_table": torch.tensor([0, 1])}, ValueError, "block_table"),
    (paged, {"block_table": zeros(2, 2)}, TypeError, "block_table"),
    (paged, {"positions": 6}, ValueError, "positions"),
    (paged, {"ring": True}, ValueError, "ring|block_table"),
    (quantized, {"k_scale": None}, (ValueError, TypeError), "k_scale"),
    (quantized, {"v_scale": None}, (ValueError, TypeError), "v_scale"),
    (quantized, {"k_scale": zeros(2, 3, 7)}, ValueError, "k_scale"),
    (quantized, {"k_scale": zeros(2, 3, 8).double()}, TypeError, "k_scale"),
    (quantized, {"k_scale": [1.0]}, TypeError, "k_scale"),
    (packed, {"cu_seqlens": torch.tensor([0, 3, 2])}, ValueError, "cu_seqlens"),
    (packed, {"cu_seqlens": torch.tensor([0, 3, 6])}, ValueError, "cu_seqlens"),
    (packed, {"cu_seqlens": torch.tensor([1, 3, 5])}, ValueError, "cu_seqlens"),
    (packed, {"positions": torch.tensor([0, 6])}, ValueError, "positions"),
    (packed, {"positions": torch.tensor([0])}, ValueError, "positions|cu_seqlens"),
    (slots, {"positions": torch.tensor([0, 1, 2, 3, 16])}, ValueError, "positions"),
    (slots, {"positions": torch.tensor([0, 1])}, ValueError, "positions"),
    (rotated, {"rope": rope_tables(2, 6)}, ValueError, "rope|positions"),
    (rotated, {"rope": rope_tables(8, 8)}, ValueError, "rope|cos"),
    (rotated, {"rope": rope_tables(8, 6)[0]}, (TypeError, ValueError), "rope"),
    (rotated, {"rope": (rope_tables(8, 6)[0], rope_tables(8, 4)[1])}, ValueError, "rope|sin"),
    (row_by_row, {"rope_positions": torch.tensor([[0, 1, 9], [0, 0, 0]])}, ValueError, "rope"),
    (row_by_row, {"rope_positions": torch.tensor([0, 1])}, ValueError, "rope_positions"),
    (rotated, {"rope_positions": torch.tensor([[0, 1, 2], [0, 0, 0]])}, ValueError, "rope_pos"),
    (packed, {"lengths": torch.tensor([1, 1])}, ValueError, "lengths"),
    (slots, {"rope": rope_tables(8, 6)}, ValueError, "rope_positions"),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_wrong_arguments_raise_by_name_and_write_nothing(number):
    make, changes, error, name = ERRORS[number]
    arguments = make() | changes
    stores = [arguments[n] for n in ("k_cache", "v_cache") if torch.is_tensor(arguments[n])]
    before = [x.clone() for x in stores]
    positional = [arguments.pop(n) for n in ("k_cache", "v_cache", "key", "value", "positions")]
    with pytest.raises(error, match=rf"^({name})"):
        fa.kv_cache_update(*positional, **arguments)
    for x, kept in zip(stores, before):
        torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)


def test_gradients_are_refused():
    arguments = right()
    arguments["key"].requires_grad_()
    with pytest.raises((ValueError, RuntimeError), match="key"):
        fa.kv_cache_update(**arguments)
    with torch.no_grad():
        fa.kv_cache_update(**arguments)


# Inside of torch


def test_the_op_passes_opcheck():
    with Recorder() as recorder:
        for make in (quantized, packed, rotated):
            fa.kv_cache_update(**make())
    assert {str(function) for function, _, _ in recorder.calls} == {
        "fastattn.kv_cache_update.default"
    }
    for function, args, kwargs in recorder.calls:
        torch.library.opcheck(function, args, kwargs)


@pytest.mark.parametrize("make", [right, paged, quantized, packed, slots, rotated])
def test_compiled_writes_follow_positions_that_are_tensors(make):
    torch._dynamo.reset()
    arguments = make()
    if not torch.is_tensor(arguments["positions"]):
        arguments["positions"] = torch.tensor([0, 2])
    positional = [arguments.pop(n) for n in ("k_cache", "v_cache", "key", "value", "positions")]

    def write(k_cache, v_cache, key, value, positions):
        fa.kv_cache_update(k_cache, v_cache, key * 2, value * 3, positions, **arguments)
        return k_cache.float().nansum()

    compiled = torch.compile(write, backend="aot_eager", fullgraph=True, dynamic=True)
    stores = [[x.clone() for x in positional[:2]] for _ in range(2)]
    for shift in (0, 1, 3):
        at = positional[4] + shift if make is not slots else positional[4].clamp(max=15 - shift)
        for function, (k_cache, v_cache) in zip((write, compiled), stores):
            function(k_cache, v_cache, *positional[2:4], at)
        for a, b in zip(*stores):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_one_graph_serves_all_numbers_of_rows():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fa.kv_cache_update, backend=counter, fullgraph=True, dynamic=True)
    caches = Caches(batch=3, capacity=40)
    for new in range(2, 12):
        key, value = randn(3, 2, new, 8, seed=new), randn(3, 2, new, 8, seed=new + 1)
        want = caches.copy()
        compiled(*caches.tensors(), key, value, torch.tensor([0, new, 2 * new]))
        fa.kv_cache_update(*want.tensors(), key, value, torch.tensor([0, new, 2 * new]))
        assert caches.same_bytes_as(want)
    assert counter.frame_count <= 2
