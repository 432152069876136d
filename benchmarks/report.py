"""Turns the records in benchmarks/results into tables and plots: python benchmarks/report.py [--check]

The newest record of each (op, case, machine) goes into benchmarks/results/README.md, a readable choice of them into the part of
README.md between `<!-- results -->` and `<!-- /results -->`, and both are drawn into benchmarks/plots/*.svg (needs matplotlib).
--check writes nothing and exits with code 1 if a table is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

# the script runs from a checkout
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.drawing import draw, plot_names
from benchmarks.records import TITLES, Record, ReportError, case_text, goal_rows, number, other_routing_rows, read_records, share

ROOT = Path(__file__).resolve().parents[1]
# What a rank does for its T tokens; in README.md one table of them all.
BY_TOKENS = ("dispatch", "gemm2_push", "combine", "combine_push", "layer")
START, END = "<!-- results -->", "<!-- /results -->"


def peers_text(record: Record) -> str:
    """Other libraries' times, and over this project's."""
    peers = record.get("peers", {record["peer"]: record["peer_us"]} if "peer" in record else {})
    return "; ".join(f"{name}: {number(us)} us, {us / record['us']:.2f}x" for name, us in peers.items())


def table(records: list[Record], spread: bool = True) -> list[str]:
    """A Markdown table of one op's records, without the columns that none of them fills. spread: with percentiles."""
    columns: dict[str, list[str]] = {"machine": [], "case": [], "us": [], "p20 to p80": [], "of the ceiling": [], "GB/s": []}
    columns |= {"TFLOP/s": [], "fresh us": [], "peer": [], "measured": []}
    for record in records:
        part = share(record)
        columns["machine"].append(record["machine"])
        columns["case"].append(case_text(record["case"]))
        columns["us"].append(number(record["us"]))
        columns["p20 to p80"].append(f"{number(record.get('us_p20'))} to {number(record.get('us_p80'))}" if spread else "")
        columns["of the ceiling"].append("" if part is None else f"{part:.0%}")
        columns["GB/s"].append(number(record.get("gbps")))
        columns["TFLOP/s"].append(number(record.get("tflops")))
        columns["fresh us"].append(number(record.get("fresh_us")))
        columns["peer"].append(peers_text(record))
        columns["measured"].append(f"{record['date'][:10]}, {record.get('commit', '')}".rstrip(", "))
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    head = ["| " + " | ".join(filled) + " |", "|" + "|".join(" --- " for _ in filled) + "|"]
    return head + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in zip(*filled.values(), strict=True)]


def tables(records: list[Record], level: str, spread: bool = True) -> str:
    """Markdown: a heading and a table for each op. level: the headings' hashes. spread: as for `table`."""
    by_op: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_op[record["op"]].append(record)
    parts = [f"{level} {TITLES.get(op, op)}\n\n" + "\n".join(table(rows, spread)) for op, rows in by_op.items()]
    return "\n\n".join(parts)


def table_by_tokens(records: list[Record]) -> list[str]:
    """A Markdown table of what depends on T, the tokens of a rank: a row for each operation and case, a column for each T."""
    rows: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
    for record in records:
        case = {key: value for key, value in record["case"].items() if key not in ("T", "capacity")}
        rows[TITLES[record["op"]], f"{record['machine']}: {case_text(case)}"][record["case"]["T"]] = record
    sizes = sorted({tokens for cells in rows.values() for tokens in cells})

    def cell(record: Record | None) -> str:
        part = share(record) if record else None
        return "" if record is None else number(record["us"]) + ("" if part is None else f" ({part:.0%})")

    head = ["| us (of the ceiling) | case | " + " | ".join(f"T={size}" for size in sizes) + " |", "| --- " * (2 + len(sizes)) + "|"]
    return head + [
        f"| {title} | {case} | " + " | ".join(cell(cells.get(size)) for size in sizes) + " |"
        for (title, case), cells in rows.items()
    ]


def readme_section(records: list[Record], plots: Iterable[str]) -> str:
    """What stands between the marks of README.md."""
    if not records:
        return "No results are recorded yet."
    intro = (
        'Written by `benchmarks/report.py` from `benchmarks/results/*.jsonl`. us are medians; "of the ceiling" is the time that the '
        "bytes or operations take at the ceiling measured in the same run, over the time measured; a peer's factor is its time over "
        'this project\'s; "fresh us" is of single calls from idle, where it was timed. All records: '
        "[benchmarks/results](benchmarks/results/README.md)."
    )
    images = "\n".join(f"![{name.replace('_', ' ')}](benchmarks/plots/{name}.svg)" for name in plots)
    shown = goal_rows(records)
    kernels, layers = ([record for record in shown if (record["op"] in BY_TOKENS) == wanted] for wanted in (False, True))
    parts = [intro, images, tables(kernels, "###", spread=False)]
    if layers:
        parts.append("### Layers and their exchange\n\n" + "\n".join(table_by_tokens(layers)))
    other = other_routing_rows(records)
    if other:
        parts.append("### Layers with recorded and with skewed routing\n\n" + "\n".join(table(other, spread=False)))
    return "\n\n".join(part for part in parts if part)


def replace_section(text: str, section: str, name: str) -> str:
    """text with the part between the marks replaced."""
    before, mark, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ReportError(f"{name} needs the marks {START} and {END}, in this order; add them where the results belong")
    return f"{before}{START}\n{section}\n{END}{after}"


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
