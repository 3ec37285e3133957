"""flash_attn_with_kvcache, against keys and values gathered by hand and attended in float64."""

import math
import random

import pytest
import torch

from fastattn import reference
from fastattn.compat.flash_attn import flash_attn_with_kvcache
from fastattn.testing import assert_accurate, covering_sample, randn

BATCH, CAPACITY, DIM = 3, 24, 32

CASES = covering_sample(
    {
        "dtype": (torch.float32, torch.bfloat16, torch.float64),
        "heads": ((2, 2), (4, 2), (6, 1)),
        "queries": (1, 2, 5),
        "new": ("none", "as many", "fewer", "more"),
        "rotary": (None, "half", "interleaved"),
        "rotary_dim": (32, 16, 6),
        "storage": ("rows", "batch index", "pages of 1", "pages of 8", "pages of 256"),
        "leftpad": (False, True),
        "seqlens": ("int", "int32", "int64"),
        "causal": (False, True),
        "window": ((-1, -1), (7, 0), (3, -1), (-1, 2), (4, 1)),
        "softcap": (0.0, 2.0),
        "alibi": (None, "heads", "batch"),
        "scale": (None, 0.25),
    },
    count=400,
    seed=3,
    fits=lambda case: case["new"] != "fewer" or case["queries"] > 1,
)


