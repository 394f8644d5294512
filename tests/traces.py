"""What an observer must leave as it is, down to the bit."""

import copy
import random

import numpy as np
import torch


def state_of(model, optimizer=None):
    """Everything that a Step must leave as it is, with the identities of the tensors."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": [(n, id(t), t._version, t.requires_grad, t.detach().clone()) for n, t in tensors],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "attributes": [
            {k: v for k, v in m.__dict__.items() if isinstance(v, bool | int | float | str | None)}
            for m in model.modules()
        ],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    }


def same(a, b):
    """Equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return a == b
