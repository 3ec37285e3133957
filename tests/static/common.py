"""What the static checks share. Each check runs alone: python tests/static/check_<name>.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def output(*command: str | Path) -> str:
    """What a command prints; the check ends where the command fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout


def built() -> Path:
    """The newest build with the real instruction sets."""
    objects = ROOT / "build" / "objects"
    variants = [objects / name for name in ("cpu", "cuda") if (objects / name / "_C.so").exists()]
    if not variants:
        raise SystemExit("nothing is built: make build")
    return max(variants, key=lambda variant: (variant / "_C.so").stat().st_mtime)


def sources(*suffixes: str) -> Iterable[Path]:
    """The files under csrc with one of these suffixes, relative to the repository."""
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in suffixes:
            yield path.relative_to(ROOT)


def report(name: str, problems: list[str], what: str) -> None:
    """Prints the result and ends the check."""
    for problem in problems:
        print(f"{name}: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(f"{name}: FAILED, {len(problems)} found")
    print(f"{name}: ok, {what}")


def skip_without(name: str, *programs: str) -> None:
    """Ends the check, saying why, where a program is missing."""
    for program in programs:
        if shutil.which(program) is None:
            print(f"{name}: SKIPPED, no {program} on PATH")
            raise SystemExit(0)
