"""A finished run as tables for the terminal, and as CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cases import PEERS
from ceilings import Ceilings
from cuda_ceilings import CudaCeilings
from timing import Row

OURS = "fastattn"


@dataclass
class Report:
    """All rows of a run, the ceilings and the provenance they are read with."""

    provenance: dict
    ceilings: Ceilings | CudaCeilings
    grid: str
    rows: list[Row]
    failures: list[str]  # ids of the rows that gave a wrong result, or none
    left_out: dict[str, str] = field(default_factory=dict)  # ids of rows not run, and why

    @property
    def families(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.case.family, []).append(row)
        return found

    def ceiling(self, row: Row) -> float:
        """As it was while the row was timed, where that was measured; else the best of the run."""
        return row.ceiling or self.ceilings.limit(row.case)

    def share(self, row: Row, peer: str = OURS) -> float:
        """Fraction of the ceiling that bounds this row."""
        return row.case.work / row.timings[peer].median / self.ceiling(row)

    def summaries(self) -> dict[str, str]:
        """What holds for each group of rows, against each of its rivals that was timed."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            for group in row.case.groups:
                for rival in row.case.rivals:
                    found.setdefault((group, rival), []).append(row)
        named = {}
        for (group, rival), rows in found.items():
            name = group if rival == rows[0].case.rivals[0] else f"{group} vs {rival}"
            pairs = [pair for row in rows if (pair := compare(row, rival))]
            if pairs:
                named[name] = verdict(pairs)
        return named

    def overall(self) -> str:
        """The mean against the main rival of each row, and of all ratios the worst."""
        pairs = [
            pair for row in self.rows for name in row.case.rivals if (pair := compare(row, name))
        ]
        main = [pair for pair in pairs if pair.peer == pair.row.case.rivals[0]]
        return verdict(main, pairs)

    def last_line(self) -> str:
        failed = f"{len(self.failures)} rows FAILED; " if self.failures else ""
        if self.grid == "quick":
            return f"{failed}{len(self.rows)} rows are right (quick: the times mean nothing)"
        return failed + self.overall()


@dataclass
class Pair:
    """A row and a peer that was timed in it; `ratio` is above 1 where fastattn is faster."""

    row: Row
    peer: str
    ratio: float


def compare(row: Row, peer: str) -> Pair | None:
    ratio = row.ratio(peer)
    return None if ratio is None else Pair(row, peer, ratio)


def verdict(pairs: list[Pair], worst_of: list[Pair] | None = None) -> str:
    """Geometric mean, wins and losses, and the worst row by name."""
    if not pairs:
        return "no row was timed against a rival"
    mean = math.exp(sum(math.log(pair.ratio) for pair in pairs) / len(pairs))
    losses = sum(pair.ratio < 1 for pair in pairs)
    peers = " or ".join(dict.fromkeys(pair.peer for pair in pairs))
    worst = min(worst_of or pairs, key=lambda pair: pair.ratio)
    against = "" if worst.peer == peers else f" vs {worst.peer}"
    return (
        f"geometric mean {mean:.2f}x vs {peers} over {len(pairs)} rows "
        f"(faster {len(pairs) - losses}, slower {losses}); "
        f"worst: {worst.row.case.id} {worst.ratio:.2f}x{against}"
    )


def timed_peers(rows: list[Row]) -> list[str]:
    """Peers with a time in at least one of the rows, in the order of the peer table."""
    return [p for p in PEERS if p != OURS and any(p in row.timings for row in rows)]


def rate(row: Row, peer: str = OURS) -> tuple[float, str]:
    seconds = row.timings[peer].median
    if row.case.bound == "flops":
        return row.case.work / seconds / 1e12, "TFLOP/s"
    return row.case.work / seconds / 1e9, "GB/s"


def header(report: Report) -> str:
    """What the table is read with."""
    p = report.provenance
    packages = ", ".join(
        f"{k} {p[k]}" for k in ("fastattn", "torch", "onnxruntime", "openvino") if k in p
    )
    machine = f"{p['cpu']}, level {p['level']}, {p['threads']} threads on CPUs {p['affinity']}"
    if "device" in p:
        driver = p.get("driver_version", "unknown")
        machine = (
            f"{p['device']} ({p['level']}), driver {driver}, CUDA {p.get('cuda', 'none')}, "
            f"cuDNN {p.get('cudnn', 'none')}, {clocks(report.rows)}; "
            f"kernels {p['kernels']}; host {p['cpu']}"
        )
    return (
        f"{machine}\n"
        f"{packages}, Python {p['python']}, commit {p['commit']}, {p['date']}\n"
        f"measured ceilings: {report.ceilings.describe()}"
    )


def clocks(rows: list[Row]) -> str:
    """The lowest and the highest that the GPU's clock was seen at, beside rows."""
    seen = [mhz for row in rows for mhz in row.clocks or () if mhz]
    return f"SM clock {min(seen)} to {max(seen)} MHz" if seen else "SM clock unknown"


NOTES = """\
us: median of calls that take turns with the peers' calls; outputs are new in each call, for all \
peers, in memory that the process has kept. %: of the ceiling as it was between these calls (on a \
GPU, of that of the run). x: how many times as long as fastattn the peer takes; above 1 fastattn \
is faster. err: share of the allowed error, which is twice that of the eager formula in the same \
dtype and one rounding. MB: growth of the process, or of its memory on the GPU, at the peak, \
outputs included. With --cold, rows take their inputs in turn from so many copies that none is \
still in a cache."""

