"""Reads fastattn's docstrings for the site: their literal blocks, examples and roles as Markdown.

A griffe extension, which mkdocs.yml names. It also finds what an ``__all__`` exports where a module
has the same name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from griffe import Alias, Extension, Module, Object

Address = Callable[[str], str | None]  # of what a role refers to; None: it has none

_SECTIONS = re.compile(r"(Args|Attributes|Examples|Raises|Returns|Yields):$")
_NAMES = re.compile(r"^    (?:\w+,\s+)+\w+:", re.MULTILINE)  # of parameters, over several lines
_ERRORS = re.compile(r"^( +)(TypeError: .*\.) (?=ValueError: )", re.MULTILINE)  # on one line
_CODE = re.compile(r"(`+[^`]+`+)")
_ROLE = re.compile(r":(?:class|func|meth|mod):`([^`]+)`")
_STRONG_OR_STAR = re.compile(r"(?<!\S)\*\*\S[^*]*\*\*|(?<!\\)\*")


class HouseStyle(Extension):
    def on_package(self, *, pkg: Module, **_: Any) -> None:
        if pkg.name != "fastattn":
            return
        exports = dict(_exports(pkg))
        addresses = _Addresses(pkg, exports)
        for owner in _objects(pkg):
            if owner.docstring:
                owner.docstring.value = to_markdown(owner.docstring.value, addresses.seen_by(owner))
        _uncover(pkg, exports)


def to_markdown(text: str, address: Address) -> str:
    """The docstring with fences around code, and links."""
    text = _NAMES.sub(lambda names: f"    {' '.join(names[0].split())}", text)
    lines = _ERRORS.sub(r"\1\2\n\1", text).split("\n")
    result: list[str] = []
    section, at = False, 0
    while at < len(lines):
        line = lines[at]
        indent = _indent(line)
        if line and indent == 0:
            section = bool(_SECTIONS.match(line))
        if line.lstrip().startswith(">>>"):
            end = next((n for n in range(at, len(lines)) if not lines[n].strip()), len(lines))
            result += _fenced("pycon", lines[at:end], indent)
            at = end
        elif indent >= 4 and not section and at and not lines[at - 1].strip():
            end = _end_of_block(lines, at, 0)
            result += _fenced("text", lines[at:end], 0)
            at = end
        elif line.endswith("::"):
            end = _end_of_block(lines, at + 1, indent)
            lead = [] if line.strip() == "::" else [_inline(line[:-1], address), ""]
            result += [*lead, *_fenced("text", lines[at + 1 : end], indent)]
            at = end
        else:
            result.append(_inline(line, address))
            at += 1
    return "\n".join(result)


def _inline(line: str, address: Address) -> str:
    """Roles become links, and stars are stars, but in code and around what is strong."""

    def link(role: re.Match[str]) -> str:
        shown = f"`{role[1].removeprefix('fastattn.')}`"
        target = address(role[1])
        return f"[{shown}][{target}]" if target else shown

    def escape(text: str) -> str:
        return _STRONG_OR_STAR.sub(lambda x: r"\*" if x[0] == "*" else x[0], text)

    parts = _CODE.split(_ROLE.sub(link, line))
    return "".join(x if n % 2 else escape(x) for n, x in enumerate(parts))


def _fenced(language: str, block: list[str], indent: int) -> list[str]:
    while block and not block[0].strip():
        block = block[1:]
    while block and not block[-1].strip():
        block = block[:-1]
    cut = min((_indent(x) for x in block if x.strip()), default=0)
    pad = " " * indent
    return [f"{pad}```{language}", *(f"{pad}{x[cut:]}".rstrip() for x in block), f"{pad}```", ""]


def _end_of_block(lines: list[str], at: int, indent: int) -> int:
    """The first line from at on that is not blank and no deeper than indent."""
    while at < len(lines) and (not lines[at].strip() or _indent(lines[at]) > indent):
        at += 1
    return at


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


class _Addresses:
    """Where names lead: each object to the shortest path that exports it."""

    def __init__(self, package: Module, exports: dict[str, Object]) -> None:
        self.package = package
        self.of_object: dict[str, str] = {}
        self.of_name: dict[str, str] = {}
        for address, target in exports.items():
            self.of_object.setdefault(target.path, address)
            self.of_name.setdefault(target.name, address)

    def seen_by(self, owner: Object) -> Address:
        def address(name: str) -> str | None:
            if name.startswith("fastattn."):
                return name
            head, dot, rest = name.partition(".")
            target = _resolve(self.package, f"{owner.module.path}.{head}")
            found = self.of_object.get(target.path) if target else self.of_name.get(head)
            return f"{found}{dot}{rest}" if found else None

        return address


def _exports(package: Module) -> Iterator[tuple[str, Object]]:
    """The address and the object of each name in an ``__all__``, the shortest addresses first."""
    modules = [x for x in _objects(package) if x.is_module and "._" not in x.path]
    for owner in sorted(modules, key=_rank):
        for name in map(str, owner.exports or ()):
            target = _resolve(package, owner.imports.get(name, f"{owner.path}.{name}"))
            if target is not None and not target.is_module:
                yield f"{owner.path}.{name}", target


def _rank(module: Module) -> tuple[bool, bool, int]:
    others = ("fastattn.reference", "fastattn.compat")  # they have the same names
    return not module.is_init_module, module.path.startswith(others), module.path.count(".")


def _resolve(package: Module, path: str) -> Any:
    """The object at a path, or None."""
    root, *names = path.split(".")
    target: Any = package if root == package.name else None
    for name in names:
        target = target and target.members.get(name)
        if target and target.is_alias:
            target = _resolve(package, target.target_path)
    return target


def _objects(owner: Object) -> Iterator[Any]:
    yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _uncover(package: Module, exports: dict[str, Object]) -> None:
    """Puts what is exported in place of a module of its name, whose members stay below it."""
    covered = []
    for address, target in exports.items():
        owner, _, name = address.rpartition(".")
        parent = _resolve(package, owner)
        shadow = parent.members.get(name)
        if shadow is not None and not shadow.is_alias and shadow.is_module:
            members = {n: _resolve(package, f"{shadow.path}.{n}") for n in shadow.members}
            covered.append((parent, name, target, members))
    for parent, name, target, members in covered:
        target.members = {n: member for n, member in members.items() if member is not None}
        parent.members[name] = Alias(name, target, parent=parent)
