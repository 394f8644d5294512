"""Real processes beside one device: errors in units of what rounding may do."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.studies._data import Images
from gammabeta.studies._devices import ranks
from gammabeta.studies._devices.shards import parallel, pooled
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._train import batches, fair_split, pixels, stream

EPS = torch.finfo(torch.float64).eps
_STEPS = 5
_RATE = 0.3


def errors(seed: int, data: Images, batch: int, sizes: tuple[int, ...]) -> dict[str, float]:
    """Largest errors over K eps, K the condition number, in the first step and after five.

    synchronized: ranks with synchronized statistics against one device. local: ranks without
    against shards in one process. last: the same of what five steps leave, relative. formula: the
    variance from those of shards.
    """
    train_x, train_y, *_ = fair_split(data, seed, "test")
    flat, draw = train_x.flatten(1), batches(len(train_x), batch, stream(seed, "order"))
    index = torch.stack([next(draw) for _ in range(_STEPS)])
    images = torch.stack([pixels(flat[at], data.pixel_max).double() for at in index])
    labels = torch.stack([train_y[at] for at in index])
    width = flat.shape[1]
    job = {"pixels": width, "seed": seed, "rate": _RATE, "images": images, "labels": labels}
    found = ranks.run({**job, "sizes": list(sizes)})
    whole = ranks.native(m2(width, "relu", True, stream(seed, "weights")).double())
    steps = list(zip(images, labels, strict=True))
    condition, formula = _conditions(whole, images[0], sizes)
    alone = ranks.steps(whole, steps, _RATE)
    result = {"formula": formula}
    for size in sizes:
        split = ranks.native(parallel(width, seed, batch, size).double())
        emulated = ranks.steps(split, steps, _RATE)
        for mode, wanted in (("synchronized", alone), ("local", emulated)):
            first, last = _apart(found[size][mode], wanted)
            result[f"{mode}_{size}"] = first / (condition * EPS)
            result[f"{mode}_{size}_last"] = last
    return result


def _apart(each: list[ranks.Found], wanted: Mapping[str, Tensor]) -> tuple[float, float]:
    """Largest error of the first step and of the last, relative to the largest value."""
    first, last = 0.0, 0.0
    for name, value in wanted.items():
        ours = torch.cat([f[name] for f in each]) if name == "output" else each[0][name]
        others = [] if name == "output" else [f[name] for f in each[1:]]
        # The gradients and parameters of all ranks are equal; buffers may differ, rank 0's count.
        if "running" not in name and "tracked" not in name:
            others_off = max((_relative(other, ours) for other in others), default=0.0)
        else:
            others_off = 0.0
        off = max(_relative(ours, value), others_off)
        if name.startswith("last"):
            last = max(last, off)
        else:
            first = max(first, off)
    return first, last


def _relative(one: Tensor, other: Tensor) -> float:
    scale = float(other.abs().max())
    return float((one - other).abs().max()) / scale if scale else float((one - other).abs().max())


def _conditions(net: MLP, x: Tensor, sizes: tuple[int, ...]) -> tuple[float, float]:
    """Condition number of the normalization; the formula's error over its own times eps.

    K = 1 + max |mean| / sd: what x - mean loses. That of the formula is 1 + max mean^2 / var.
    """
    net.train()
    condition, worst = 1.0, 0.0
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, BatchNorm1d):
                mean, var = x.mean(0), x.var(0, unbiased=False)
                live = var > 1e-12 * var.max()
                ratio = mean[live].square() / var[live]
                condition = max(condition, 1 + float(ratio.max().sqrt()))
                for size in sizes:
                    off = (pooled(list(x.chunk(size))) - var)[live].abs() / var[live]
                    worst = max(worst, float((off / ((1 + ratio) * EPS)).max()))
                x = (x - mean) * (var + layer.eps).rsqrt() * layer.weight + layer.bias
            else:
                x = layer(x)
    return condition, worst
