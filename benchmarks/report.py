"""Turns the records in benchmarks/results into tables and plots: python benchmarks/report.py [--check]

The newest record of each (op, case, machine) goes into benchmarks/results/README.md, a choice of them into docs/results.md, at most eight
rows into the part of README.md between `<!-- results -->` and `<!-- /results -->`, and the plots into benchmarks/plots/*.svg (needs
matplotlib). --check writes nothing and exits with code 1 if a table is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

# the script runs from a checkout
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.drawing import draw, plot_names
from benchmarks.records import (
    README_TOKENS,
    TITLES,
    Record,
    ReportError,
    case_text,
    goal_rows,
    number,
    other_routing_rows,
    read_records,
    readme_rows,
    share,
)

ROOT = Path(__file__).resolve().parents[1]
# What a rank does for its T tokens; in docs/results.md one table of them all.
BY_TOKENS = ("dispatch", "gemm2_push", "combine", "combine_push", "layer")
START, END = "<!-- results -->", "<!-- /results -->"


def peers_text(record: Record) -> str:
    """Other libraries' times, and over this project's."""
    peers = record.get("peers", {record["peer"]: record["peer_us"]} if "peer" in record else {})
    taken = f", {record['peer_bytes'] / 2**30:.2f} GiB" if "peer_bytes" in record else ""
    return "; ".join(f"{name}: {number(us)} us, {us / record['us']:.2f}x{taken}" for name, us in peers.items())


def loss_text(record: Record) -> str:
    """How much larger a loss is than that of dense float32 experts, and the standard error of that; nothing for these themselves."""
    if not record.get("relative_loss_error"):
        return ""
    return f"{record['relative_loss']:+.3%} (standard error {record['relative_loss_error']:.3%})"


def table(records: list[Record], spread: bool = True) -> list[str]:
    """A Markdown table of one op's records, without the columns that none of them fills. spread: with percentiles."""
    columns: dict[str, list[str]] = {"machine": [], "case": [], "us": [], "p20 to p80": [], "of the ceiling": [], "GB/s": []}
    columns |= {"TFLOP/s": [], "fresh us": [], "GiB": [], "peer": []}
    columns |= {"held-out loss": [], "over that of dense float32": [], "measured": []}
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
        columns["GiB"].append(f"{record['bytes'] / 2**30:.2f}" if "bytes" in record else "")
        columns["peer"].append(peers_text(record))
        columns["held-out loss"].append(f"{record['loss']:.4f}" if "loss" in record else "")
        columns["over that of dense float32"].append(loss_text(record))
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


def cell(record: Record | None) -> str:
    """The time, and in parentheses the share of the ceiling; nothing for no record."""
    part = share(record) if record else None
    return "" if record is None else number(record["us"]) + ("" if part is None else f" ({part:.0%})")


def table_by_tokens(records: list[Record]) -> list[str]:
    """A Markdown table of what depends on T, the tokens of a rank: a row for each operation and case, a column for each T."""
    rows: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
    for record in records:
        case = {key: value for key, value in record["case"].items() if key not in ("T", "capacity")}
        rows[TITLES[record["op"]], f"{record['machine']}: {case_text(case)}"][record["case"]["T"]] = record
    sizes = sorted({tokens for cells in rows.values() for tokens in cells})

    head = ["| us (of the ceiling) | case | " + " | ".join(f"T={size}" for size in sizes) + " |", "| --- " * (2 + len(sizes)) + "|"]
    return head + [
        f"| {title} | {case} | " + " | ".join(cell(cells.get(size)) for size in sizes) + " |"
        for (title, case), cells in rows.items()
    ]


def readme_section(records: list[Record], plots: Iterable[str]) -> str:
    """What stands between the marks of README.md: one table, one plot, and what they come to."""
    rows = readme_rows(records)
    if not rows:
        return "No results are recorded yet."
    head = "| median us (of the ceiling) | on | " + " | ".join(f"T={tokens}" for tokens in README_TOKENS) + " |"
    lines = [head, "| --- " * (2 + len(README_TOKENS)) + "|"]
    for title, cells in rows.items():
        machine = next(iter(cells.values()))["machine"]
        lines.append(f"| {title} | {machine} | " + " | ".join(cell(cells.get(tokens)) for tokens in README_TOKENS) + " |")
    images = [f"![{name}](benchmarks/plots/{name}.svg)" for name in plots if name == "overview"]
    return "\n\n".join([*summary(records, rows), "\n".join(lines), *images])


def deep_ep_text(records: list[Record]) -> Iterator[str]:
    """A sentence for each step of several GPUs that DeepEP was timed beside."""
    for record in records:
        for name, us in record.get("peers", {}).items():
            if name.startswith("deep_ep"):
                case, kernels = record["case"], "low-latency" if "low-latency" in name else "normal"
                # the normal ones move what each rank's rows of a token add up to
                apart = (record["op"], kernels, case.get("reduce")) == ("combine", "normal", "exact")
                summed = ', which add up a rank\'s rows before they travel, as `reduce="per_rank"` does' if apart else ""
                yield (
                    f" {TITLES[record['op']]} of {case['T']} tokens a rank, {case['W']} GPUs: {number(record['us'])} us where DeepEP's "
                    f"{kernels} kernels took {number(us)}{summed}."
                )


