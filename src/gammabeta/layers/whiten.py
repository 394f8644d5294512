"""Whitening layers: channels are not only standardized but decorrelated, in groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gammabeta.layers._whitening import Whitening, inverse_root


class _ZCA(Whitening):
    """W = (Σ + eps·I)^(-1/2), exactly."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        group_size: int = 16,
        bias: bool = True,
        stored_variance: str = "unbiased",
        on_single: str = "error",
    ) -> None:
        rest = (momentum, affine, track_running_stats, device, dtype, bias)
        more = ("auto", stored_variance, on_single)
        super().__init__(num_features, eps, group_size, *rest, *more)

    def _inverse_root(self, cov: Tensor) -> Tensor:
        identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        return inverse_root(cov + self._eps * identity, self._eps)


class _Newton(Whitening):
    """W ≈ (Σ + eps·I)^(-1/2), by a few steps of an iteration."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        group_size: int = 64,
        iterations: int = 5,
        bias: bool = True,
        stored_variance: str = "unbiased",
        on_single: str = "error",
    ) -> None:
        if not isinstance(iterations, int) or iterations < 0:
            raise ValueError(
                f"{type(self).__name__}: iterations must be a whole number, at least 0, got "
                f"{iterations!r}. Usual are 3 to 7."
            )
        rest = (momentum, affine, track_running_stats, device, dtype, bias)
        more = ("auto", stored_variance, on_single)
        super().__init__(num_features, eps, group_size, *rest, *more)
        self.iterations = iterations

    def _inverse_root(self, cov: Tensor) -> Tensor:
        identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        matrix = cov + self._eps * identity
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        scaled = matrix / trace  # all eigenvalues in (0, 1]: the iteration converges
        root = identity.expand_as(matrix)
        for _ in range(self.iterations):
            root = 1.5 * root - 0.5 * (root @ root @ root) @ scaled
        return root * trace.rsqrt()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"


class DecorrelatedBatchNorm1d(_ZCA):
    """Decorrelated batch normalization (ZCA whitening) over (N, C) or (N, C, L).

    The C channels fall into G groups of d = ``group_size``, in their order. In each group

        y = γ·(Σ + eps·I)^(-1/2)·(x − mean) + β,    Σ = (1/m) Σᵢ (xᵢ − mean)(xᵢ − mean)ᵀ,

    with the symmetric root, over the m values of each channel: n and, with a length, all positions.
    γ and β are per channel. Up to eps, the outputs of a group have covariance γγᵀ∘I: they are
    uncorrelated, and of all such outputs the closest to x. In training mode mean and Σ are the
    batch's, and enter the running statistics: running ← (1 − momentum)·running + momentum·batch, Σ
    with the factor m/(m − 1). In eval mode the running statistics normalize. The root is taken by
    eigenvectors in float64; its derivatives divide by sums of roots of eigenvalues, never by
    differences of eigenvalues, and are exact for equal ones.

    With m ≤ d the batch does not span its group: in the directions that it leaves out Σ + eps·I is
    eps·I. No sample of the batch has a part in them, so that its outputs are finite; gradients in
    them, and in eval mode samples that have such a part, are amplified by up to 1/√eps.

    Args:
        num_features: C.
        eps: added to the diagonal of Σ, in units of x²; > 0.
        momentum: weight of the new value in the running statistics; None weights all batches
            equally.
        affine: whether there are γ (``weight``) and, with ``bias``, β (``bias``), both (C,).
        track_running_stats: without, batch statistics normalize in eval mode too.
        device, dtype: of the parameters. The buffers running_mean (C,) and running_cov (G, d, d)
            are float32 in any lower dtype.
        group_size: d, channels that are decorrelated from one another; must divide C. If there
            are fewer channels, they are one group.
        bias: whether there is β.
        stored_variance: "unbiased", or "biased" (without m/(m − 1)).
        on_single: what to do in training with one value per channel: raise an "error", or
            normalize by the "running" statistics and leave them as they are.

    Shape: input (N, C) or (N, C, L); output the same. ``mask`` in ``forward`` is bool,
    True = valid, broadcastable to (N,) or (N, L); y = 0 elsewhere, and only valid positions enter
    the statistics.

    Raises:
        TypeError: the input is not floating.
        ValueError: eps ≤ 0; group_size does not divide C; wrong number of dimensions; one value
            per channel in training; statistics shared between processes.
        RuntimeError: wrong number of channels.

    >>> import torch, gammabeta as gb
    >>> x = torch.tensor([[2.0, 2.0], [-2.0, -2.0], [1.0, -1.0], [-1.0, 1.0]])
    >>> layer = gb.DecorrelatedBatchNorm1d(2, momentum=1.0)
    >>> y = layer(x)
    >>> [[round(v, 3) for v in row] for row in y.tolist()]
    [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]
    >>> [[round(v, 3) for v in row] for row in layer.running_cov[0].tolist()]
    [[3.333, 2.0], [2.0, 3.333]]

    Source: Huang, Yang, Lang & Deng 2018, section 3 and Algorithms 1 and 2, arXiv:1804.08450.
    Differs from the paper: the running average is of the covariance, which merges exactly over
    batches, and the root is taken of it.
    """

    _dimensions = (2, 3)


class DecorrelatedBatchNorm2d(_ZCA):
    """Decorrelated batch normalization (ZCA whitening) over (N, C, H, W).

    The covariance of each group of channels is over n and all positions, m = N·H·W values.
    Formulas, arguments and errors are those of :class:`DecorrelatedBatchNorm1d`; a mask broadcasts
    to (N, H, W).

    >>> import torch, gammabeta as gb
    >>> x = torch.randn(4, 6, 8, 8, generator=torch.manual_seed(0)).cumsum(1)
    >>> y = gb.DecorrelatedBatchNorm2d(6, group_size=3)(x).transpose(0, 1).reshape(6, -1)
    >>> cov = y.cov(correction=0)
    >>> (cov[:3, :3] - torch.eye(3)).abs().max().item() < 1e-4    # within a group
    True
    >>> cov[:3, 3:].abs().max().item() > 0.1                      # between groups
    True

    Source: Huang, Yang, Lang & Deng 2018, section 3.4, arXiv:1804.08450.
    """

    _dimensions = (4,)


class IterNorm1d(_Newton):
    """Iterative normalization (whitening by Newton's iteration) over (N, C) or (N, C, L).

    As :class:`DecorrelatedBatchNorm1d`, with the same groups, statistics and buffers, but the
    inverse root of S = Σ + eps·I is approached by ``iterations`` steps from P₀ = I,

        Pₖ = ½·(3·Pₖ₋₁ − Pₖ₋₁³·S/tr S),    y = γ·P_T/√(tr S)·(x − mean) + β,

    which needs matrix products only. Directions of large variance are whitened first; those of
    small variance are stretched by at most 1.5^T and keep less than unit variance, which limits the
    noise that full whitening adds. In eval mode the same iteration runs on running_cov. With fewer
    values than channels in a group, the directions without data have the eigenvalue eps.

    Args:
        iterations: T, ≥ 0. The other arguments are those of :class:`DecorrelatedBatchNorm1d`, with
            ``group_size`` 64.

    Shape, mask and errors: as :class:`DecorrelatedBatchNorm1d`; iterations < 0 is a ValueError.

    >>> import torch, gammabeta as gb
    >>> x = torch.tensor([[2.0, 2.0], [-2.0, -2.0], [1.0, -1.0], [-1.0, 1.0]])
    >>> for steps in (0, 2, 5):
    ...     y = gb.IterNorm1d(2, iterations=steps)(x)
    ...     print([round(v, 3) for v in (y[0, 0].item(), y[2, 0].item())])
    [0.894, 0.447]
    [1.0, 0.816]
    [1.0, 1.0]

    Source: Huang, Zhou, Zhu, Liu & Shao 2019, Algorithm 1, arXiv:1904.03441.
    Differs from the paper: the running average is of the covariance, which merges exactly over
    batches, where the paper averages the whitening matrix.
    """

    _dimensions = (2, 3)


class IterNorm2d(_Newton):
    """Iterative normalization (whitening by Newton's iteration) over (N, C, H, W).

    The covariance of each group of channels is over n and all positions, m = N·H·W values.
    Formulas, arguments and errors are those of :class:`IterNorm1d`; a mask broadcasts to (N, H, W).

    >>> import torch, gammabeta as gb
    >>> x = torch.randn(4, 6, 8, 8, generator=torch.manual_seed(0))
    >>> y = gb.IterNorm2d(6)(x).transpose(0, 1).reshape(6, -1)
    >>> (y.cov(correction=0) - torch.eye(6)).abs().max().item() < 0.02
    True

    Source: Huang, Zhou, Zhu, Liu & Shao 2019, Algorithm 1, arXiv:1904.03441.
    """

    _dimensions = (4,)
