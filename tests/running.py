"""What the tests of running statistics share: layers, batches, models, their buffers compared."""

import copy
import pickle

import torch
from torch import nn

import gammabeta as gb

LAYERS = {
    "1d": (gb.BatchNorm1d, nn.BatchNorm1d, (16, 3)),
    "2d": (gb.BatchNorm2d, nn.BatchNorm2d, (16, 3, 4, 4)),
    "fused 2d": (gb.BatchNormAct2d, nn.BatchNorm2d, (16, 3, 4, 4)),
    "3d": (gb.BatchNorm3d, nn.BatchNorm3d, (16, 3, 2, 2, 2)),
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


def batch(*shape, mean=2.0, std=3.0, dtype=torch.float64):
    return (torch.randn(*shape, dtype=torch.float64) * std + mean).to(dtype)


def held(layer):
    """The layer's buffers as they are now."""
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def same(found, wanted, rtol=0.0):
    """Assert that two sets of buffers are equal, to the bit unless ``rtol`` says otherwise."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=0, msg=name)


def network(layer=gb.BatchNorm1d):
    return nn.Sequential(nn.Linear(3, 5), layer(5), nn.ReLU(), nn.Linear(5, 4), layer(4)).double()
