"""The grid: every row of every family."""

from __future__ import annotations

from cases import activation, attention, cuda_attention, cuda_rows, kv_cache, norm, rope
from cases.base import Case

ALL: list[Case] = [
    *attention.ALL,
    *norm.ALL,
    *activation.ALL,
    *rope.ALL,
    *kv_cache.ALL,
    *cuda_attention.ALL,
    *cuda_rows.ALL,
]
BY_ID = {case.id: case for case in ALL}
PEERS = {name: peer for case in ALL for name, peer in case.peers.items()}


def on(device: str) -> list[Case]:
    return [case for case in BY_ID.values() if case.device == device]


def family(name: str) -> list[Case]:
    return [case for case in BY_ID.values() if case.family == name]
