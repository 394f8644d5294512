"""Every row of the table in docs/statistics.md: PyTorch's layer fails beside ours that does not.

The situations are those of benchmarks/statistics_table.py, which also measures the table.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gammabeta as gb

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "statistics.md").read_text()
STORED = json.loads((ROOT / "benchmarks" / "results" / "statistics_table.json").read_text())

spec = importlib.util.spec_from_file_location(
    "statistics_table", ROOT / "benchmarks" / "statistics_table.py"
)
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)


def test_a_large_mean_costs_no_digits_in_any_layout():
    row = table.large_mean()
    assert row.torch["error NCHW"] > 1e-3
    assert row.torch["error NHWC"] > 0.1
    assert all(error <= 2e-6 for error in row.gammabeta.values())


def test_a_constant_channel_gives_exactly_beta():
    row = table.constant_channel()
    assert all(error > 0.1 for error in row.torch.values())
    assert row.gammabeta == {"NCHW": 0.0, "NHWC": 0.0}


def test_one_batch_with_a_nan_does_not_enter_the_running_statistics():
    row = table.nan_batch()
    assert row.torch == {"running mean": "NaN"}
    assert row.gammabeta["running mean"] == pytest.approx(1, abs=0.02)


def test_a_running_mean_in_bfloat16_reaches_the_mean():
    row = table.low_precision()
    assert row.torch == {"running mean": 0.5}
    # 1 − 0.997^2500
    assert row.gammabeta["running mean"] == pytest.approx(0.99945, abs=1e-4)


def test_activation_checkpointing_counts_a_batch_once():
    row = table.checkpointing()
    assert row.torch == {"updates non-reentrant": 2, "updates reentrant": 2}
    assert row.gammabeta == {"updates non-reentrant": 1, "updates reentrant": 1}


def test_accumulated_parts_are_one_update_with_the_variance_of_the_whole():
    row = table.accumulation()
    assert row.torch["updates"] == 4
    assert row.torch["error of the variance"] > 0.1
    assert row.gammabeta["updates"] == 1
    assert row.gammabeta["error of the variance"] < 1e-6


def test_a_probing_forward_pass_leaves_no_trace():
    row = table.probing()
    assert row.torch["change of the running mean"] == pytest.approx(1, abs=0.1)
    assert row.gammabeta == {"change of the running mean": 0.0}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_statistics_are_synchronized_on_the_cpu_where_pytorch_refuses(tmp_path):
    """Uneven and empty ranks, reversal and second derivatives: tests/test_sync.py."""
    meet = (tmp_path / "meet").as_uri()
    dist.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    try:
        x = torch.randn(8, 3, dtype=torch.float64)
        layer, plain = gb.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
        gb.sync_statistics(layer)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-12, atol=0)
        with pytest.raises(ValueError, match="GPU"):
            nn.SyncBatchNorm(3).double()(x)
    finally:
        dist.destroy_process_group()


def test_a_frozen_layer_stays_frozen_in_training_mode():
    row = table.freezing()
    assert row.torch["change of the running mean"] == pytest.approx(1, abs=0.1)
    assert row.gammabeta == {"change of the running mean": 0.0}


def test_re_estimated_statistics_are_those_of_the_population():
    row = table.re_estimation()
    assert row.torch["running variance (`update_bn`)"] < 2
    assert row.gammabeta["running variance"] == pytest.approx(25, rel=1e-5)


def test_padding_does_not_enter_the_statistics():
    row = table.padding()
    assert row.torch["mean"] < 3
    assert row.torch["variance"] > 5
    assert row.gammabeta["mean"] == pytest.approx(5, abs=0.1)
    assert row.gammabeta["variance"] == pytest.approx(1, abs=0.1)


def test_vmap_in_training_returns_new_buffers_where_pytorch_refuses():
    row = table.vectorized()
    assert row.torch == {"outcome": "RuntimeError"}
    assert row.gammabeta["error of the new buffers"] < 1e-12


def test_buffers_may_be_overwritten_between_forward_and_backward():
    row = table.overwritten()
    assert row.torch == {"training": "RuntimeError", "eval": "RuntimeError"}
    assert row.gammabeta == {"training": "works", "eval": "works"}


def test_twenty_layers_keep_their_scale_in_eval_mode():
    row = table.stacked()
    assert row.torch["eval by training scale"] == pytest.approx((63 / 64) ** 10, rel=1e-4)
    assert row.gammabeta["eval by training scale"] == pytest.approx(1, rel=1e-4)


def test_every_row_is_measured_and_tested():
    assert [row["id"] for row in STORED["rows"]] == [row.__name__ for row in table.ROWS]
    source = Path(__file__).read_text()
    for row in table.ROWS:
        assert f"table.{row.__name__}()" in source or row is table.synchronized


def test_the_table_of_the_document_is_the_one_that_was_measured():
    """After ``python -m benchmarks statistics_table``, put what it prints into the document."""
    assert table.show(STORED) in DOCUMENT


@pytest.mark.parametrize(
    "tool",
    [
        "gb.accumulate(",
        "gb.no_update(",
        "gb.skipped(",
        "gb.functional_call(",
        "gb.freeze(",
        "gb.unfreeze(",
        "gb.sync_statistics(",
        "gb.calibrate(",
        "mask=",
        "stored_variance=",
        "on_single=",
    ],
)
def test_the_document_shows_every_tool_in_code_that_runs(tool):
    """That the blocks run is tests/test_documents.py."""
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.S | re.M)
    assert any(tool in block for block in blocks)
