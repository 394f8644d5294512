"""The laws that normalization layers obey, each shown to hold or shown not to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import LAYERS
from test_methods import F64, data
from torch import Tensor, nn


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    """The training output of a copy: no law may hang on the order of the calls."""
    return copy.deepcopy(layer)(x).detach()


def _weights(layer: nn.Module, x: Tensor, factor: Tensor) -> Tensor:
    """Scale a linear map before the layer: output, and the gradient of the map, times the scale."""
    weight = torch.linspace(-1, 1, 36, dtype=F64).view(6, 6).sin() + torch.eye(6, dtype=F64)
    results = []
    for scale in (torch.ones(()), factor):
        leaf = (weight * scale).requires_grad_()
        y = copy.deepcopy(layer)(x @ leaf.T)
        (dweight,) = torch.autograd.grad((y * x.cos()).sum(), leaf)
        results.append(torch.cat([y.detach().flatten(), (dweight * scale).flatten()]))
    return results[1] - results[0]


def _others(layer: nn.Module, x: Tensor) -> Tensor:
    changed = torch.cat([x[:1], 2 * x[1:] + 1])
    return (_run(layer, changed) - _run(layer, x))[:1]


PER_CHANNEL = torch.tensor([0.5, 2.0, 3.0, 4.0, 0.7, 1.6], dtype=F64)
LAWS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    # f(a·x) = f(x) for one a > 0; for one a in each channel; f(x + b) = f(x) likewise
    "scale": lambda layer, x: _run(layer, 3 * x) - _run(layer, x),
    "channel scale": lambda layer, x: _run(layer, PER_CHANNEL * x) - _run(layer, x),
    "shift": lambda layer, x: _run(layer, x + 2) - _run(layer, x),
    "channel shift": lambda layer, x: _run(layer, x + PER_CHANNEL) - _run(layer, x),
    # f(aWu) = f(Wu) and ∂f/∂(aW) = (1/a)·∂f/∂W, for the matrix or for each unit's weights
    "weight scale": lambda layer, x: _weights(layer, x, torch.tensor(3.0, dtype=F64)),
    "unit weights": lambda layer, x: _weights(layer, x, PER_CHANNEL[:, None]),
    # a sample's output does not depend on the other samples
    "sample independence": _others,
    # training and evaluation, in one state of the layer, give the same output
    "same in eval": lambda layer, x: copy.deepcopy(layer).eval()(x).detach() - _run(layer, x),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_obeys_the_laws_of_the_table_and_no_others(name, law):
    layer = LAYERS[name].make()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(6, generator=generator, dtype=F64))
    difference = LAWS[law](layer, data((12, 6))).abs().max().item()
    if law in LAYERS[name].obeys:
        assert difference < 1e-8
    else:
        assert difference > 0.05  # the counterexample


def test_the_table_names_laws_that_there_are():
    assert set().union(*(layer.obeys for layer in LAYERS.values())) == set(LAWS)


def test_the_documentation_shows_the_same_table():
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    start = next(i for i, cells in enumerate(lines) if cells[0].strip() == "law")
    names = [cell.strip() for cell in lines[start][1:]]
    shown: dict[str, set[str]] = {name: set() for name in names}
    for law, *cells in lines[start + 2 : start + 2 + len(LAWS)]:
        for name, cell in zip(names, cells, strict=True):
            if cell.strip():
                shown[name].add(law.strip())
    assert shown == {name: set(layer.obeys) for name, layer in LAYERS.items()}
