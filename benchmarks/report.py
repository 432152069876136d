"""Turns the records in benchmarks/results into tables and plots: python benchmarks/report.py [--check]

The newest record of each (op, case, machine) goes into benchmarks/results/README.md, a readable choice of them into the part of
README.md between `<!-- results -->` and `<!-- /results -->`, and both are drawn into benchmarks/plots/*.svg (needs matplotlib).
--check writes nothing and exits with code 1 if a table is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results -->", "<!-- /results -->"
TITLES = {
    "copy": "Copy, the ceiling of memory (between ranks: of the wire)",
    "matmul": "One large product, the ceiling of the tensor cores",
    "quantize": "Quantize",
    "silu_mul_quantize": "SwiGLU + quantize",
    "grouped_gemm": "Grouped GEMM",
    "gemm1_fused": "GEMM 1 with SwiGLU and quantization",
    "gemm2_push": "GEMM 2 that sends its rows back",
    "route": "Route",
    "dispatch": "Dispatch",
    "combine": "Combine",
    "combine_pull": "Combine, by loads from the other ranks",
    "combine_push": "Combine, of rows that were sent back",
    "layer": "The whole layer",
}
CEILINGS = ("copy", "matmul")
# What README.md shows: of these ops the cases that have these values. Everything stands in the full table.
README_CASES: dict[str, dict[str, tuple[Any, ...]]] = {
    "quantize": {"H": (7168,), "rows": (32, 1024)},
    "silu_mul_quantize": {"I": (2048,), "rows": (32, 1024)},
    "grouped_gemm": {"E": (32,), "K_dim": (7168, 2048), "rows": (16, 128, 256, 1024)},
    "gemm1_fused": {"H": (7168,), "rows": (16, 128, 256, 1024)},
    "dispatch": {"H": (7168,), "T": (8, 128, 4096), "routing": ("uniform",)},
    "combine": {"H": (7168,), "T": (8, 128, 4096), "routing": ("uniform",)},
    "layer": {"H": (7168,), "T": (8, 128, 4096), "routing": ("uniform",)},
}
Record = dict[str, Any]


class ReportError(Exception):
    """A file is not as it has to be. The message names it."""


def read_records(folder: Path) -> list[Record]:
    """The newest record of each (op, case, machine), with the machine's name added, in the order of the tables."""
    newest: dict[tuple[str, str, str], Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                key = (record["op"], json.dumps(record["case"], sort_keys=True), path.stem)
                date, _ = record["date"], record["us"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ReportError(f"{path}, line {number}: not a record with op, case, us and date ({error!r})") from error
            # the later line wins where dates are equal
            if key not in newest or date >= newest[key]["date"]:
                newest[key] = {**record, "machine": path.stem}
    return sorted(newest.values(), key=order)


def order(record: Record) -> tuple[Any, ...]:
    """By op, machine, then case, numbers as numbers."""
    known = list(TITLES)
    place = known.index(record["op"]) if record["op"] in known else len(known)
    case = [
        (key, 0, value, "") if isinstance(value, (int, float)) else (key, 1, 0, str(value)) for key, value in record["case"].items()
    ]
    # T and rows vary fastest
    case.sort(key=lambda item: (item[0] in ("T", "rows"), item[0]))
    return place, record["op"], record["machine"], case


def goal_rows(records: Iterable[Record]) -> list[Record]:
    """What README.md shows."""
    return [
        record
        for record in records
        if record["op"] in README_CASES
        and all(record["case"].get(key) in values for key, values in README_CASES[record["op"]].items())
    ]


def case_text(case: dict[str, Any]) -> str:
    """A case on one line: numbers with their letters, names alone."""
    return ", ".join(str(value) if isinstance(value, str) else f"{key}={value}" for key, value in case.items() if value is not None)


def number(value: float | None) -> str:
    """Three significant digits, or all of those before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def share(record: Record) -> float | None:
    """The floor's part of the time: 1 at the ceiling."""
    return record["floor_us"] / record["us"] if record.get("floor_us") else None


def table(records: list[Record]) -> list[str]:
    """A Markdown table of one op's records, without the columns that none of them fills."""
    columns: dict[str, list[str]] = {"machine": [], "case": [], "us": [], "p20 to p80": [], "of the ceiling": [], "GB/s": []}
    columns |= {"TFLOP/s": [], "peer": [], "measured": []}
    for record in records:
        part = share(record)
        columns["machine"].append(record["machine"])
        columns["case"].append(case_text(record["case"]))
        columns["us"].append(number(record["us"]))
        columns["p20 to p80"].append(f"{number(record.get('us_p20'))} to {number(record.get('us_p80'))}")
        columns["of the ceiling"].append("" if part is None else f"{part:.0%}")
        columns["GB/s"].append(number(record.get("gbps")))
        columns["TFLOP/s"].append(number(record.get("tflops")))
        peer = (
            f"{record['peer']}: {number(record['peer_us'])} us, {record['peer_us'] / record['us']:.2f}x" if "peer" in record else ""
        )
        columns["peer"].append(peer)
        columns["measured"].append(f"{record['date'][:10]}, {record.get('commit', '')}".rstrip(", "))
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    head = ["| " + " | ".join(filled) + " |", "|" + "|".join(" --- " for _ in filled) + "|"]
    return head + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in zip(*filled.values(), strict=True)]


def tables(records: list[Record], level: str) -> str:
    """Markdown: a heading and a table for each op. level: the headings' hashes."""
    by_op: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_op[record["op"]].append(record)
    parts = [f"{level} {TITLES.get(op, op)}\n\n" + "\n".join(table(rows)) for op, rows in by_op.items()]
    return "\n\n".join(parts)


def readme_section(records: list[Record], plots: Iterable[str]) -> str:
    """What stands between the marks of README.md."""
    if not records:
        return "No results are recorded yet."
    intro = (
        'Written by `benchmarks/report.py` from `benchmarks/results/*.jsonl`. us are medians; "of the ceiling" is the time that the '
        "bytes or operations take at the ceiling measured in the same run, over the time measured; a peer's factor is its time over "
        "this project's. All records: [benchmarks/results](benchmarks/results/README.md)."
    )
    images = "\n".join(f"![{name.replace('_', ' ')}](benchmarks/plots/{name}.svg)" for name in plots)
    return "\n\n".join(part for part in (intro, images, tables(goal_rows(records), "###")) if part)


def replace_section(text: str, section: str, name: str) -> str:
    """text with the part between the marks replaced."""
    before, mark, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ReportError(f"{name} needs the marks {START} and {END}, in this order; add them where the results belong")
    return f"{before}{START}\n{section}\n{END}{after}"


def plot_names(records: list[Record]) -> list[str]:
    """The plots that these records are enough for."""
    names = []
    if any(share(record) is not None for record in records):
        names.append("share_of_ceiling")
    if any(is_gemm(record) for record in records):
        names.append("grouped_gemm")
    return names


def is_gemm(record: Record) -> bool:
    return record["op"] == "grouped_gemm" and "step" not in record["case"] and "rows" in record["case"]


def draw(records: list[Record], folder: Path) -> None:
    """Writes the plots. The same records give the same bytes with one version of matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "moequant", "svg.fonttype": "none", "figure.constrained_layout.use": True}
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"share_of_ceiling": draw_shares, "grouped_gemm": draw_gemms}
    for name in plot_names(records):
        figure = drawings[name](plt, records)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def draw_shares(plt: Any, records: list[Record]) -> Any:
    """One line an op, one dot a record of README.md's table."""
    shares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    chosen = goal_rows(records)
    for record in chosen if any(share(r) is not None for r in chosen) else records:
        part = share(record)
        if part is not None:
            shares[record["op"]][record["machine"]].append(100 * part)
    machines = sorted({machine for of_op in shares.values() for machine in of_op})
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(shares)))
    ops = list(reversed(shares))
    for color, machine in enumerate(machines):
        points = [(part, height) for height, op in enumerate(ops) for part in shares[op].get(machine, [])]
        axes.scatter(*zip(*points, strict=True), s=28, alpha=0.7, color=f"C{color}", label=machine)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_yticks(range(len(ops)), ops)
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the ceiling measured in the same run, one dot a case")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=max(1, len(machines)), fontsize="small")
    return figure