# What a narrow terminal goes without, first to last; CSV and HTML have it all. "MB peer" is the
# column of the main rival.
OPTIONAL = ("on", "p20-p80", "MB peer", f"MB {OURS}", "op", "err")


def terminal(report: Report, console: Console, page: Path) -> None:
    """A table per family, why peers are missing, and the verdict as the last line."""
    lines: list[Text | Table] = [Text(header(report))]
    if report.grid != "quick":
        for family, rows in report.families.items():
            lines += [Text(f"\n{family}", style="bold"), _fitting_table(report, rows, console)]
            lines.append(Text(rows[0].case.note, style="dim"))
        lines.append(Text(NOTES, style="dim"))
    lines += [Text(f"- {text}", style="dim") for text in absences(report)]
    if report.grid != "quick":
        lines += [Text(f"{group}: {text}") for group, text in report.summaries().items()]
    if report.failures:
        lines.append(Text(f"FAILED: {', '.join(report.failures)}", style="red"))
    lines += [Text(f"plots, CSV and JSON: {page}"), Text(report.last_line(), style="bold")]
    console.print(Group(*lines))


def _fitting_table(report: Report, rows: list[Row], console: Console) -> Table:
    """All columns that the terminal has room for."""
    cells = [_cells(report, row, timed_peers(rows)) for row in rows]
    tables = [_table(cells, set(OPTIONAL[:n])) for n in range(len(OPTIONAL) + 1)]
    free = console.options.update(width=1000)
    fits = (t for t in tables if Measurement.get(console, free, t).maximum <= console.width)
    return next(fits, tables[-1])


def _table(rows: list[dict[str, str | Text]], without: set[str]) -> Table:
    names = [name for name in rows[0] if name not in without]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, pad_edge=False)
    numbers = False  # words stand in front of them
    for name in names:
        numbers = numbers or name == "us"
        table.add_column(name, justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _cells(report: Report, row: Row, peers: list[str]) -> dict[str, str | Text]:
    case, ours, (speed, unit) = row.case, row.timings[OURS], rate(row)
    return {
        "op": case.op,
        "shape": case.shape,
        **case.details,
        "dtype": case.dtype,
        "pass": case.passes,
        "on": where(report),
        "us": f"{ours.median * 1e6:.0f}",
        "p20-p80": f"{ours.p20 * 1e6:.0f}-{ours.p80 * 1e6:.0f}",
        "rate": f"{speed:.3f} TF" if unit == "TFLOP/s" else f"{speed:.1f} GB",
        "%": f"{100 * report.share(row):.0f}",
        **{f"x {PEERS[peer].title}": _ratio(row.ratio(peer)) for peer in peers},
        "err": f"{row.error_used:.2f}",
        f"MB {OURS}": _megabytes(row.memory.get(OURS)),
        "MB peer": _megabytes(row.memory.get(case.rivals[0])),
    }


def where(report: Report) -> str:
    p = report.provenance
    return p["device"] if "device" in p else f"{p['level']}*{p['threads']}"


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
    for name, reason in report.left_out.items():
        found.setdefault(reason, []).append(name)
    return [f"{k} ({v[0] if len(v) == 1 else f'{len(v)} rows'})" for k, v in found.items()]


def records(report: Report) -> list[dict]:
    """One flat record per row and peer, fastattn included: what the CSV holds. Families have
    columns of their own (attention `mask`, rope `pairs`, ...)."""
    out = []
    for row in report.rows:
        case = row.case
        for peer in [*row.timings, *row.reasons]:
            timing, ratio, memory = row.timings.get(peer), row.ratio(peer), row.memory.get(peer)
            speed, unit = rate(row, peer) if timing else (None, "")
            share = report.share(row, peer) if timing else None
            out.append(
                {
                    "family": case.family,
                    "op": case.op,
                    "shape": case.shape,
                    **case.details,
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
                    "rate": speed,
                    "unit": unit,
                    "share_of_peak": share,
                    "peak": report.ceiling(row),
                    "time_over_fastattn": ratio,
                    "error_over_budget": row.error_used if peer == OURS else None,
                    "peak_memory_bytes": memory if isinstance(memory, int) else None,
                    "reason": row.reasons.get(peer) or (memory if isinstance(memory, str) else ""),
                    **{k: report.provenance[k] for k in ("commit", "date", "cpu", "torch")},
                    **_gpu_columns(report, row),
                }
            )
    return out


def _gpu_columns(report: Report, row: Row) -> dict:
    """What rows on a GPU have besides."""
    if "device" not in report.provenance:
        return {}
    before, after = row.clocks or (None, None)
    columns = {k: report.provenance[k] for k in ("device", "kernels")}
    return columns | {"sm_mhz_before": before, "sm_mhz_after": after}


def save(report: Report, folder: Path) -> None:
    """results.csv and results.json (the latter with ceilings, provenance and verdict)."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = records(report)
    with open(folder / "results.csv", "w", newline="") as file:
        names = dict.fromkeys(name for record in flat for name in record)
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    whole = {
        "provenance": report.provenance,
        "grid": report.grid,
        "ceilings": dataclasses.asdict(report.ceilings),
        "verdict": report.overall(),
        "groups": report.summaries(),
        "rows": flat,
    }
    (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
