"""Whether tests notice a barrier that is missing: the mutation check of the CUDA kernels.

    python tests/emulator/mutations.py [--list] [--only FILE...] [--sample N] [--jobs N]

Of csrc/cuda one thing at a time is changed: a barrier, a wait, a commit or a mask call is left out,
a guard, a sign or a maximum is wrong (mutants.py finds them). Tests on an emulated GPU run on each
of these mutants, in two orders of threads, until one of them fails; a mutant that none of them
notices has survived. (What only the kernels of Hopper have is tried on the GPU that is level
"sm90", all else on "sm80".)

All mutants are compiled at once, each behind a switch, into an emulated build of their own in
build/mutations. There the tests run with all switches off first: they must pass, and it shows which
of them reach which mutant. Then each mutant is judged in a process of its own.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mutants import Mutant, make_mutants
from mutation_runs import MutationRuns, Verdict

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "mutations"
PACKAGE = TREE / "build" / "emulated_cuda"
SOURCES = ("csrc", "fastattn", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")

# Per level, enough to catch what can be caught, and small.
TESTS = {
    "sm80": [
        "attention_accuracy.py::test_decode_shapes",
        "attention_accuracy.py::test_every_feature_alone",
        "attention_accuracy.py::test_large_logits",
        "attention_accuracy.py::test_masks_and_biases_of_every_broadcast_shape",
        "attention_cuda.py::test_a_bias_may_be_shared_by_sequences_of_any_lengths",
        "attention_cuda.py::test_deterministic_gradients_do_not_depend_on_the_order_of_threads",
        "attention_cuda.py::test_poison_in_a_query_reaches_no_key_that_it_does_not_see",
        "attention_dropout.py::test_the_mask_is_that_of_the_reference_to_the_bit",
        "attention_dropout.py::test_dropout_keeps_the_accuracy_contract",
        "attention_dropout.py::test_the_gradient_of_a_bias_is_that_of_the_weights_that_were_kept",
        "attention_empty_and_hidden.py",
        "attention_strides.py::test_inputs_of_any_strides",
        "attention_varlen.py::test_packed_sequences_keep_the_accuracy_contract",
        "attention_varlen.py::test_unused_rows_are_zero_whatever_they_held",
        "attention_with_cache.py::test_any_split_through_pages_of_any_size",
        "attention_with_cache.py::test_any_split_through_a_ring_past_its_window",
        "attention_with_cache.py::test_int8_is_exact_for_what_it_holds",
        "attention_with_cache.py::test_int8_is_within_its_bound",
        "attention_with_cache.py::test_the_scale_of_a_hidden_key_may_be_anything",
        "attention_with_cache.py::test_everything_composes",
        "norm.py::test_every_width",
        "norm.py::test_nan_and_infinity_stay_in_their_row",
        "norm_cuda.py::test_gradients_do_not_depend_on_which_others_are_asked_for",
        "norm_cuda.py::test_results_do_not_depend_on_the_order_of_threads",
        "norm_cuda.py::test_rows_of_all_tiles",
        "norm_ecosystem.py::test_dropout_keeps_the_accuracy_contract",
        "activation.py::test_any_strides",
        "activation_cuda.py",
        "rope.py::test_any_combination",
        "rope_cuda.py",
    ],
    "sm90": [
        "attention_accuracy.py::test_every_feature_alone",
        "attention_cuda.py::test_poison_in_a_query_reaches_no_key_that_it_does_not_see",
        "attention_dropout.py::test_dropout_keeps_the_accuracy_contract",
        "attention_empty_and_hidden.py::test_poison_in_hidden_keys_and_values_changes_nothing",
        "attention_hopper.py",
        "attention_hopper_caches.py",
    ],
}
WITHOUT = {"sm80": "torch.float16 or 4099", "sm90": "torch.float16 or torch.float32"}
OF_HOPPER = ("ring.cuh", "wgmma_tile.cuh", "dq_turns.cuh")

# Mutants that compute what the kernels compute, each with the reason.
EQUIVALENT = {
    "softmax raise_max: bool(has_grown) for ptx::any_in_warp(has_grown)": (
        "a lane's rows are those that it rescales; the vote keeps the warp together"
    ),
    **dict.fromkeys(
        (
            "flash_bwd_sm90 add_part: without wait_for<0>(acc_dk)",
            "flash_bwd_sm90 add_part: wait_for<0 + 1>(acc_dk) for wait_for<0>(acc_dk)",
        ),
        "the next part waits for these products too; the wait is there for the compiler",
    ),
    "backward_sm90 add_to_sums: true for rows.count > 0": (
        "rows that take no part have dS of 0; the guard keeps these zeros from memory of others, "
        "and of no sums at all behind the last"
    ),
    "wgmma_tile begin_multiply_transposed: without ptx::wgmma_fence()": (
        "nothing is in these registers that the emulation could see; PTX asks for the fence before "
        "a product all the same, as the part of dQ before has used them"
    ),
    "flash_bwd_roles_sm90 step: without ptx::sync_warp()": (
        "the emulation takes the arrival of a warp at the named barrier before for an order of its "
        "lanes; a GPU need not"
    ),
    "flash_bwd_roles_sm90 step: without shared.query_ring.wait_full(n) (2)": (
        "who hands the weights over has waited for the same queries"
    ),
    **{
        f"{file} {kernel}: without ptx::more_registers<Config::kConsumerRegisters>()": (
            "the emulation has registers enough: a kernel that lacks them spills, which is checked "
            "where it is compiled"
        )
        for file, kernel in (
            ("backward_sm90", "flash_bwd_sm90"),
            ("flash_fwd_sm90", "flash_fwd_sm90"),
        )
    },
}


def update(source: Path, target: Path, texts: dict[str, str]) -> None:
    """Makes target a copy of source, but for the files that ``texts`` has by name. What is the same
    is not touched, so that ninja compiles what is not."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        names = {x.name for x in source.iterdir() if x.name != "__pycache__" and x.suffix != ".so"}
        for old in target.iterdir():
            if old.name not in names:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for name in sorted(names):
            update(source / name, target / name, texts)
    elif source.name in texts:
        if not target.exists() or target.read_text() != texts[source.name]:
            target.write_text(texts[source.name])
    elif not target.exists() or not filecmp.cmp(source, target, shallow=False):
        shutil.copy2(source, target)


