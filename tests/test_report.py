"""The tables and plots that are made from benchmark records."""

from __future__ import annotations

import json

import pytest

from benchmarks import report
from benchmarks.drawing import layer_parts
from benchmarks.records import README_ROWS, README_TOKENS, is_one_of, readme_rows


def record(op="quantize", us=10.0, date="2025-01-01T00:00:00+00:00", case=None, **extra):
    case = {"E": 32, "T": 1024, "H": 7168, "rows": 32, "quant": "fp8_e4m3fn"} if case is None else case
    return {"op": op, "case": case, "us": us, "us_p20": us, "us_p80": us, "floor_us": us / 2, "date": date, "commit": "abc"} | extra


@pytest.fixture
def project(tmp_path):
    """A function that writes records into a project folder, which it returns."""

    def write(*records, machine="nvidia-h200"):
        results = tmp_path / "benchmarks" / "results"
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{machine}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        readme = tmp_path / "README.md"
        if not readme.exists():
            readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
        return tmp_path

    return write


def test_the_newest_record_of_a_case_counts(project):
    other = {"E": 32, "rows": 8}
    root = project(
        record(us=1.0, date="2025-03-01"), record(us=2.0, date="2025-02-01"), record(us=3.0, case=other), record(us=4.0, case=other)
    )
    project(record(us=5.0), machine="nvidia-h100")
    found = report.read_records(root / "benchmarks" / "results")
    assert [(r["machine"], r["us"]) for r in found] == [("nvidia-h100", 5.0), ("nvidia-h200", 1.0), ("nvidia-h200", 4.0)]


def test_the_order_of_a_cases_fields_does_not_make_another_case(project):
    case = {"E": 32, "rows": 8, "quant": "int8"}
    root = project(record(us=1.0, case=case), record(us=2.0, case=dict(reversed(case.items()))))
    assert [found["us"] for found in report.read_records(root / "benchmarks" / "results")] == [2.0]


