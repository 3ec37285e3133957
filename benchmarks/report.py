"""A finished run as a table for the terminal, and as CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ceilings import Ceilings
from peers import PEERS
from timing import Row

OURS, MAIN_PEER = "fastattn", "sdpa"


@dataclass
class Report:
    """All rows of a run, the ceilings and the provenance they are read with."""

    provenance: dict
    ceilings: Ceilings
    grid: str
    rows: list[Row]
    failures: list[str]  # ids of the rows that gave a wrong result, or none

    @property
    def peers(self) -> list[str]:
        """Peers with a time in at least one row, in the order of the peer table."""
        return [p for p in PEERS if p != OURS and any(p in row.timings for row in self.rows)]

    def rate(self, row: Row, peer: str = OURS) -> tuple[float, str]:
        seconds = row.timings[peer].median
        if row.case.op == "decode":
            return row.case.bytes / seconds / 1e9, "GB/s"
        return row.case.flops / seconds / 1e12, "TFLOP/s"

    def share(self, row: Row) -> float:
        return self.ceilings.share(row.case, row.timings[OURS].median)

    def comparison(self, rows: list[Row], peer: str = MAIN_PEER) -> tuple[float, list[Row]] | None:
        """Geometric mean of the ratios to `peer`, and the rows that have one, worst first."""
        rows = [row for row in rows if row.ratio(peer) is not None]
        if not rows:
            return None
        rows.sort(key=lambda row: row.ratio(peer) or 0.0)
        mean = math.exp(sum(math.log(row.ratio(peer) or 1.0) for row in rows) / len(rows))
        return mean, rows

    def groups(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(f"{row.case.op} {row.case.dtype} {row.case.passes}", []).append(row)
        return found

    def verdict(self, rows: list[Row] | None = None, peer: str = MAIN_PEER) -> str:
        """Geometric mean, wins and losses, and the worst row by name."""
        compared = self.comparison(self.rows if rows is None else rows, peer)
        if compared is None:
            return f"no row was timed against {peer}"
        mean, ranked = compared
        worst = ranked[0]
        losses = sum((row.ratio(peer) or 0.0) < 1 for row in ranked)
        return (
            f"geometric mean {mean:.2f}x vs {peer} over {len(ranked)} rows "
            f"(faster {len(ranked) - losses}, slower {losses}); "
            f"worst: {worst.case.id} {worst.ratio(peer):.2f}x"
        )

    def last_line(self) -> str:
        failed = f"{len(self.failures)} rows FAILED; " if self.failures else ""
        if self.grid == "quick":
            return f"{failed}{len(self.rows)} rows are right (quick: the times mean nothing)"
        return failed + self.verdict()


def header(report: Report) -> str:
    """What the table is read with."""
    p = report.provenance
    packages = ", ".join(
        f"{k} {p[k]}" for k in ("fastattn", "torch", "onnxruntime", "openvino") if k in p
    )
    return (
        f"{p['cpu']}, level {p['level']}, {p['threads']} threads on CPUs {p['affinity']}\n"
        f"{packages}, Python {p['python']}, commit {p['commit']}, {p['date']}\n"
        f"measured ceilings: {report.ceilings.describe()}"
    )


NOTES = """\
shape: batch x heads[/KV heads] x length (queries>keys) x head_dim. us: median of calls that take \
turns with the peers' calls. rate: TFLOP/s, with 4 Sq Sk D operations per head, half if causal, \
padding not counted, 3.5 times with backward; in decode GB/s of K, V, query and output. %: of the \
best matrix product, or read rate, measured here. x: how many times as long as fastattn the peer \
takes; above 1 fastattn is faster. err: share of the allowed error, which is twice that of the \
eager formula in the same dtype and one rounding. MB: growth of the process at its peak, outputs \
included. Decode rows (all rows with --cold) take their inputs in turn from so many copies that \
none is still in a cache."""


# What a narrow terminal goes without, first to last; CSV and HTML have it all.
OPTIONAL = ("on", "p20-p80", f"MB {MAIN_PEER}", f"MB {OURS}", "op", "err")


def terminal(report: Report, console: Console, page: Path) -> None:
    """The table, why peers are missing, and the verdict as the last line."""
    lines: list[Text | Table] = [Text(header(report))]
    if report.grid != "quick":
        cells = [_cells(report, row) for row in report.rows]
        tables = [_table(cells, set(OPTIONAL[:n])) for n in range(len(OPTIONAL) + 1)]
        free = console.options.update(width=1000)
        fits = (t for t in tables if Measurement.get(console, free, t).maximum <= console.width)
        lines += [next(fits, tables[-1]), Text(NOTES, style="dim")]
    lines += [Text(f"- {text}", style="dim") for text in absences(report)]
    if report.grid != "quick":
        lines += [
            Text(f"{group}: {report.verdict(rows)}") for group, rows in report.groups().items()
        ]
    if report.failures:
        lines.append(Text(f"FAILED: {', '.join(report.failures)}", style="red"))
    lines += [Text(f"plots, CSV and JSON: {page}"), Text(report.last_line(), style="bold")]
    console.print(Group(*lines))


