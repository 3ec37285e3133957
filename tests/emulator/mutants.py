"""What the mutation check changes in csrc/cuda: found by rule, so that a new kernel has its mutants
from the day it is written. All are compiled together, each behind a switch (cuda/mutated.h)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What the machine does, and the host's side of a launch.
LEFT_ALONE = ("ptx.cuh", "ptx_sm90.cuh", "device.cuh")

# Statements that are left out: calls of these functions.
LEFT_OUT = {
    "barrier": r"(?:ptx::(?:sync_(?:block|warp|named)|arrive_named|mbarrier_(?!init)\w+)"
    r"|(?:shared\.)?\w*ring\.(?:wait_\w+|release)|(?:begin|end)_turns?|(?:give|wait_for)_turn"
    r"|(?:shared\.)?turns\.(?:await|pass_on)|ptx::(?:await|release)_global)",
    "wait": r"(?:ptx::(?:cp_async|bulk|wgmma)_wait(?:_read)?|wait_for|release)<[^()]*>",
    "commit": r"ptx::(?:cp_async|bulk|wgmma)_commit",
    "fence": r"ptx::(?:fence_async_proxy|wgmma_fence)",
    "register": r"ptx::(?:more|fewer)_registers<[^()]*>",
    # Whatever hides keys or shapes scores and weights.
    "mask": r"(?:\w+(?:\.|::))?(?:mask\w*|hide\w*|apply_\w+|add_(?:terms|bias|alibi)|drop"
    r"|drop_weights|scale_columns|through_softcap|keep_survivors|spread_nonfinite|rescale"
    r"|clear_nonfinite<\w+>)",
    # A block that takes several tiles begins each anew.
    "reset": r"(?:state\.reset|acc_o\.set_zero)",
}
# Calls that wait for others and tell whether one of them said so: whether the caller itself does.
VOTES = {"sync_block_or": "barrier", "sync_named_or": "barrier", "any_in_warp": "vote"}
# Expressions (group 1), and what is there instead.
REPLACED = [
    # A tile of which some keys are hidden is taken for one that needs no mask.
    (
        "mask",
        r"\bif \(((?:this->)?(?:is_interior|needs_no_mask)\((?:[^()]|\([^()]*\))*\))\)",
        "true",
    ),
    ("mask", r"\bif \((p\.(?:bias|alibi_slopes|mask)\.data != nullptr|softcap != 0)\) \{", "false"),
    ("mask", r"(p\.mask\.data != nullptr) \|\|", "false"),
    ("mask", r"\|\| (p\.bias\.data != nullptr)", "false"),
    ("mask", r"= (\w+) \? \w+ : -infinity\(", "true"),
    ("mask", r"(plan\.first_interior <= block)\b", "true"),
    ("mask", r"\b(block < (?:plan\.)?last_interior)\b", "true"),
    # What hidden keys hold is not kept from the rows that do not see them.
    ("leak", r"\bif \(((?:\w+ && )?may_leak|key_leaks|found)\)", "false"),
    # What counts for nothing is not treated as such.
    (
        "nothing",
        r"(?:= |return |\()((?:\w+ && )?(?!stride)[][\w. %]+ == (?:0|-infinity\(\))) \?",
        "false",
    ),
    ("nothing", r"\bif \((\w+ == -infinity\(\))\)", "false"),
    ("nothing", r"\bif \(((?:weight|scale) != 0)\b", "true"),
    ("maximum", r"\b(fmaxf)\(", "fminf"),
    # Every part of the keys is taken for the first one, the second of two buffers for the first.
    ("index", r"\b((?:plan\.)?s(?:plit)?) \* params\.partial_rows", "0"),
    ("index", r"\b(?:plan|ds)\[(n(?:th)? % 2)\]", "0"),
    # A phase of a barrier is taken for the one before it.
    ("index", r", (parity\(n\))\)", "parity(n) ^ 1"),
    ("index", r", (parity\(n\) \^ 1)\)", "parity(n)"),
    # What is for some rows, lanes or loads is done for all; a product adds to what was there.
    ("guard", r"\bif \((i < plan\.seq\.rows_q)\)", "true"),
    ("guard", r"\bif \((ptx::lane_id\(\) == 0)\) (?:\{|ptx::mbarrier_arrive)", "true"),
    ("guard", r"\bif \((first_row\(\) >= kKeys|!is_seen)\)", "false"),
    ("guard", r"\b(key < seq\.len_k) &&", "true"),
    ("guard", r"\bif \((lane == 0) && (?:rows\.)?count > 0\)", "true"),
    ("guard", r"&& ((?:rows\.)?count > 0)\)", "true"),
    ("guard", r"\bif \((!is_needed)\)", "false"),
    ("guard", r"\bif \((before\.has\(block\))\)", "true"),
    ("guard", r", (k > 0),", "true"),
]
# Expressions after a minus that becomes a plus.
NEGATED = [
    r"ptx::exp2\([^;]*? - (?=\w|\()",
    r"[=,(] -(?=\w+\(m, )",
    r"\b(?:x|sum|delta) -= ",
    r"\(x - (?=delta\()",
    r"\(j - (?=i\b)",
]


@dataclass(frozen=True)
class Edit:
    """What is inserted before and after code[begin:end], with # for the mutant's number."""

    kind: str
    begin: int
    end: int
    before: str
    after: str
    what: str