def summary(records: list[Record], rows: dict[str, dict[int, Record]]) -> list[str]:
    """One sentence on the layer, and one on its peer of the same run, if they are recorded."""
    sentences = []
    layer = rows.get("Whole layer", {}).get(128)
    if layer:
        ranks, part = layer["case"]["W"], share(layer)
        ceiling = "" if part is None else f", {part:.0%} of what its two GEMMs allow at the measured ceiling"
        sentences.append(
            "**Why this and not DeepEP?** It needs torch and Triton alone, all of it is Python that you can read and change, and a whole "
            f"fp8 layer of DeepSeek-V3's shape over {ranks} H200s takes {number(layer['us'])} us at 128 tokens a rank{ceiling}."
            + "".join(deep_ep_text(records))
        )
    # machines of one version of Triton have the same sizes once more
    products = [
        record
        for record in goal_rows(records)
        if record["op"] == "grouped_gemm" and "peer_us" in record and "-triton-" not in record["machine"]
    ]
    if products:
        factors = [record["peer_us"] / record["us"] for record in products]
        sizes = len({case_text(record["case"]) for record in products})
        gpus = " and ".join(sorted({record["machine"].removeprefix("nvidia-").upper() for record in products}))
        peer = next(record["peer"] for record in records if record["op"] == "grouped_gemm" and "peer_us" in record)
        name = " ".join(peer.split()[:2])
        sentences.append(
            f"Its grouped fp8 GEMM is {min(factors):.2f} to {max(factors):.2f} times as fast as {name} in the same run, over "
            f"{sizes} sizes from few rows an expert to many, on {gpus}."
        )
    models = [
        record
        for record in records
        if record["op"] == "transformers_layer"
        and "peer_us" in record
        and record["case"]["quant"] == "fp8_e4m3fn"
        # launched by a graph: what the devices take
        and record["case"]["mode"] == "graph"
        and "W" not in record["case"]
    ]
    if models:
        faster = [record["peer_us"] / record["us"] for record in models]
        tokens = [record["case"]["T"] for record in models]
        names = ", ".join(sorted({record["case"]["model"] for record in models}))
        sentences.append(
            f"In models of transformers ({names}; {min(tokens)} to {max(tokens)} tokens, one GPU) the experts of a layer in fp8 are "
            f"{min(faster):.1f} to {max(faster):.1f} times as fast as the fastest of transformers' own implementations in bfloat16."
        )
    return sentences


def results_page(records: list[Record], plots: Iterable[str]) -> str:
    """docs/results.md."""
    intro = (
        "# Results\n\n"
        "Written by `benchmarks/report.py` from `benchmarks/results/*.jsonl`; nobody types a figure. All records: "
        "[benchmarks/results](../benchmarks/results/README.md). How things are timed: [benchmarks](../benchmarks/README.md)."
    )
    if not records:
        return f"{intro}\n\nNo results are recorded yet.\n"
    legend = (
        '- us are medians. "Of the ceiling" is the time that the bytes or operations take at the ceiling measured in the same run, over '
        "the time measured; of a whole layer, those of its two GEMMs. The padded exchange's ceiling is that of its own, padded bytes.\n"
        "- A peer's factor is its time over this project's, in the same run.\n"
        '- "Fresh us" is of single calls from idle, where it was timed.\n'
        "- Kernels are timed with a cold L2. Dispatch, combine and layers are timed by CUDA-graph replay; `packed` can't be captured, so "
        "it is timed call by call.\n"
        "- Rows of four GPUs have 32 experts a rank, the load of eight GPUs and 256 experts; at T=4096 with room for 2048 rows an "
        "expert.\n"
        "- The host's time is of calls in a row that the GPU keeps up with, of a layer of 32 experts.\n"
        "- Held-out losses are of models trained in the same run; `left out` is without experts. Their us are no comparison: "
        "dense experts have room for all tokens each.\n"
        "- Large GEMMs run into the cards' power cap, and times differ by a few percent from run to run."
    )
    images = "\n".join(f"![{name.replace('_', ' ')}](../benchmarks/plots/{name}.svg)" for name in plots if name != "overview")
    shown = goal_rows(records)
    kernels, layers = ([record for record in shown if (record["op"] in BY_TOKENS) == wanted] for wanted in (False, True))
    parts = [intro, legend, images, tables(kernels, "##", spread=False)]
    if layers:
        parts.append("## Layers and their exchange\n\n" + "\n".join(table_by_tokens(layers)))
    other = other_routing_rows(records)
    if other:
        parts.append("## Layers with recorded and with skewed routing\n\n" + "\n".join(table(other, spread=False)))
    return "\n\n".join(part for part in parts if part) + "\n"


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
    plots = plot_names(records)
    wanted = {
        results / "README.md": full,
        root / "docs" / "results.md": results_page(records, plots),
        readme: replace_section(readme.read_text(), readme_section(records, plots), str(readme)),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if not check:
        for path in stale:
            path.parent.mkdir(exist_ok=True)
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