def _table(rows: list[dict[str, str | Text]], without: set[str]) -> Table:
    names = [name for name in rows[0] if name not in without]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, pad_edge=False)
    for name in names:
        words = name in ("op", "shape", "mask", "dtype", "pass", "on")
        table.add_column(name, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _cells(report: Report, row: Row) -> dict[str, str | Text]:
    case, ours, (rate, unit) = row.case, row.timings[OURS], report.rate(row)
    return {
        "op": case.op.replace("attention", "attn"),
        "shape": case.shape,
        "mask": case.mask,
        "dtype": case.dtype,
        "pass": case.passes,
        "on": f"{report.provenance['level']}*{report.provenance['threads']}",
        "us": f"{ours.median * 1e6:.0f}",
        "p20-p80": f"{ours.p20 * 1e6:.0f}-{ours.p80 * 1e6:.0f}",
        "rate": f"{rate:.3f} TF" if unit == "TFLOP/s" else f"{rate:.1f} GB",
        "%": f"{100 * report.share(row):.0f}",
        **{f"x {PEERS[peer].title}": _ratio(row.ratio(peer)) for peer in report.peers},
        "err": f"{row.error_used:.2f}",
        **{f"MB {peer}": _megabytes(row.memory.get(peer)) for peer in (OURS, MAIN_PEER)},
    }


def _ratio(ratio: float | None) -> Text:
    if ratio is None:
        return Text("-", style="dim")
    return Text(f"{ratio:.2f}", style="green" if ratio >= 1 else "red")


def _megabytes(memory: int | str | None) -> str:
    return f"{memory / 1e6:.1f}" if isinstance(memory, int) else ""


def absences(report: Report) -> list[str]:
    """Every reason why a figure is missing, with the rows that miss it."""
    found: dict[str, list[str]] = {}
    for row in report.rows:
        for peer, reason in row.reasons.items():
            found.setdefault(f"{peer}: {reason}", []).append(row.case.id)
        for peer, memory in row.memory.items():
            if isinstance(memory, str):
                found.setdefault(f"memory of {peer}: {memory}", []).append(row.case.id)
    return [f"{k} ({v[0] if len(v) == 1 else f'{len(v)} rows'})" for k, v in found.items()]


def records(report: Report) -> list[dict]:
    """One flat record per row and peer, fastattn included: what the CSV holds."""
    out = []
    for row in report.rows:
        case = row.case
        for peer in [*row.timings, *row.reasons]:
            timing, ratio, memory = row.timings.get(peer), row.ratio(peer), row.memory.get(peer)
            rate, unit = report.rate(row, peer) if timing else (None, "")
            share = report.ceilings.share(case, timing.median) if timing else None
            out.append(
                {
                    "op": case.op,
                    "shape": case.shape,
                    "mask": case.mask,
                    "dtype": case.dtype,
                    "pass": case.passes,
                    "inputs": "cold" if row.cold else "hot",
                    "threads": report.provenance["threads"],
                    "level": report.provenance["level"],
                    "peer": peer,
                    "median_us": timing and timing.median * 1e6,
                    "p20_us": timing and timing.p20 * 1e6,
                    "p80_us": timing and timing.p80 * 1e6,
                    "samples": timing and timing.rounds,
                    "rate": rate,
                    "unit": unit,
                    "share_of_peak": share,
                    "time_over_fastattn": ratio,
                    "error_over_budget": row.error_used if peer == OURS else None,
                    "peak_memory_bytes": memory if isinstance(memory, int) else None,
                    "reason": row.reasons.get(peer) or (memory if isinstance(memory, str) else ""),
                    **{k: report.provenance[k] for k in ("commit", "date", "cpu", "torch")},
                }
            )
    return out


def save(report: Report, folder: Path) -> None:
    """results.csv and results.json (the latter with ceilings, provenance and verdict)."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = records(report)
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    whole = {
        "provenance": report.provenance,
        "grid": report.grid,
        "ceilings": dataclasses.asdict(report.ceilings),
        "verdict": report.verdict(),
        "groups": {group: report.verdict(rows) for group, rows in report.groups().items()},
        "rows": flat,
    }
    (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
