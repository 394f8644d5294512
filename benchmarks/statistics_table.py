"""Where running statistics go wrong: ``torch.nn`` and gammabeta, measured in the same situation.

Each row is a function of ``ROWS`` that returns what happened to PyTorch's layer and to ours; the
tests call the same functions and hold the figures to laws. ``python -m benchmarks
statistics_table`` prints the table of docs/statistics.md.
"""

import copy
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import gammabeta as gb

Figures = dict[str, float | str]
SIZES = (5, 0, 11)  # samples on each of the ranks of `synchronized`


class Row(NamedTuple):
    """One situation: what was measured with each layer, by the name of the figure."""

    situation: str
    torch: Figures
    gammabeta: Figures
    by: str  # what ours takes: a call, an argument, or nothing


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layouts(x: Tensor) -> dict[str, Tensor]:
    return {"NCHW": x, "NHWC": x.contiguous(memory_format=torch.channels_last)}


def outcome(action: Callable[[], Any]) -> str:
    """The type of the error that ``action`` ends with, or "works"."""
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return "works"


def large_mean() -> Row:
    x = (normal(32, 64, 14, 14) + 1e5).float()
    x64 = x.double()
    centered = x64 - x64.mean((0, 2, 3), keepdim=True)
    exact = centered / (centered.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    found: list[Figures] = []
    for layer in (nn.BatchNorm2d(64), gb.BatchNorm2d(64, backend="reference")):
        errors = {name: layer(v).double() - exact for name, v in layouts(x).items()}
        found.append({f"error {name}": e.abs().max().item() for name, e in errors.items()})
    return Row("mean 1e5, standard deviation 1, float32", *found, '`backend="reference"`')


def constant_channel() -> Row:
    found: list[Figures] = []
    for layer in (nn.BatchNorm2d(4), gb.BatchNorm2d(4, backend="reference")):
        worst: Figures = {}
        for name in ("NCHW", "NHWC"):
            inputs = [torch.full((32, 4, 14, 14), value) for value in (100.1, 1e6)]
            outputs = [layer(layouts(x)[name]).abs().max().item() for x in inputs]
            worst[name] = max(outputs)
        found.append(worst)
    situation = "constant channel of value 100.1 or 1e6, β = 0: largest output"
    return Row(situation, *found, '`backend="reference"`')


def nan_batch() -> Row:
    found: list[Figures] = []
    for layer in (nn.BatchNorm1d(4), gb.BatchNorm1d(4)):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", gb.StatisticsWarning)
            for seed in range(201):
                x = normal(64, 4, seed=seed).float() + 1
                layer(x if seed else torch.full_like(x, torch.nan))
        mean = layer.running_mean.mean().item()
        found.append({"running mean": mean if mean == mean else "NaN"})
    return Row("one batch with a NaN, then 200 of mean 1", *found, "nothing")


def low_precision() -> Row:
    x = torch.tensor([0.0, 2.0]).repeat(32).unsqueeze(1).bfloat16()
    found: list[Figures] = []
    for layer in (nn.BatchNorm1d(1, momentum=0.003), gb.BatchNorm1d(1, momentum=0.003)):
        layer.bfloat16()
        with torch.no_grad():
            for _ in range(2500):
                layer(x)
        found.append({"running mean": layer.running_mean.item()})
    return Row("`.bfloat16()`, momentum 0.003, 2,500 batches of mean 1", *found, "nothing")


def checkpointing() -> Row:
    found: list[Figures] = []
    for cls in (nn.BatchNorm1d, gb.BatchNorm1d):
        counts: Figures = {}
        for name, reentrant in (("non-reentrant", False), ("reentrant", True)):
            layer, x = cls(4), normal(8, 4).float().requires_grad_()
            checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
            counts[f"updates {name}"] = layer.num_batches_tracked.item()
        found.append(counts)
    return Row("one step with activation checkpointing", *found, "nothing")


def accumulation() -> Row:
    x = normal(32, 4).sort(0).values.float()
    whole = nn.BatchNorm1d(4)
    whole(x)
    found: list[Figures] = []
    for layer in (nn.BatchNorm1d(4), gb.BatchNorm1d(4)):
        if isinstance(layer, gb.BatchNorm1d):
            with gb.accumulate(layer):
                for part in x.split(8):
                    layer(part)
        else:
            for part in x.split(8):
                layer(part)
        off = (layer.running_var / whole.running_var - 1).abs().max().item()
        found.append({"updates": layer.num_batches_tracked.item(), "error of the variance": off})
    return Row("gradients accumulated over 4 parts of a batch", *found, "`gb.accumulate`")


def probing() -> Row:
    x = normal(32, 4).float() + 10
    found: list[Figures] = []
    for layer in (nn.BatchNorm1d(4), gb.BatchNorm1d(4)):
        if isinstance(layer, gb.BatchNorm1d):
            with gb.no_update(layer):
                layer(x)
        else:
            layer(x)
        found.append({"change of the running mean": layer.running_mean.mean().item()})
    return Row("a dummy or probing forward pass, mean 10", *found, "`gb.no_update`")


def synchronized() -> Row:
    """Real processes over gloo, one for each of ``SIZES``, beside one process with all samples."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=rank, args=(i, folder)) for i in range(len(SIZES))]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        parts = [torch.load(Path(folder) / f"{i}.pt") for i in range(len(SIZES))]
    together = {
        name: torch.cat([p[name] for p in parts]) if name in ("y", "dx") else parts[-1][name]
        for name in parts[0]
        if name != "torch"
    }
    layer = gb.BatchNorm1d(3).double()
    x = normal(sum(SIZES), 3).requires_grad_()
    y = layer(x)
    y.pow(3).sum().backward()
    alone = {"y": y.detach(), "dx": x.grad, **dict(layer.named_buffers())}
    worst = max((together[name] - value).abs().max().item() for name, value in alone.items())
    situation = f"synchronized statistics on the CPU, {', '.join(map(str, SIZES))} samples"
    ours: Figures = {"outcome": "works", "error against one process": worst}
    return Row(situation, {"outcome": parts[0]["torch"]}, ours, "`gb.sync_statistics`")


def rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=index, world_size=len(SIZES)
    )
    layer = gb.BatchNorm1d(3).double()
    gb.sync_statistics(layer)
    start = sum(SIZES[:index])
    x = normal(sum(SIZES), 3)[start : start + SIZES[index]].requires_grad_()
    y = layer(x)
    y.pow(3).sum().backward()
    found: dict[str, Any] = {"y": y.detach(), "dx": x.grad, **dict(layer.named_buffers())}
    found["torch"] = outcome(lambda: nn.SyncBatchNorm(3)(torch.randn(4, 3)))
    torch.save(found, Path(folder) / f"{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def freezing() -> Row:
    x = normal(32, 4).float() + 10
    found: list[Figures] = []
    for layer in (nn.BatchNorm1d(4), gb.BatchNorm1d(4)):
        model = nn.Sequential(layer)
        layer.eval()
        if isinstance(layer, gb.BatchNorm1d):
            gb.freeze(model)
        model.train()
        model(x)
        found.append({"change of the running mean": layer.running_mean.mean().item()})
    return Row("frozen, then `model.train()` and a batch of mean 10", *found, "`gb.freeze`")


def re_estimation() -> Row:
    x = normal(64, 1).sort(0).values
    x = ((x - x.mean(0)) / x.std(0) * 5).float()
    batches = list(x.split(4))
    theirs, ours = nn.BatchNorm1d(1), gb.BatchNorm1d(1)
    update_bn(batches, theirs)
    gb.calibrate(ours, batches)
    name = "running variance"
    return Row(
        "re-estimated on sorted data of variance 25, batches of 4",
        {f"{name} (`update_bn`)": theirs.running_var.item()},
        {name: ours.running_var.item()},
        "`gb.calibrate`",
    )


def padding() -> Row:
    x = normal(8, 4, 20).float() + 5
    valid = torch.arange(20) < torch.arange(4, 20, 2)[:, None]
    x = torch.where(valid[:, None], x, 0.0)
    theirs, ours = nn.BatchNorm1d(4, momentum=1.0), gb.BatchNorm1d(4, momentum=1.0)
    theirs(x)
    ours(x, mask=valid)
    found: list[Figures] = [
        {"mean": layer.running_mean.mean().item(), "variance": layer.running_var.mean().item()}
        for layer in (theirs, ours)
    ]
    return Row("sequences of mean 5 and variance 1, padded with zeros", *found, "`mask=`")


def vectorized() -> Row:
    x = normal(3, 8, 4)
    theirs, ours = nn.BatchNorm1d(4).double(), gb.BatchNorm1d(4).double()
    _, buffers = torch.func.vmap(lambda part: gb.functional_call(ours, {}, part))(x)
    worst = 0.0
    for i, part in enumerate(x):
        twin = copy.deepcopy(theirs)
        twin(part)
        for name, value in twin.named_buffers():
            worst = max(worst, (buffers[name][i] - value).abs().max().item())
    return Row(
        "`torch.func.vmap` in training, buffers not stacked",
        {"outcome": outcome(lambda: torch.func.vmap(theirs)(x))},
        {"outcome": "works", "error of the new buffers": worst},
        "`gb.functional_call`",
    )


def overwritten() -> Row:
    found: list[Figures] = []
    for layer in (nn.BatchNorm1d(4), gb.BatchNorm1d(4)):
        outcomes: Figures = {}
        for mode in ("training", "eval"):
            loss = layer.train(mode == "training")(normal(8, 4).float().requires_grad_()).sum()
            with torch.no_grad():
                for buffer in layer.buffers():
                    buffer.add_(1)  # as DistributedDataParallel does before a forward pass
            outcomes[mode] = outcome(loss.backward)
        found.append(outcomes)
    return Row("buffers overwritten between forward and backward", *found, "nothing")


def stacked() -> Row:
    """A signal that keeps its scale through 20 layers in training loses some in eval mode."""
    x = normal(64, 256, seed=1).float()
    found: list[Figures] = []
    for cls, options in ((nn.BatchNorm1d, {}), (gb.BatchNorm1d, {"stored_variance": "biased"})):
        model = nn.Sequential(*(cls(256, momentum=1.0, **options) for _ in range(20)))
        with torch.no_grad():
            training = model(x).std()
            ratio = model.eval()(x).std() / training
        found.append({"eval by training scale": ratio.item()})
    return Row("20 layers, batches of 64", *found, '`stored_variance="biased"`')


ROWS: tuple[Callable[[], Row], ...] = (
    large_mean,
    constant_channel,
    nan_batch,
    low_precision,
    checkpointing,
    accumulation,
    probing,
    synchronized,
    freezing,
    re_estimation,
    padding,
    vectorized,
    overwritten,
    stacked,
)


def measure() -> dict[str, Any]:
    return {
        "what": "where running statistics go wrong: PyTorch's layers and ours, measured",
        "rows": [{"id": row.__name__, **row()._asdict()} for row in ROWS],
    }


def show(result: dict[str, Any]) -> str:
    lines = ["| situation | PyTorch | gammabeta | by |", "|---|---|---|---|"]
    for row in result["rows"]:
        cells = [row["situation"], cell(row["torch"]), cell(row["gammabeta"]), row["by"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(figures: Figures) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value:.3g}'}".removeprefix("outcome ")
        for name, value in figures.items()
    )
