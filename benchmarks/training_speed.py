"""Training steps per second of the studies' network: without BN, with ours, with torch.nn's.

The loop is the studies' own (``gammabeta.studies._train.train``), on random images of MNIST's size
at batch 64. The variants take turns, so that a slow moment of the machine meets them all. Time is
processor time of the one thread: what a core gives, whoever else is waiting for it.
"""

import statistics
import time
from typing import Any

import torch
from torch import nn

from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._train import stream, train

ROUNDS, STEPS, WARM_UP = 9, 400, 50
IMAGES, PIXELS = 5000, 784
REQUIRED = 900  # steps per second and core, with BN
VARIANTS = ("none", "gammabeta", "torch.nn")
ACTIVATIONS = ("relu", "sigmoid")


def network(variant: str, activation: str) -> MLP:
    """The network with one kind of layer; the same weights in all."""
    net = m2(PIXELS, activation, variant != "none", stream(0, "weights"))
    for index, layer in enumerate(net.layers):
        if variant == "torch.nn" and isinstance(layer, BatchNorm1d):
            net.layers[index] = nn.BatchNorm1d(layer.num_features)
    return net


def seconds(net: MLP, images: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """Processor time of so many steps."""
    order = stream(0, "order")
    started = time.process_time()
    for _ in train(
        net, images, labels, pixel_max=255, rate=0.1, steps=steps, order=order, stops=()
    ):
        raise AssertionError("no stop was asked for")
    return time.process_time() - started


def measure() -> dict[str, Any]:
    generator = stream(0, "images")
    images = torch.randint(256, (IMAGES, PIXELS), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (IMAGES,), generator=generator)
    nets = {(v, a): network(v, a) for a in ACTIVATIONS for v in VARIANTS}
    for net in nets.values():
        seconds(net, images, labels, 20)
    for a in ACTIVATIONS:
        ours, theirs = nets["gammabeta", a].state_dict(), nets["torch.nn", a].state_dict()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)

    rates: dict[tuple[str, str], list[float]] = {key: [] for key in nets}
    for _ in range(ROUNDS):
        for key, net in nets.items():
            seconds(net, images, labels, WARM_UP)
            rates[key].append(STEPS / seconds(net, images, labels, STEPS))
    return {
        "what": "training steps of 784-100-100-10 at batch 64 per second of one core",
        "rounds": ROUNDS,
        "steps_per_round": STEPS,
        "required_with_bn": REQUIRED,
        "results": [
            {
                "activation": activation,
                "batch_norm": variant,
                "median": round(statistics.median(values), 1),
                "slowest": round(min(values), 1),
                "fastest": round(max(values), 1),
            }
            for (variant, activation), values in rates.items()
        ],
    }


def show(result: dict[str, Any]) -> str:
    lines = [result["what"]]
    for row in result["results"]:
        spread = f"{row['slowest']:.0f} to {row['fastest']:.0f}"
        lines.append(
            f"  {row['activation']:8} {row['batch_norm']:10} {row['median']:6.0f} /s  ({spread})"
        )
    ours = [r["median"] for r in result["results"] if r["batch_norm"] == "gammabeta"]
    verdict = "met" if min(ours) >= result["required_with_bn"] else "NOT met"
    lines.append(f"  required with batch normalization: {result['required_with_bn']} /s, {verdict}")
    return "\n".join(lines)