def draw_gemms(plt: Any, records: list[Record]) -> Any:
    """Time against rows, one colour for each problem; its floor dashed, its peer as crosses."""
    series: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if is_gemm(record):
            case = {key: value for key, value in record["case"].items() if key != "rows"}
            series[f"{record['machine']}: {case_text(case)}"].append(record)
    figure, axes = plt.subplots(figsize=(8, 5))
    for color, (label, points) in enumerate(series.items()):
        points.sort(key=lambda record: record["case"]["rows"])
        rows = [record["case"]["rows"] for record in points]
        axes.plot(rows, [record["us"] for record in points], "o-", color=f"C{color % 10}", markersize=4, label=label)
        floors = [(row, record["floor_us"]) for row, record in zip(rows, points, strict=True) if record.get("floor_us")]
        peers = [(row, record["peer_us"]) for row, record in zip(rows, points, strict=True) if "peer_us" in record]
        if floors:
            axes.plot(*zip(*floors, strict=True), "--", color=f"C{color % 10}", linewidth=1)
        if peers:
            axes.scatter(*zip(*peers, strict=True), marker="x", color=f"C{color % 10}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("mean rows of an expert (dashed: the floor; crosses: the peer)")
    axes.set_ylabel("us")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return figure


def build(root: Path, check: bool) -> list[Path]:
    """Writes tables and plots below root, or only looks (check). Returns the tables that were out of date."""
    results, readme = root / "benchmarks" / "results", root / "README.md"
    if not readme.exists():
        raise ReportError(f"{readme} does not exist; it needs the marks {START} and {END} where the results belong")
    records = read_records(results)
    full = "# All results\n\nThe newest record of each case, written by `benchmarks/report.py`.\n"
    if records:
        full += f"\n{tables(records, '##')}\n"
    section = readme_section(records, plot_names(records))
    wanted = {results / "README.md": full, readme: replace_section(readme.read_text(), section, str(readme))}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if not check:
        for path in stale:
            path.write_text(wanted[path])
        draw(records, root / "benchmarks" / "plots")
    return stale


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with code 1 if a table is out of date")
    check = parser.parse_args(argv).check
    try:
        stale = build(root, check)
    except ReportError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"report.py: error: plots need {error.name}; pip install {error.name}", file=sys.stderr)
        return 2
    if check and stale:
        names = ", ".join(str(path.relative_to(root)) for path in stale)
        print(f"{names} out of date; run python benchmarks/report.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
