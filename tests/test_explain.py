"""explain names the kernel that a call takes, and why the others do not."""

import pytest
import torch

import fastattn
from fastattn.functional import attention


def _explain(queries, *, keys=80, dtype=torch.float32, **options):
    query = torch.zeros(2, 4, queries, 16, dtype=dtype)
    key = torch.zeros(2, 2, keys, 16, dtype=dtype)
    return fastattn.explain(query, key, key, **options)


@pytest.mark.parametrize(
    ("queries", "options", "schedule"),
    [
        (64, {}, "tile"),
        (8, {}, "decode"),
        (16, {}, "tile"),
        (16, {"keys": 300}, "decode"),
        (1, {"batch_invariant": True}, "tile"),
        (64, {"query_lengths": torch.tensor([64, 1])}, "decode and tile"),
        (64, {"query_lengths": torch.tensor([2, 0])}, "decode"),
    ],
)
def test_each_sequence_takes_the_schedule_of_its_query_length(queries, options, schedule):
    explanation = _explain(queries, **options)
    assert explanation.kernel.endswith(f"/{schedule}")
    for name in schedule.split(" and "):
        assert any(reason.startswith(f"schedule {name}: ") for reason in explanation.reasons)
    assert set(explanation.rejected) & {"tile", "decode"} == {"tile", "decode"} - set(
        schedule.split(" and ")
    )


def test_a_batch_of_both_schedules_gives_what_each_sequence_gives_alone(level):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, 4, 64, 16),
        torch.randn(2, 2, 80, 16),
        torch.randn(2, 2, 80, 16),
    )
    lengths = torch.tensor([64, 3])
    both = attention(query, key, value, causal=True, query_lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = attention(query[b : b + 1, :, :n], key[b : b + 1], value[b : b + 1], causal=True)
        assert torch.equal(both[b, :, :n], alone[0])
        assert not both[b, :, n:].any()


def test_the_level_in_use_and_what_keeps_the_others_back(level):
    explanation = _explain(8)
    assert explanation.kernel.startswith(f"cpu/{level}/")
    names = {name for name, _ in fastattn._C.cpu_levels()}
    assert names - {level} <= set(explanation.rejected)


def test_float64_is_scalar():
    assert _explain(8, dtype=torch.float64).kernel == "cpu/scalar/decode"


def test_nothing_to_do():
    assert _explain(0).kernel == "no kernel"


def test_gradients_where_there_are_to_be_some(level):
    query, key = torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 9, 16)
    assert fastattn.explain(query, key, key).backward is None
    about = fastattn.explain(query, key.requires_grad_(), key)
    assert about.backward.kernel == f"cpu/{level}/in order"
    assert "backward:\n  cpu" in str(about)


def test_packed_sequences_and_caches(level):
    query, cache = torch.zeros(5, 2, 16), torch.zeros(3, 2, 4, 16)
    bounds = torch.tensor([0, 2, 5])
    packed = fastattn.explain(query, query, query, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    assert packed.kernel.startswith(f"cpu/{level}/")
    pages = {"block_table": torch.tensor([[0, 2], [1, 2]]), "cache_lengths": torch.tensor([2, 8])}
    caches = {"k_cache": cache, "v_cache": cache, **pages}
    assert fastattn.explain(query, cu_seqlens_q=bounds, **caches).kernel == f"cpu/{level}/decode"
    with pytest.raises(ValueError, match="block_table"):
        fastattn.explain(query, cu_seqlens_q=bounds, **caches | {"block_table": bounds[None]})


def test_wrong_arguments_raise_as_the_call_does():
    with pytest.raises(ValueError, match="softcap"):
        _explain(8, softcap=-1.0)
