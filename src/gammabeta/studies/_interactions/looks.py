"""One look at a step of all layers, which is not made (the protocol is the experiment's)."""

import math
import statistics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row
from gammabeta.probes import interaction
from gammabeta.probes.step import Step
from gammabeta.studies._nets import MLP

LENGTHS = {"1": 0.01, "3": 0.03, "10": 0.1, "30": 0.3}  # in norms of each layer's weights
PROMISES = {"error_3": 0.03, "error_10": 0.1, "error_30": 0.3}  # in losses
PUBLISHED_RATE = 0.1
WORST = 100.0  # an error that is larger, or not finite, counts as this
_LARGEST = 1e6  # the same of an interaction

Batch = tuple[Tensor, Tensor]


def errors_at(net: MLP, batch: Batch) -> Row:
    """Errors of the first-order promise of steps against the gradient of all parameters.

    Nothing where loss or gradient is not finite, or the gradient 0.
    """
    step = Step(net, cross_entropy, batch)
    loss = step.loss.item()
    squared = sum(float(g.double().square().sum()) for g in step.gradients.values())
    if not (math.isfinite(loss) and math.isfinite(squared) and squared > 0):
        return {}
    lengths = {name: promise * loss / squared for name, promise in PROMISES.items()}
    numbers = {"loss": loss}
    for name, length in {**lengths, "error_rate": PUBLISHED_RATE}.items():
        moved = {n: p - length * step.gradients[n] for n, p in step.parameters.items()}
        promise = length * squared
        off = abs(step.run(moved).loss.item() - loss + promise) / promise
        numbers[name] = min(off, WORST) if math.isfinite(off) else WORST
    # Kept rows have a limit of size; no contrast needs more digits.
    return {name: float(f"{value:.6g}") for name, value in numbers.items()}


def equal_steps(net: MLP, batch: Batch) -> Row:
    """Every weight layer moves by the same share of its norm, gamma and beta stay."""
    step = Step(net, cross_entropy, batch)
    weights = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    row: Row = {}
    for name, share in LENGTHS.items():
        row |= _stale(step, name, weights, share)
    return row


def plain_step(net: MLP, batch: Batch, rate: float) -> Row:
    """All parameters move by a step of plain SGD."""
    plain = torch.optim.SGD(net.parameters(), lr=rate)
    return _stale(Step(net, cross_entropy, batch, optimizer=plain), "sgd", None, None)


def _stale(step: Step, name: str, layers: list[str] | None, relative: float | None) -> Row:
    """Whether all layers' step raises the loss; the interaction; the share of stale updates."""
    found = interaction.measure(step, {}, layers=layers, relative=relative, second_order=False)
    alone = {k.removesuffix("/alone"): float(v) for k, v in found.items() if k.endswith("/alone")}
    ratio = abs(float(found["relative"]))
    gone = [alone[layer] < 0 < float(found[f"{layer}/after_below"]) for layer in alone]
    return {
        # A loss that is not finite has risen.
        f"raises_{name}": not float(found["joint"]) <= 0,
        f"ratio_{name}": float(f"{min(ratio, _LARGEST):.6g}") if ratio == ratio else _LARGEST,
        f"stale_{name}": round(statistics.fmean(gone), 4),
    }
