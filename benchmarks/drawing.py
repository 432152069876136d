"""The plots of benchmarks/report.py. Each function gets pyplot and the records, and returns a figure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.records import Record, case_text, goal_rows, is_gemm, readme_rows, share

# What a layer consists of, by the op or the step that it is recorded as; SwiGLU stands in GEMM 1 where that takes it in.
PARTS = {
    "dispatch": "dispatch",
    "gemm1": "GEMM 1",
    "silu_mul_quantize": "SwiGLU + quantize",
    "gemm1_fused": "GEMM 1 with SwiGLU + quantize",
    "gemm2": "GEMM 2",
    "gemm2_push": "GEMM 2, storing its rows at the tokens' ranks",
    "combine": "combine",
    "combine_push": "combine of those rows",
}
# Steps that stand in the place of others, where they were recorded.
INSTEAD = {"gemm1_fused": ("gemm1", "silu_mul_quantize"), "gemm2_push": ("gemm2", "combine")}
# What a layer's case has besides the way in which it runs.
NOT_WAYS = ("T", "H", "I", "K", "E", "W", "capacity", "routing", "reduce")
GEMM_KEYS = ("step", "N", "K_dim", "rows")


def draw_overview(plt: Any, records: list[Record]) -> Any:
    """The whole layers of README.md's table: time against tokens, a line each; the lowest floor dashed."""
    figure, axes = plt.subplots(figsize=(8, 4))
    floors: dict[int, float] = {}
    for title, points in layers_of_readme(records).items():
        tokens = sorted(points)
        axes.plot(tokens, [points[T]["us"] for T in tokens], "o-", markersize=4, label=title.replace("`", ""))
        for T in tokens:
            if points[T].get("floor_us"):
                floors[T] = min(points[T]["floor_us"], floors.get(T, math.inf))
    axes.plot(sorted(floors), [floors[T] for T in sorted(floors)], "--", color="black", linewidth=1, label="lowest floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("tokens of a rank")
    axes.set_ylabel("us")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return figure


def layers_of_readme(records: list[Record]) -> dict[str, dict[int, Record]]:
    """The rows of README.md's table that are whole layers."""
    return {title: points for title, points in readme_rows(records).items() if all(p["op"] == "layer" for p in points.values())}


def draw_shares(plt: Any, records: list[Record]) -> Any:
    """One line an op, one dot a record of docs/results.md."""
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


def layers_by_shape(records: list[Record]) -> dict[str, list[Record]]:
    """Whole layers with uniform routing, by the model's shape, of those shapes that were timed with several numbers of tokens."""
    shapes: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        case = record["case"]
        if record["op"] == "layer" and "T" in case and case.get("routing", "uniform") == "uniform":
            shapes[case_text({key: case.get(key) for key in ("H", "I", "K")})].append(record)
    return {shape: rows for shape, rows in shapes.items() if len({record["case"]["T"] for record in rows}) > 1}


def draw_layer_times(plt: Any, records: list[Record]) -> Any:
    """Time against tokens of a rank: a panel for each shape, a line for each way to run it, its floor dashed."""
    shapes = layers_by_shape(records)
    columns = min(2, len(shapes))
    rows = -(-len(shapes) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.6 * rows + 0.8), squeeze=False)
    for panel in panels.flat[len(shapes) :]:
        panel.set_visible(False)
    colors: dict[str, str] = {}
    for panel, (shape, layers) in zip(panels.flat, shapes.items(), strict=False):
        ways: dict[str, list[Record]] = defaultdict(list)
        for record in layers:
            # what the panel says, and what goes with the number of tokens or of ranks, makes no way of its own
            case = {key: value for key, value in record["case"].items() if key not in NOT_WAYS}
            reduce = record["case"].get("reduce", "exact")
            ways[f"{record['machine']}: {case_text(case | {'reduce': None if reduce == 'exact' else reduce})}"].append(record)
        for way, points in ways.items():
            points.sort(key=lambda record: record["case"]["T"])
            color = colors.setdefault(way, f"C{len(colors) % 10}")
            tokens = [record["case"]["T"] for record in points]
            panel.plot(tokens, [record["us"] for record in points], "o-", color=color, markersize=4)
            floors = [(T, record["floor_us"]) for T, record in zip(tokens, points, strict=True) if record.get("floor_us")]
            if floors:
                panel.plot(*zip(*floors, strict=True), "--", color=color, linewidth=1)
        panel.set_title(shape, fontsize="medium")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:.0f}")
        panel.set_xlabel("tokens of a rank (dashed: the floor)")
        panel.set_ylabel("us")
        panel.grid(alpha=0.3, which="both")
    handles = [plt.Line2D([], [], color=color, marker="o", markersize=4) for color in colors.values()]
    figure.legend(handles, list(colors), loc="outside upper center", fontsize="small")
    return figure


