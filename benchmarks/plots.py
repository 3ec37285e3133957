"""A finished run as plots (PNG) and as one HTML page that needs no other file."""

from __future__ import annotations

import html
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from cases import ALL, PEERS
from report import NOTES, OURS, Report, absences, header, rate, timed_peers
from timing import Row

PALETTE = [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors]
COLORS = dict(zip(PEERS, PALETTE))


def series(report: Report, axis: str) -> dict[str, list[Row]]:
    """Rows that differ in size only, three at least, by size."""
    found: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.case.axis == axis:
            found.setdefault(row.case.series, []).append(row)
    return {
        name: sorted(rows, key=lambda row: row.case.size)
        for name, rows in found.items()
        if len(rows) >= 3
    }


def over_size(report: Report, what: str, axis_name: str, path: Path) -> bool:
    """One panel per series: ms, MB or rate of every peer over length, or whatever the size of these
    rows is. False if there is no series."""

    def value(row: Row, peer: str) -> float | None:
        if what == "memory":
            memory = row.memory.get(peer)
            return memory / 1e6 if isinstance(memory, int) else None
        if peer not in row.timings:
            return None
        return 1e3 * row.timings[peer].median if what == "time" else rate(row, peer)[0]

    panels, units = {}, {}
    for name, rows in series(report, axis_name).items():
        lines = {
            p: [(r.case.size, v) for r in rows if (v := value(r, p)) is not None] for p in PEERS
        }
        lines = {peer: points for peer, points in lines.items() if len(points) >= 2}
        if lines:
            panels[name], units[name] = lines, rate(rows[0])[1]
    if not panels:
        return False
    columns = min(2, len(panels))
    lines_of_panels = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines_of_panels, columns, figsize=(6.5 * columns, 3.8 * lines_of_panels), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, lines) in zip(axes.flat, panels.items()):
        for peer, points in lines.items():
            style = {"linewidth": 2.5, "zorder": 3} if peer == OURS else {"linewidth": 1.2}
            axis.plot(
                *zip(*points), marker="o", markersize=4, color=COLORS[peer], label=peer, **style
            )
        axis.set_xscale("log", base=2)
        if what == "rate":
            axis.set_ylim(bottom=0)
        else:
            axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.tick_params(labelsize=8)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(axis_name)
        labels = {"time": "ms", "memory": "MB above the inputs, at the peak", "rate": units[name]}
        axis.set_ylabel(labels[what])
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize=8)
    _save(figure, path)
    return True


def ratios(report: Report, path: Path) -> bool:
    """One bar per row: how many times as long as fastattn its main rival takes."""
    rows = [row for row in report.rows if row.ratio(row.case.rivals[0]) is not None][::-1]
    if not rows:
        return False
    values = [row.ratio(row.case.rivals[0]) or 1.0 for row in rows]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.22 * len(rows)))
    colors = ["tab:green" if value >= 1 else "tab:red" for value in values]
    axis.barh(range(len(rows)), [value - 1 for value in values], left=1, color=colors)
    for i, value in enumerate(values):
        axis.annotate(
            f"{value:.2f}",
            (max(value, 1), i),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(range(len(rows)), [row.case.id for row in rows], fontsize=7)
    axis.set_ylim(-1, len(rows))
    axis.set_title(
        f"time of {' or '.join(dict.fromkeys(row.case.rivals[0] for row in rows[::-1]))} / "
        "time of fastattn (right of 1: fastattn is faster)",
        fontsize=9,
    )
    _save(figure, path)
    return True


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save(report: Report, folder: Path) -> Path:
    """Writes the PNG files and the report.html that shows them, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    plotted = {"ratios.png": ratios(report, folder / "ratios.png")}
    for axis in dict.fromkeys(case.axis for case in ALL):
        for what in ("time", "memory", "rate"):
            name = f"{what}_over_{axis}.png"
            wanted = what != "rate" or "device" in report.provenance
            plotted[name] = wanted and over_size(report, what, axis, folder / name)
    for name, drawn in plotted.items():
        if not drawn:  # a plot of an earlier run would be taken for one of this run
            (folder / name).unlink(missing_ok=True)
    page = folder / "report.html"
    page.write_text(_page(report, [folder / name for name, drawn in plotted.items() if drawn]))
    return page


STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1250px;
       padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 12px }
th, td { padding: 2px 8px; border-bottom: 1px solid #ddd }
th { text-align: left; position: sticky; top: 0; background: #fff }
td.n { text-align: right; white-space: nowrap }
.win { color: #17702b } .loss { color: #b3201e; font-weight: 600 }
.note { color: #555 } img { max-width: 100% }
"""


def _page(report: Report, images: list[Path]) -> str:
    escape = html.escape
    out = ["<!doctype html><html lang='en'><meta charset='utf-8'><title>fastattn bench</title>"]
    out += [
        f"<style>{STYLE}</style><h1>fastattn bench</h1>",
        f"<p><b>{escape(report.overall())}</b></p>",
    ]
    out += [f"<p>{escape(header(report)).replace(chr(10), '<br>')}</p>", "<ul>"]
    out += [f"<li>{escape(g)}: {escape(text)}</li>" for g, text in report.summaries().items()]
    out += ["</ul>"]
    for image in images:
        out.append(f"<p><img alt='{image.stem}' src='{image.name}'></p>")
    for family, rows in report.families.items():
        out += [f"<h2>{escape(family)}</h2>", *_table(report, rows)]
        out += [f"<p class='note'>{escape(rows[0].case.note)}</p>"]
    out += [f"<p class='note'>{escape(NOTES)}</p><ul class='note'>"]
    out += [f"<li>{escape(text)}</li>" for text in absences(report)]
    return "\n".join([*out, "</ul></html>", ""])


def _table(report: Report, rows: list[Row]) -> list[str]:
    peers = timed_peers(rows)
    names = ["op", "shape", *rows[0].case.details, "dtype", "pass", "inputs"]
    names += ["median us", "p20", "p80", "rate", "% peak"]
    names += [f"x {peer}" for peer in peers] + ["error / budget"]
    names += [f"MB {peer}" for peer in [OURS, *peers]]
    head = "<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>"
    return [head, *(_table_row(report, row, peers) for row in rows), "</table>"]


def _table_row(report: Report, row: Row, peers: list[str]) -> str:
    case, ours = row.case, row.timings[OURS]
    speed, unit = rate(row)
    words = [case.op, case.shape, *case.details.values(), case.dtype, case.passes]
    words.append("cold" if row.cold else "hot")
    numbers = [f"{1e6 * seconds:.0f}" for seconds in (ours.median, ours.p20, ours.p80)]
    numbers += [f"{speed:.3g} {unit}", f"{100 * report.share(row):.0f}"]
    cells = [f"<td>{word}</td>" for word in words] + [f"<td class='n'>{n}</td>" for n in numbers]
    for peer in peers:
        ratio = row.ratio(peer)
        if ratio is None:
            why = html.escape(row.reasons.get(peer, ""), quote=True)
            cells.append(f"<td class='n note' title='{why}'>-</td>")
        else:
            kind = "win" if ratio >= 1 else "loss"
            cells.append(f"<td class='n {kind}'>{ratio:.2f}</td>")
    cells.append(f"<td class='n'>{row.error_used:.2f}</td>")
    for peer in [OURS, *peers]:
        memory = row.memory.get(peer)
        cells.append(
            f"<td class='n'>{memory / 1e6:.1f}</td>" if isinstance(memory, int) else "<td></td>"
        )
    return "<tr>" + "".join(cells) + "</tr>"
