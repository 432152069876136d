"""How the grouped GEMM is cut for a problem and a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moequant.kernels.gemm import grouped_gemm
from moequant.kernels.gemm.grouped_gemm import (
    LARGE_TILES,
    SMALL_TILES,
    STREAMING,
    Config,
    Limits,
    choose_config,
    few_tiles,
    fitting_stages,
    grouped_gemm_blockscale,
)


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
        pytest.param(LARGE_TILES, Limits(40, 32768, True), 1, id="less than a stage"),
        pytest.param(LARGE_TILES._replace(flatten=True), Limits(40, 32768, True), 1, id="less than nothing"),
    ],
)
def test_stages_fit_shared_memory(config: Config, limits: Limits, stages: int) -> None:
    assert fitting_stages(config, limits, out_bytes=4) == stages


@pytest.mark.parametrize(
    ("experts", "rows", "column_tiles", "few"),
    [(1, 64, 132, True), (1, 64, 133, False), (2, 64, 66, True), (2, 65, 66, False), (4, 64, 33, True), (4, 64, 34, False)],
)
def test_tiles_are_few_up_to_one_for_each_multiprocessor(experts: int, rows: int, column_tiles: int, few: bool) -> None:
    assert few_tiles(experts, rows, column_tiles, 132) is few


@pytest.mark.parametrize(
    ("config", "num_sms", "programs"),
    [
        pytest.param(SMALL_TILES, None, 7 * 3, id="all multiprocessors"),
        pytest.param(SMALL_TILES, 2, 2 * 3, id="two"),
        pytest.param(LARGE_TILES, 2, 2, id="two, of one program each"),
        # 3 experts of 3 row tiles by 4 column tiles
        pytest.param(SMALL_TILES, 100, 3 * 3 * 4, id="no more than there are tiles"),
    ],
)
def test_no_more_programs_are_launched_than_the_multiprocessors_hold(
    monkeypatch: pytest.MonkeyPatch, config: Config, num_sms: int | None, programs: int
) -> None:
    grids: list[Any] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return lambda *arguments, **settings: None

    monkeypatch.setattr(grouped_gemm, "grouped_gemm_kernel", Recorder())
    monkeypatch.setattr(grouped_gemm, "device_limits", lambda device: Limits(7, 2**20, True))
    a, b = (torch.empty(3, n, 64, dtype=torch.bfloat16) for n in (130, 512))
    grouped_gemm_blockscale(a, None, b, None, None, None, torch.empty(3, 130, 512), num_sms=num_sms, config=config)
    assert grids == [(programs,)]