def layer_parts(records: list[Record]) -> dict[str, tuple[Record, dict[str, float]]]:
    """Of the layers that docs/results.md shows, by machine and case: the layer's record, and the us of its steps if all were recorded."""
    steps: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records:
        name = record["case"].get("step", record["op"])
        if name in PARTS:
            case = {key: value for key, value in record["case"].items() if key not in GEMM_KEYS}
            steps[f"{record['machine']}: {case_text(case)}"][name] = record["us"]
    found = {}
    for record in goal_rows(records):
        key = f"{record['machine']}: {case_text(record['case'])}"
        parts = steps.get(key, {})
        for name, others in INSTEAD.items():
            if name in parts:
                parts = {other: us for other, us in parts.items() if other not in others}
        ends = ({"gemm2", "combine"}, {"gemm2_push", "combine_push"})
        complete = "dispatch" in parts and ("gemm1_fused" in parts or "gemm1" in parts) and any(end <= set(parts) for end in ends)
        if record["op"] == "layer" and complete:
            found[key] = record, {name: parts[name] for name in PARTS if name in parts}
    return found


def draw_layer_parts(plt: Any, records: list[Record]) -> Any:
    """A bar for each layer: its steps' shares of their sum; beside it the times of the sum and of the layer as a whole."""
    bars = layer_parts(records)
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.45 * len(bars)))
    for height, (record, parts) in enumerate(reversed(list(bars.values()))):
        total, left = sum(parts.values()), 0.0
        for color, name in enumerate(PARTS):
            if name in parts:
                width = 100 * parts[name] / total
                axes.barh(height, width, left=left, color=f"C{color}", height=0.7)
                if width >= 7:
                    axes.text(left + width / 2, height, f"{parts[name]:.0f}", ha="center", va="center", fontsize="small")
                left += width
        axes.text(101, height, f"{total:.0f} us, layer {record['us']:.0f} us", va="center", fontsize="small")
    axes.set_yticks(range(len(bars)), [key.replace(": ", ":\n", 1) for key in reversed(bars)], fontsize="x-small")
    axes.set_xlim(0, 145)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of the steps' sum; numbers: us")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{color}") for color in range(len(PARTS))]
    figure.legend(handles, list(PARTS.values()), loc="outside upper center", ncols=3, fontsize="small")
    return figure


# By a plot's name: whether records are enough for it, and what draws it.
PLOTS: dict[str, tuple[Callable[[list[Record]], bool], Callable[[Any, list[Record]], Any]]] = {
    "overview": (lambda records: bool(layers_of_readme(records)), draw_overview),
    "share_of_ceiling": (lambda records: any(share(record) is not None for record in records), draw_shares),
    "layer_times": (lambda records: bool(layers_by_shape(records)), draw_layer_times),
    "layer_parts": (lambda records: bool(layer_parts(records)), draw_layer_parts),
    "grouped_gemm": (lambda records: any(is_gemm(record) for record in records), draw_gemms),
}


def plot_names(records: list[Record]) -> list[str]:
    """The plots that these records are enough for."""
    return [name for name, (enough, _) in PLOTS.items() if enough(records)]


def draw(records: list[Record], folder: Path) -> None:
    """Writes the plots. The same records give the same bytes with one version of matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "moequant", "svg.fonttype": "none", "figure.constrained_layout.use": True}
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    # one release of Triton beside another is for the tables
    records = [record for record in records if "-triton-" not in record["machine"]]
    for name in plot_names(records):
        figure = PLOTS[name][1](plt, records)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