def test_tables_are_written_between_the_marks_and_checked(project, capsys):
    pytest.importorskip("matplotlib")
    root = project(record(us=20.0, gbps=3000.0, peer="other 1.0", peer_us=30.0))
    assert report.main(["--check"], root) == 1
    assert "README.md out of date" in capsys.readouterr().err
    assert "old" in (root / "README.md").read_text()

    assert report.main([], root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith(f"before\n{report.START}\n") and text.endswith(f"{report.END}\nafter\n") and "old" not in text
    text = (root / "docs" / "results.md").read_text()
    row = "| nvidia-h200 | E=32, T=1024, H=7168, rows=32, fp8_e4m3fn | 20.0 |{} 50% | 3000 | other 1.0: 30.0 us, 1.50x |"
    assert row.format("") in text and "TFLOP/s" not in text
    assert row.format(" 20.0 to 20.0 |") in (root / "benchmarks" / "results" / "README.md").read_text()
    assert report.main(["--check"], root) == 0
    for page in (root / "docs" / "results.md", root / "benchmarks" / "results" / "README.md"):
        page.write_text(page.read_text() + "typed by hand\n")
        assert report.main(["--check"], root) == 1
        assert report.main([], root) == 0 and "typed" not in page.read_text()

    project(record(us=21.0))
    assert report.main(["--check"], root) == 1


def test_plots_are_the_same_bytes_each_time(project):
    pytest.importorskip("matplotlib")
    gemms = [record("grouped_gemm", us=float(rows), case={"E": 2, "N": 4, "K_dim": 2048, "rows": rows}) for rows in (1, 16)]
    root = project(*gemms, record("grouped_gemm", case={"E": 2, "rows": 3, "step": "gemm1"}), record("layer", case={"T": 1}))
    drawn = []
    for _ in range(2):
        assert report.main([], root) == 0
        drawn.append({path.name: path.read_bytes() for path in (root / "benchmarks" / "plots").iterdir()})
    assert set(drawn[0]) == {"share_of_ceiling.svg", "grouped_gemm.svg"}
    assert drawn[0] == drawn[1]
    assert "gemm1" not in (root / "docs" / "results.md").read_text()


def test_the_page_of_results_shows_goal_rows_only():
    layer = {"H": 7168, "I": 2048, "E": 128, "T": 128, "quant": "fp8_e4m3fn", "reduce": "exact", "routing": "uniform"}
    shown = [record("layer", case=layer), record("layer", case={**layer, "T": 4096, "capacity": 2048}), record("quantize")]
    changes: tuple[dict[str, object], ...] = ({"routing": "zipf:1"}, {"T": 37}, {"H": 2880}, {"overlap": "in waves"}, {"T": 4096})
    hidden = [record("layer", case={**layer, **change}) for change in changes]
    hidden += [record("route", case={"T": 128}), record("quantize", case={"H": 7168})]
    assert report.goal_rows(shown + hidden) == shown
    # recorded and skewed routing of that shape has a table of its own
    assert report.other_routing_rows(shown + hidden) == hidden[:1]


def test_layers_of_several_sizes_are_drawn_with_their_floors_and_their_steps(project):
    pytest.importorskip("matplotlib")
    layers = {"H": 7168, "I": 2048, "E": 128, "K": 2, "W": 4, "quant": "fp8_e4m3fn", "exchange": "padded", "reduce": "exact"}
    layers |= {"routing": "uniform"}
    records = [record("layer", us=100.0 * tokens, case={"T": tokens, **layers}) for tokens in (8, 128)]
    for tokens, fused in ((8, False), (128, True)):
        case = {"T": tokens, **layers}
        records += [record("dispatch", us=11.0, case=case, fresh_us=15.0), record("combine", us=12.0, case=case)]
        for step in ("gemm1", "gemm2"):
            records.append(record("grouped_gemm", us=40.0, case=case | {"step": step, "N": 1, "K_dim": 2, "rows": 3}))
        records.append(record("gemm1_fused" if fused else "silu_mul_quantize", us=13.0, case=case))
        # what stands in the place of others, where it was recorded
        records += [record(name, us=9.0, case=case) for name in ("gemm2_push", "combine_push") if fused]
    root = project(*records)
    found = layer_parts(report.read_records(root / "benchmarks" / "results"))
    assert [list(parts) for _, parts in found.values()] == [
        ["dispatch", "gemm1", "silu_mul_quantize", "gemm2", "combine"],
        ["dispatch", "gemm1_fused", "gemm2_push", "combine_push"],
    ]
    assert report.main([], root) == 0
    plots = {path.stem: path.read_text() for path in (root / "benchmarks" / "plots").iterdir()}
    assert set(plots) == {"share_of_ceiling", "layer_times", "layer_parts"}
    assert "H=7168, I=2048, K=2" in plots["layer_times"] and "layer 12800 us" in plots["layer_parts"]
    text = (root / "docs" / "results.md").read_text()
    case = "nvidia-h200: H=7168, I=2048, E=128, K=2, W=4, fp8_e4m3fn, padded, exact, uniform"
    assert f"| The whole layer | {case} | 800 (50%) | 12800 (50%) |" in text
    full = (root / "benchmarks" / "results" / "README.md").read_text()
    assert "fresh us" in full and "| 15.0 |" in full


def test_the_readme_has_a_table_of_layers_their_plot_and_the_figures_of_its_sentences(project):
    pytest.importorskip("matplotlib")
    shape = {"H": 7168, "I": 2048, "K": 8, "E": 128, "W": 4, "quant": "fp8_e4m3fn", "reduce": "exact", "routing": "uniform"}
    pushed = shape | {"transport": "symmetric", "overlap": "rows pushed"}
    records = [record("layer", us=100.0 + tokens, case={"T": tokens, **pushed}) for tokens in (1, 32, 128)]
    records += [record("layer", us=700.0, case={"T": 128, **pushed, "quant": "none"}, floor_us=None)]
    records += [record("layer", us=9.0, case={"T": 128, **pushed, **other}) for other in ({"H": 64}, {"overlap": "in waves"})]
    gemm = {"E": 32, "N": 4096, "K_dim": 7168, "quant": "fp8_e4m3fn"}
    records += [
        record("grouped_gemm", case={**gemm, "rows": r}, peer="other 1.2 of x", peer_us=us) for r, us in ((16, 9.0), (64, 12.0))
    ]
    root = project(*records, machine="nvidia-h200-x4")
    assert report.main([], root) == 0
    text = (root / "README.md").read_text()
    assert "| Whole layer | nvidia-h200-x4 | 101 (50%) |  | 228 (50%) |  |\n" in text
    assert "| Whole layer in bfloat16 | nvidia-h200-x4 |  |  | 700 |  |\n" in text
    assert text.count("\n| ") == 4
    assert "over 4 H200s takes 228 us at 128 tokens a rank, 50% of" in text
    assert "is 0.90 to 1.20 times as fast as other 1.2 in the same run, over 2 sizes" in text
    assert "](benchmarks/plots/overview.svg)" in text and (root / "benchmarks" / "plots" / "overview.svg").exists()
    assert "overview" not in (root / "docs" / "results.md").read_text()


def test_no_two_records_of_the_repository_are_one_cell_of_the_readme():
    records = report.read_records(report.ROOT / "benchmarks" / "results")
    rows = readme_rows(records)
    assert list(rows) == list(README_ROWS) and len(rows) <= 8
    shown = [record for cells in rows.values() for record in cells.values()]
    for title, (op, machine, choices) in README_ROWS.items():
        found = [r for r in records if (r["op"], r["machine"]) == (op, machine) and is_one_of(r, choices)]
        assert [r for r in found if r["case"]["T"] in README_TOKENS and r not in shown] == [], title


def test_every_peer_of_a_record_is_shown():
    peers = {"one 1.0": 30.0, "two 2.0": 15.0}
    rows = report.table([record(us=20.0, machine="m", peer="two 2.0", peer_us=15.0, peers=peers)])
    assert "| one 1.0: 30.0 us, 1.50x; two 2.0: 15.0 us, 0.75x |" in rows[-1]


def test_no_records_and_wrong_files(project, capsys):
    root = project()
    assert report.main([], root) == 0
    assert "No results are recorded yet." in (root / "README.md").read_text()

    (root / "benchmarks" / "results" / "x.jsonl").write_text('{"op": "copy"}\n')
    assert report.main([], root) == 2
    assert "x.jsonl, line 1" in capsys.readouterr().err

    (root / "README.md").write_text("no marks")
    (root / "benchmarks" / "results" / "x.jsonl").unlink()
    assert report.main([], root) == 2
    assert report.START in capsys.readouterr().err


def test_the_committed_tables_are_up_to_date():
    assert report.main(["--check"]) == 0
