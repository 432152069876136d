"""How the grouped GEMM is cut for a problem and a device."""

from __future__ import annotations

import pytest

from moequant.kernels.grouped_gemm import LARGE_TILES, STREAMING, Config, Limits, choose_config, fitting_stages


@pytest.mark.parametrize(
    ("experts", "rows", "column_tiles", "steps", "parts"),
    [
        pytest.param(1, 1, 17, 56, 7, id="one program for each multiprocessor"),
        pytest.param(1, 1, 56, 128, 4, id="two, as the sums are long"),
        pytest.param(1, 1, 17, 12, 3, id="at least four steps a part"),
        pytest.param(1, 128, 112, 56, 1, id="tiles enough"),
        pytest.param(8, 65, 9, 56, 1, id="tiles enough if all rows are valid"),
    ],
)
def test_programs_share_tiles_where_there_are_few(experts: int, rows: int, column_tiles: int, steps: int, parts: int) -> None:
    assert choose_config(rows, experts, rows, column_tiles, steps, 132).parts == parts


@pytest.mark.parametrize(
    ("config", "limits", "stages"),
    [
        pytest.param(STREAMING, Limits(132, 232448, True), 4, id="hopper"),
        pytest.param(LARGE_TILES, Limits(132, 232448, True), 4, id="hopper-large"),
        pytest.param(LARGE_TILES._replace(stages=9, flatten=True), Limits(132, 232448, True), 4, id="hopper-flat"),
        pytest.param(LARGE_TILES, Limits(170, 101376, True), 3, id="99-kib-with-tma"),
        pytest.param(STREAMING, Limits(108, 166912, False), 4, id="a100"),
        pytest.param(LARGE_TILES, Limits(304, 65536, False), 2, id="64-kib"),
    ],
)
def test_stages_fit_shared_memory(config: Config, limits: Limits, stages: int) -> None:
    assert fitting_stages(config, limits, out_bytes=4) == stages