@dataclass(frozen=True)
class Mutant:
    number: int
    kind: str
    file: str
    line: int
    name: str  # unique, and the same while lines move

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def code_of(text: str) -> str:
    """The text without what is not run: comments, strings, directives and constants are blank."""
    blanked = (
        r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/|^#[^\n]*',
        r"\bstatic_assert\b[^;]*;|\bconstexpr [^;{}()]*=[^;]*;",
    )
    for pattern in blanked:
        text = re.sub(
            pattern,
            lambda found: re.sub(r"[^\n]", " ", found[0]),
            text,
            flags=re.DOTALL | re.MULTILINE,
        )
    return text


def closing(code: str, opening: int) -> int:
    """Where the bracket ends that opens at ``opening``."""
    depth = 0
    for at in range(opening, len(code)):
        depth += (code[at] in "([{") - (code[at] in ")]}")
        if depth == 0:
            return at + 1
    raise ValueError("a bracket that nothing closes")


def replace(kind: str, code: str, begin: int, end: int, by: str) -> Edit:
    old = re.sub(r"\((?=.*[\n{]).*", "(...)", code[begin:end], flags=re.DOTALL)
    what = f"without {old}" if by == "void()" else f"{by} for {old}"
    return Edit(kind, begin, end, f"(mutated(#) ? {by} : ", ")", what)


def statements(code: str, name: str) -> Iterator[tuple[int, int]]:
    """Where calls of a function are that are all of a statement."""
    for found in re.finditer(rf"(?<![\w.:>])(?:this->)?{name}\(", code):
        end = closing(code, found.end() - 1)
        before = code[: found.start()].rstrip()
        is_first = before[-1] in ";{})" or before.endswith("else")
        if is_first and code[end:].lstrip().startswith(";"):
            yield found.start(), end


def edits_of(code: str) -> Iterator[Edit]:
    for kind, name in LEFT_OUT.items():
        for begin, end in statements(code, name):
            yield replace(kind, code, begin, end, "void()")
            if kind == "wait":
                wait, pending, of = re.split("<|>", code[begin:end], maxsplit=2)
                yield replace(kind, code, begin, end, f"{wait}<{pending} + 1>{of}")
    for found in re.finditer(rf"\bptx::({'|'.join(VOTES)})\(", code):
        end = closing(code, found.end() - 1)
        own = code[found.end() : end - 1]
        if found[1] == "sync_named_or":  # which barrier, of how many threads
            own = own.split(",", 2)[2].strip()
        yield replace(VOTES[found[1]], code, found.start(), end, f"bool({own})")
    for kind, pattern, by in REPLACED:
        for found in re.finditer(pattern, code):
            yield replace(kind, code, *found.span(1), by)
    for pattern in NEGATED:
        for found in re.finditer(pattern, code):
            at = found.end()
            until = re.compile(r"[\w.:]+(\([\w, ]*\))?").match(code, at)
            what = f"+ for - before {until[0] if until else code[at]}"
            yield Edit("sign", at, at, "(mutated(#) ? -1 : 1) * ", "", what)


def check_all_found(path: Path, code: str, edits: list[Edit]) -> None:
    """A kernel may wait in ways that no rule knows yet."""
    begins = {edit.begin for edit in edits}
    ordering = r"\bptx::(?!cp_async_\d)\w*(?:sync|wait|commit|arrive|fence)\w*"
    for found in re.finditer(ordering, code):
        if found.start() not in begins:
            line = 1 + code.count("\n", 0, found.start())
            raise SystemExit(f"{path.name}:{line}: {found[0]}: no rule leaves it out")


def function_at(code: str, at: int) -> str:
    heads = re.finditer(r"\bFA_(?:DEVICE|KERNEL\([^)]*\))\s[^;{}()]*?(\w+)\(", code[:at])
    return max(((head.start(), head[1]) for head in heads), default=(0, ""))[1]


def switched(text: str, edits: list[tuple[int, Edit]]) -> str:
    """The text with the mutants in it; lines keep their numbers."""
    pieces: list[tuple[int, int, int, str]] = []
    for number, edit in edits:
        pieces.append((edit.begin, 1, -edit.end, edit.before.replace("#", str(number))))
        if edit.after:
            pieces.append((edit.end, 0, -edit.begin, edit.after))
    for at, *_, piece in sorted(pieces, key=lambda piece: piece[:3], reverse=True):
        text = text[:at] + piece + text[at:]
    return f"#include <mutated.h>\n#line 1\n{text}"


def make_mutants(folder: Path) -> tuple[list[Mutant], dict[str, str]]:
    """The mutants of the kernels in a folder, and the new text of each file that has some."""
    mutants: list[Mutant] = []
    texts: dict[str, str] = {}
    uses: Counter[str] = Counter()
    for path in sorted(folder.glob("*.cuh")):
        if path.name in LEFT_ALONE:
            continue
        text = path.read_text()
        code = code_of(text)
        edits = sorted(edits_of(code), key=lambda edit: (edit.begin, -edit.end))
        check_all_found(path, code, edits)
        numbered = list(enumerate(edits, len(mutants)))
        for number, edit in numbered:
            function = function_at(code, edit.begin)
            name = f"{path.stem} {function}: {' '.join(edit.what.split())}"
            uses[name] += 1
            name += f" ({uses[name]})" if uses[name] > 1 else ""
            line = 1 + code.count("\n", 0, edit.begin)
            mutants.append(Mutant(number, edit.kind, path.name, line, name))
        if numbered:
            texts[path.name] = switched(text, numbered)
    return mutants, texts