class Call:
    """The arguments of one call, and what lies in the cache before and must lie there after it."""

    def __init__(self, case, seed):
        self.case, self.random = case, random.Random(seed)
        heads, self.kv_heads = case["heads"]
        dtype, queries = case["dtype"], case["queries"]
        rows = {"none": 0, "as many": queries, "fewer": queries - 1, "more": queries + 3}
        self.new = rows[case["new"]]
        self.q = randn(BATCH, queries, heads, DIM, seed=seed, dtype=dtype)
        self.fresh = [randn(BATCH, self.new, self.kv_heads, DIM, seed=seed + i) for i in (1, 2)]
        self.fresh = [x.to(dtype) for x in self.fresh]
        self._draw_lengths()
        self._draw_storage(seed)
        self._draw_tables()
        self.slopes = None
        if case["alibi"]:
            shape = (heads,) if case["alibi"] == "heads" else (BATCH, heads)
            self.slopes = randn(*shape, seed=seed + 5).abs() * 0.3

    def _draw_lengths(self):
        most = CAPACITY - self.new
        if self.case["seqlens"] == "int":
            self.lengths = [self.random.randint(0, most)] * BATCH
        else:
            self.lengths = [self.random.randint(0, most) for _ in range(BATCH)]
        self.leftpad = [0] * BATCH
        if self.case["leftpad"]:
            self.leftpad = [self.random.randint(0, n) for n in self.lengths]

    def _draw_storage(self, seed):
        """For each row of each sequence, the (entry, row) of the cache that holds it."""
        kind, size, entries = self.case["storage"], CAPACITY, BATCH
        self.batch_index = self.table = None
        if kind == "batch index":
            entries = BATCH + 2
            self.batch_index = self.random.sample(range(entries), BATCH)
        elif kind != "rows":
            size = int(kind.split()[-1])
            pages = -(-CAPACITY // size)
            entries = BATCH * pages + 2
            order = self.random.sample(range(entries), BATCH * pages)
            self.table = torch.tensor(order, dtype=torch.int32).view(BATCH, pages)
        shape = (entries, size, self.kv_heads, DIM)
        self.caches = [randn(*shape, seed=seed + i).to(self.case["dtype"]) for i in (3, 4)]
        self.size = size

    def place(self, b, j):
        if self.table is not None:
            return int(self.table[b, j // self.size]), j % self.size
        return (b if self.batch_index is None else self.batch_index[b]), j

    def _draw_tables(self):
        self.cos = self.sin = None
        if self.case["rotary"] and self.new:
            half = self.case["rotary_dim"] // 2
            angles = torch.arange(CAPACITY + 8).unsqueeze(1) * 0.7 ** torch.arange(half)
            self.cos, self.sin = angles.cos(), angles.sin()

    def run(self, **more):
        def index(x):
            return None if x is None else torch.tensor(x, dtype=torch.int32)

        seqlens = self.lengths[0]
        if self.case["seqlens"] != "int":
            seqlens = torch.tensor(self.lengths, dtype=getattr(torch, self.case["seqlens"]))
        return flash_attn_with_kvcache(
            self.q,
            *self.caches,
            *(self.fresh if self.new else (None, None)),
            rotary_cos=self.cos,
            rotary_sin=self.sin,
            cache_seqlens=seqlens,
            cache_batch_idx=index(self.batch_index),
            cache_leftpad=index(self.leftpad) if self.case["leftpad"] else None,
            block_table=self.table,
            softmax_scale=self.case["scale"],
            causal=self.case["causal"],
            window_size=self.case["window"],
            softcap=self.case["softcap"],
            rotary_interleaved=self.case["rotary"] == "interleaved",
            alibi_slopes=self.slopes,
            **more,
        )

    def turned(self, x, positions, dtype):
        """(rows, heads, DIM) at their positions, by the formula."""
        if self.cos is None:
            return x
        half = self.cos.shape[1]
        cos, sin = (t[positions].to(dtype).unsqueeze(1) for t in (self.cos, self.sin))
        n = torch.arange(half)
        a, b = (2 * n, 2 * n + 1) if self.case["rotary"] == "interleaved" else (n, n + half)
        out = x.clone()
        out[..., a], out[..., b] = (
            x[..., a] * cos - x[..., b] * sin,
            x[..., b] * cos + x[..., a] * sin,
        )
        return out

    def expected_caches(self, before, dtype):
        caches = [x.to(dtype) for x in before]
        for b, length in enumerate(self.lengths):
            positions = torch.arange(length, length + self.new)
            k, v = (x[b].to(dtype) for x in self.fresh)
            for cache, rows in zip(caches, (self.turned(k, positions, dtype), v)):
                for i in range(self.new):
                    cache[self.place(b, length + i)] = rows[i]
        return caches

    def expected(self, caches, dtype):
        """(out, lse) over what the caches hold after the call."""
        outs, lses = [], []
        case = self.case
        window = tuple(None if n < 0 else n for n in case["window"])
        local = case["causal"] or window != (None, None)
        for b, (length, pad) in enumerate(zip(self.lengths, self.leftpad)):
            places = [self.place(b, j) for j in range(pad, length + self.new)]
            entries = torch.tensor([p[0] for p in places], dtype=torch.int64)
            rows = torch.tensor([p[1] for p in places], dtype=torch.int64)
            k, v = (x.to(dtype)[entries, rows] for x in caches)
            positions = length + (
                torch.arange(case["queries"]) if local else torch.zeros(case["queries"])
            )
            q = self.turned(self.q[b].to(dtype), positions.long(), dtype)
            slopes = self.slopes[b] if case["alibi"] == "batch" else self.slopes
            out, lse = reference.attention(
                *(q, k, v),
                layout="bshd",
                causal=case["causal"],
                window=window,
                softcap=case["softcap"] or None,
                scale=case["scale"],
                alibi_slopes=slopes if slopes is None else slopes.to(dtype),
                return_lse=True,
            )
            outs.append(out)
            lses.append(lse)
        return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("seed", range(len(CASES)))
def test_every_combination(seed):
    case = CASES[seed]
    dtype = case["dtype"]
    call = Call(case, 10 * seed)
    before = [x.clone() for x in call.caches]
    out, lse = call.run(return_softmax_lse=True)
    stored = call.expected_caches(before, torch.float64), call.expected_caches(before, dtype)
    for name, got, exact, eager, old in zip(("k_cache", "v_cache"), call.caches, *stored, before):
        untouched = exact == old.double()
        assert torch.equal(got[untouched], old[untouched]), name
        if name == "v_cache" or call.cos is None:
            assert torch.equal(got, eager), name
        assert_accurate(got, exact, eager, name)
    # What attention reads is what was stored, rounded.
    want, eager = call.expected(call.caches, torch.float64), call.expected(call.caches, dtype)
    for name, got, exact, plain in zip(("out", "lse"), (out, lse), want, eager):
        assert_accurate(got, exact, plain, name, dtype=dtype)
    assert torch.equal(call.run(num_splits=4), out)


def test_a_cache_without_lengths_is_full():
    q, k, v = (randn(2, n, 2, 16, seed=i) for i, n in enumerate((3, 9, 9)))
    out = flash_attn_with_kvcache(q, k, v, causal=True)
    want = reference.attention(*(x.double() for x in (q, k, v)), causal=True, layout="bshd")
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    chosen = flash_attn_with_kvcache(q[:1], k, v, causal=True, cache_batch_idx=torch.tensor([1]))
    alone = flash_attn_with_kvcache(q[1:], k[1:], v[1:], causal=True)
    torch.testing.assert_close(out[1:], alone)
    q_alone = flash_attn_with_kvcache(q[:1], k[1:], v[1:], causal=True)
    torch.testing.assert_close(chosen, q_alone)
    pages = torch.tensor([[0, 1]])
    paged = flash_attn_with_kvcache(q[:1], k, v, block_table=pages)
    joined = flash_attn_with_kvcache(q[:1], *(x.flatten(0, 1)[None] for x in (k, v)))
    torch.testing.assert_close(paged, joined)


def test_one_entry_of_the_cache_may_serve_several_sequences():
    q, k, v = randn(3, 1, 2, 8, seed=0), randn(2, 6, 2, 8, seed=1), randn(2, 6, 2, 8, seed=2)
    index, lengths = torch.tensor([1, 1, 0]), torch.tensor([4, 6, 5])
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, cache_batch_idx=index)
    for b in range(3):
        entry = index[b : b + 1]
        one = {"cache_seqlens": lengths[b : b + 1]}
        alone = flash_attn_with_kvcache(q[b : b + 1], k[entry], v[entry], **one)
        torch.testing.assert_close(out[b : b + 1], alone)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_positions_of_queries_are_those_of_the_documentation(queries, causal):
    """All at cache_seqlens unless causal or local: k is rotated row by row in any case."""
    q, k = randn(1, queries, 1, 8, seed=0), randn(1, queries, 1, 8, seed=1)
    angles = torch.arange(20.0).unsqueeze(1) * torch.tensor([1.0, 0.3, 0.1, 0.03])
    caches = torch.zeros(2, 1, 16, 1, 8)
    _, lse = flash_attn_with_kvcache(
        *(q, *caches, k, k, angles.cos(), angles.sin()),
        cache_seqlens=5,
        causal=causal,
        return_softmax_lse=True,
    )

    def at(x, position):
        rotated = torch.view_as_complex(x.reshape(4, 2)) * torch.polar(
            torch.ones(4), angles[position]
        )
        return torch.view_as_real(rotated).flatten()

    for i in range(queries):
        query = at(q[0, i, 0], 5 + i if causal else 5)
        seen = i + 1 if causal else queries
        keys = torch.stack([torch.zeros(8)] * 5 + [at(k[0, j, 0], 5 + j) for j in range(seen)])
        torch.testing.assert_close(lse[0, 0, i], (keys @ query / math.sqrt(8)).logsumexp(0))


Q, CACHE = torch.zeros(2, 2, 2, 8), torch.full((2, 8, 2, 8), 7.0)
K3, TABLE = torch.zeros(2, 3, 2, 8), torch.zeros(2, 1, dtype=torch.int32)
INDEX, COS = torch.tensor([0, 1]), torch.ones(12, 4)


@pytest.mark.parametrize("new", [Q, K3], ids=["as many", "more"])
@pytest.mark.parametrize(
    ("argument", "error", "options"),
    [
        ("v", TypeError, {"v": None}),
        ("k", TypeError, {"k": None}),
        ("k", TypeError, {"k": 1}),
        ("k", ValueError, {"k": Q[:1]}),
        ("k", ValueError, {"k": Q[..., :4], "v": Q}),
        ("v", ValueError, {"v": Q[:, :1]}),
        ("v", TypeError, {"v": "double"}),
        ("cache_seqlens", ValueError, {"cache_seqlens": None}),
        ("cache_seqlens", ValueError, {"cache_seqlens": 7}),
        ("cache_seqlens", ValueError, {"cache_seqlens": torch.tensor([0])}),
        ("cache_seqlens", ValueError, {"cache_seqlens": torch.tensor([-1, 0])}),
        ("cache_seqlens", TypeError, {"cache_seqlens": torch.tensor([1.0, 2.0])}),
        ("cache_seqlens", TypeError, {"cache_seqlens": "3"}),
        ("cache_batch_idx", ValueError, {"cache_batch_idx": torch.tensor([0, 2])}),
        ("cache_batch_idx", ValueError, {"cache_batch_idx": torch.tensor([0, -1])}),
        ("cache_batch_idx", ValueError, {"cache_batch_idx": torch.tensor([0])}),
        ("cache_batch_idx", TypeError, {"cache_batch_idx": torch.tensor([0.0, 1.0])}),
        ("cache_batch_idx", ValueError, {"cache_batch_idx": INDEX, "block_table": TABLE}),
        ("block_table", ValueError, {"block_table": TABLE + 9}),
        ("cache_leftpad", ValueError, {"cache_leftpad": torch.tensor([0])}),
        ("rotary_cos", ValueError, {"rotary_sin": COS}),
        ("rotary_sin", ValueError, {"rotary_cos": COS}),
        ("rotary_cos", ValueError, {"rotary_cos": COS, "rotary_sin": COS, "k": None, "v": None}),
        ("cache_seqlens", ValueError, {"rotary_cos": COS[:3], "rotary_sin": COS[:3]}),
        ("window_size", TypeError, {"window_size": 3}),
        ("softmax_scale", TypeError, {"softmax_scale": "x"}),
        ("softcap", TypeError, {"softcap": None}),
        ("alibi_slopes", ValueError, {"alibi_slopes": torch.ones(5)}),
        ("q", ValueError, {"q": Q[0]}),
        ("q", ValueError, {"q": Q.clone().requires_grad_()}),
    ],
)
def test_errors_name_the_argument_and_leave_the_cache_alone(argument, error, options, new):
    caches = [CACHE.clone(), CACHE.clone()]
    given = {"q": Q, "k": new, "v": new, "cache_seqlens": 3} | options
    given["v"] = new.double() if given["v"] == "double" else given["v"]
    with pytest.raises(error, match=f"^{argument}: "):
        flash_attn_with_kvcache(given.pop("q"), *caches, **given)
    assert all(torch.equal(x, CACHE) for x in caches)
