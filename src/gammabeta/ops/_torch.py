"""The private names of torch that this package uses: here only, each with a fallback."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transform_active() -> bool:
    """Whether torch.func or forward-mode differentiation is at work.

    Both need plain differentiable operations: neither a custom backward nor buffers that are
    written in place. Without the private names, fall back to "no", which raises rather than
    computes wrong numbers: PyTorch itself refuses what it cannot transform.
    """
    if torch.compiler.is_compiling():  # the compiler traces transforms on its own
        return False
    functorch = getattr(torch._C, "_functorch", None)
    level = getattr(functorch, "maybe_current_level", None)
    if level is not None and level() is not None:
        return True
    return getattr(forward_ad, "_current_level", -1) >= 0
