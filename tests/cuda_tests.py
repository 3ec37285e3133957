"""The test files of all that has CUDA kernels: they run at the levels of CUDA too (conftest.py).
As a program this prints the paths of those that run at a level: python tests/cuda_tests.py sm80"""

import sys
from fnmatch import fnmatch
from pathlib import Path

ATTENTION = "test_attention_*.py"
PATTERNS = (
    *(ATTENTION, "test_norm*.py", "test_nn_norm.py"),
    *("test_activation*.py", "test_rope.py", "test_rope_cuda.py", "test_kv_cache_*.py"),
)
# What is built of these: on CUDA only the tests that take ``level`` run.
LAYERS = (
    *("test_generation.py", "test_nn_attention.py", "test_nn_block.py", "test_nn_cache.py"),
    *("test_nn_multihead_attention.py", "test_nn_transformer.py", "test_nn_transformer_parts.py"),
)


def run_at(level: str, path: Path) -> bool:
    """Whether the tests of a file run at a level of CUDA: attention alone has kernels of sm90."""
    patterns = (ATTENTION,) if level == "sm90" else (*PATTERNS, *LAYERS)
    return any(fnmatch(path.name, pattern) for pattern in patterns)


if __name__ == "__main__":
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    print(*(path for path in files if run_at(sys.argv[1], path)))