def build(texts: dict[str, str]) -> None:
    objects = Path("build", "objects", "emulated_cuda")
    if (ROOT / objects).exists() and not (TREE / objects).exists():
        shutil.copytree(ROOT / objects, TREE / objects)
    for name in SOURCES:
        update(ROOT / name, TREE / name, texts if name == "csrc" else {})
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(PACKAGE)]
    subprocess.run(command, cwd=TREE, env=os.environ | {"FASTATTN_CUDA": "emulate"}, check=True)


def level_of(mutant: Mutant) -> str:
    return "sm90" if mutant.file in OF_HOPPER or "_sm90" in mutant.file else "sm80"


def run(level: str, mutants: list[Mutant], count: int, jobs: int) -> list[Verdict]:
    """On the tests of a level."""
    verdicts = list[Verdict]()

    def tell(verdict: Verdict) -> None:
        verdicts.append(verdict)
        mutant, said = verdict.mutant, "caught  " if verdict.caught else "SURVIVED"
        print(f"{said} {verdict.seconds:5.1f} s  {mutant.place} {mutant.name}")
        if verdict.why:
            print(f"    {verdict.why}", flush=True)

    os.environ |= {"FASTATTN_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    (TREE / "runs").mkdir(exist_ok=True)
    runs = MutationRuns(mutants, count, TREE / "runs", jobs, tell)
    options = ["-q", "--no-header", "--capture=no", "-pno:cacheprovider", "-pno:faulthandler"]
    options += ["-k", f"not ({WITHOUT[level]})"]
    options += [f"tests/test_{test}" for test in TESTS[level]]
    if code := pytest.main(options, plugins=[runs]):
        raise SystemExit(f"pytest: {code!r}")
    return verdicts


def table(verdicts: list[Verdict], equivalent: list[Mutant]) -> list[str]:
    """How many mutants have been caught of how many, per file and kind."""
    kinds = sorted({verdict.mutant.kind for verdict in verdicts})
    rows = [["", *kinds, "all", "equivalent"]]
    for file in [*sorted({verdict.mutant.file for verdict in verdicts}), ""]:
        row = [file or "all"]
        for kind in [*kinds, ""]:
            cell = [
                verdict.caught
                for verdict in verdicts
                if file in ("", verdict.mutant.file) and kind in ("", verdict.mutant.kind)
            ]
            row.append(f"{sum(cell)}/{len(cell)}" if cell else "")
        row.append(str(sum(file in ("", mutant.file) for mutant in equivalent)))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(x.rjust(n) if i else x.ljust(n) for i, (x, n) in enumerate(zip(row, widths)))
        for row in rows
    ]


def chosen(mutants: list[Mutant], only: list[str], sample: int | None) -> list[Mutant]:
    found = [mutant for mutant in mutants if not only or mutant.file in only]
    if not found:
        raise SystemExit(f"no mutant in {', '.join(only)}")
    if sample is not None and sample < len(found):
        found = sorted(random.Random(0).sample(found, sample), key=lambda mutant: mutant.number)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The mutation check of the CUDA kernels.")
    parser.add_argument("--list", action="store_true", help="print the mutants and do no more")
    parser.add_argument(
        "--only", metavar="FILE", nargs="+", default=[], help="mutants of these files alone"
    )
    parser.add_argument("--sample", metavar="N", type=int, help="so many mutants, at random")
    parser.add_argument("--jobs", metavar="N", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()

    mutants, texts = make_mutants(ROOT / "csrc" / "cuda")
    if stale := EQUIVALENT.keys() - {mutant.name for mutant in mutants}:
        raise SystemExit(f"EQUIVALENT has what is no mutant: {', '.join(sorted(stale))}")
    judged = chosen(mutants, arguments.only, arguments.sample)
    if arguments.list:
        for mutant in judged:
            print(f"{mutant.kind:8} {mutant.place} {mutant.name}")
        return
    began = time.monotonic()
    files = {mutant.file for mutant in judged}
    build({file: text for file, text in texts.items() if file in files})
    built = time.monotonic() - began
    os.chdir(TREE)
    sys.path.insert(0, str(PACKAGE))
    equivalent = [mutant for mutant in judged if mutant.name in EQUIVALENT]
    verdicts = list[Verdict]()
    for level in TESTS:
        chosen_here = [x for x in judged if x not in equivalent and level_of(x) == level]
        if chosen_here:
            verdicts += run(level, chosen_here, len(mutants), arguments.jobs)
    print(*table(verdicts, equivalent), sep="\n")
    survivors = [verdict.mutant for verdict in verdicts if not verdict.caught]
    for mutant in survivors:
        print(f"SURVIVED  {mutant.place} {mutant.name}")
    for mutant in equivalent:
        print(f"equivalent  {mutant.place} {mutant.name}\n    {EQUIVALENT[mutant.name]}")
    caught, minutes = len(verdicts) - len(survivors), (time.monotonic() - began) / 60
    print(
        f"{caught} of {len(judged)} caught ({100 * caught / len(judged):.1f} %), {len(equivalent)} "
        f"equivalent, {len(survivors)} survived; {minutes:.0f} min, {built / 60:.0f} to build"
    )
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    main()
