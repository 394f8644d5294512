"""From the stored results of `kernels` and `end_to_end` to docs/speed.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent
PAGE = HOME.parent / "docs" / "speed.md"
_LAYOUTS = {"contiguous": "contiguous", "channels_last": "channels-last", "rows": "rows"}
_HEAD = """# Speed

One training step of a layer on the CPU: forward, backward and the running statistics, all Python
included. `BatchNormAct` with ReLU beside PyTorch's `nn.BatchNorm` followed by an in-place ReLU, in
one process, in turns; a ratio is the median of the paired ratios of times, PyTorch's by ours, so
that more than 1 is faster than PyTorch. "floors" is the time of the compiled code alone by that of
the five passes over memory that no way of computing it can do without (2.5 copies of a tensor).
Correctness is asserted before anything is timed. This page is made from
[kernels.json](../benchmarks/results/kernels.json) and
[end_to_end.json](../benchmarks/results/end_to_end.json), which `python -m benchmarks kernels
end_to_end` writes; they hold all variants and intervals.
"""
_TAIL = """## Where the time goes

- **Tensors of some MB and more**: most of a step of PyTorch's is the system mapping fresh memory, a
  page of 4 KB at a time. Our outputs are asked for in large pages, where the system gives them on
  request, and there is one tensor less, since the activation is fused. What then remains is the way
  to memory: contiguous input is read once by each pass, statistics and output while a channel is in
  the cache; channels-last input twice, as its channels do not fit.
- **Behind a residual** five tensors are read and three written, whoever does it: PyTorch's larger
  number of passes counts for less.
- **bfloat16** halves the bytes, not the arithmetic, which here is that of float32: the kernels are
  bound by arithmetic, and floors are no measure of them.
- **Rows and small images**: with 60 × 100 values the compiled code takes 5 of 80 microseconds. The
  rest is Python and autograd.
- **7 × 7 images**: a channel of a sample is 49 values, three vectors and one value more.
"""


def write() -> None:
    PAGE.write_text(page(*(stored(name) for name in ("kernels", "end_to_end"))))


def stored(name: str) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((HOME / "results" / f"{name}.json").read_text())
    return stored


def page(kernels: dict[str, Any], whole: dict[str, Any]) -> str:
    lines = [_HEAD, f"{_where(kernels)}, {kernels['kernel_threads']} threads.", ""]
    lines += [
        "## In short",
        "",
        "Geometric means over all cases. The bar is what was asked for before anything was built;",
        "the worst case is the lower end of its 90 % interval.",
        "",
        "| | mean | bar | worst case |",
        "|---|---|---|---|",
    ]
    for name, s in kernels["summary"].items():
        lines.append(f"| {name} | {s['mean']:.2f} | {s['bar']} | {s['worst']:.2f} |")
    for dtype in ("float32", "bfloat16"):
        lines += [
            *("", f"## Cases, {dtype}", ""),
            "| shape | layout | ours, ms | PyTorch, ms | with ReLU | alone | residual and ReLU "
            "| inference | by torch.compile | by oneDNN | floors |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(r) for r in kernels["rows"] if r["dtype"] == dtype]
    lines += [
        *("", "## A network", ""),
        f"{_where(whole)}, {whole['threads_used']} threads: a step of a ResNet-20 with 64",
        "images of 32×32, converted by `gb.convert(model, fuse=True)`; the ceiling is the network",
        "without any normalization and activation.",
        "",
        "| | ms |",
        "|---|---|",
        *(f"| {name} | {ms:.1f} |" for name, ms in whole["ms"].items()),
        "",
        "| ratio | median | 90 % interval |",
        "|---|---|---|",
    ]
    for name, (middle, low, high) in whole["ratios"].items():
        lines.append(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines) + "\n\n" + _TAIL


def _where(result: dict[str, Any]) -> str:
    versions = result["versions"]
    return f"Measured on {result['device']}, torch {versions['torch']}"


def _row(r: dict[str, Any]) -> str:
    def ratio(other: str, own: str = "ours") -> str:
        found = r["ratios"].get(f"{other}/{own}")
        return "" if found is None else f"{found[0]:.2f}"

    def beside(kind: str) -> str:
        return ratio(f"eager, {kind}", f"ours, {kind}")

    low, high = r["ratios"]["eager/ours"][1:]
    cells = [
        "×".join(map(str, r["shape"])),
        _LAYOUTS[r["layout"]],
        f"{r['ms']['ours']:.3g}",
        f"{r['ms']['eager']:.3g}",
        f"**{ratio('eager')}** ({low:.2f}–{high:.2f})",
        *(beside(kind) for kind in ("no activation", "residual", "inference")),
        *(ratio(other) for other in ("compile", "onednn")),
        f"{r['kernel/floor']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"
