"""The test files of all that has CUDA kernels: they run at the levels of CUDA too (conftest.py).
As a program this prints their paths."""

from fnmatch import fnmatch
from pathlib import Path

PATTERNS = ("test_attention_*.py", "test_norm*.py", "test_nn_norm.py")


def are_of_cuda(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in PATTERNS)


if __name__ == "__main__":
    print(*filter(are_of_cuda, sorted(Path(__file__).parent.glob("test_*.py"))))
