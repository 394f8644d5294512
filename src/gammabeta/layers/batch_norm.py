"""Batch normalization: drop-in layers, and layers with a fused activation and residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from gammabeta.layers._method import Concealed
from gammabeta.layers._running import RunningMoments, is_traced, traced_call
from gammabeta.ops import _activations
from gammabeta.ops._activations import Act


class _Plain(RunningMoments, _BatchNorm):
    """Computes what ``torch.nn``'s layer of the same name computes, and nothing else."""

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
        bias: bool = True,
        backend: str = "auto",
        stored_variance: str = "unbiased",
        on_single: str = "error",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self._configure(backend, stored_variance, on_single)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if is_traced(input):
            return cast(Tensor, traced_call(self, input, mask=mask))
        return self._forward(input, None, None, mask)


class BatchNorm1d(_Plain, nn.BatchNorm1d):
    """Batch normalization over (N, C) or (N, C, L): a drop-in for ``torch.nn.BatchNorm1d``.

    y = γ·(x − mean)/√(var + eps) + β per channel, over n and, with a length, all positions.
    In training mode mean and (biased) variance are the batch's, and enter the running
    statistics: running ← (1 − momentum)·running + momentum·batch, the variance with the factor
    m/(m − 1). In eval mode the running statistics normalize.

    Args:
        num_features: C.
        eps: added to the variance, in units of x²; > 0.
        momentum: weight of the new value in the running statistics (not of the old one, which
            other frameworks call decay or momentum); None weights all batches equally.
        affine: whether there are γ (``weight``) and, with ``bias``, β (``bias``), both (C,).
        track_running_stats: without, batch statistics normalize in eval mode too.
        device, dtype: of the parameters. The buffers are float32 in any lower dtype.
        bias: whether there is β.
        backend: see :func:`gammabeta.batch_norm`.
        stored_variance: "unbiased", as in PyTorch, or "biased" (without m/(m − 1)).
        on_single: what to do in training with one value per channel: raise an "error", as
            PyTorch does, or normalize by the "running" statistics and leave them as they are.

    Shape: input (N, C) or (N, C, L); output the same. ``mask`` in ``forward`` is bool,
    True = valid, broadcastable to (N,) or (N, L); y = 0 elsewhere, and only valid positions
    enter the statistics.

    Raises:
        ValueError: wrong number of dimensions; one value per channel in training.
        RuntimeError: wrong number of channels.

    >>> import torch, gammabeta as gb
    >>> layer = gb.BatchNorm1d(1, momentum=0.5)
    >>> layer(torch.tensor([[1.0], [3.0]])).flatten().tolist()
    [-0.9999949932098389, 0.9999949932098389]
    >>> layer.running_mean.item(), layer.running_var.item()
    (1.0, 1.5)

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2, arXiv:1502.03167.
    Differs from ``torch.nn.BatchNorm1d``: buffers stay float32 in a half-precision layer, and a
    batch whose statistics are not finite does not enter them.
    """

    _dimensions = (2, 3)


class BatchNorm2d(_Plain, nn.BatchNorm2d):
    """Batch normalization over (N, C, H, W): a drop-in for ``torch.nn.BatchNorm2d``.

    One mean and one variance per channel, over n and all positions, m = N·H·W values. The
    arguments, formulas and errors are those of :class:`BatchNorm1d`; a mask broadcasts to
    (N, H, W).

    >>> import torch, gammabeta as gb
    >>> y = gb.BatchNorm2d(3)(torch.randn(4, 3, 8, 8, generator=torch.manual_seed(0)))
    >>> y.mean((0, 2, 3)).abs().max().item() < 1e-6, y.var((0, 2, 3), correction=0).round().tolist()
    (True, [1.0, 1.0, 1.0])

    Source: Ioffe & Szegedy 2015, section 3.2, arXiv:1502.03167.
    Differs from ``torch.nn.BatchNorm2d`` as :class:`BatchNorm1d` does from its twin.
    """

    _dimensions = (4,)


class BatchNorm3d(_Plain, nn.BatchNorm3d):
    """Batch normalization over (N, C, D, H, W): a drop-in for ``torch.nn.BatchNorm3d``.

    One mean and one variance per channel, over n and all positions, m = N·D·H·W values. The
    arguments, formulas and errors are those of :class:`BatchNorm1d`; a mask broadcasts to
    (N, D, H, W).

    >>> import torch, gammabeta as gb
    >>> gb.BatchNorm3d(2)(torch.zeros(1, 2, 2, 2, 2)).abs().max().item()
    0.0

    Source: Ioffe & Szegedy 2015, section 3.2, arXiv:1502.03167.
    Differs from ``torch.nn.BatchNorm3d`` as :class:`BatchNorm1d` does from its twin.
    """

    _dimensions = (5,)


class _Lazy(_LazyNormBase):
    """Learns ``num_features`` from axis 1 of the first input, then becomes the plain layer."""

    # from the plain layer, which every subclass has behind this class in its bases
    _configure: Callable[[str, str, str], None]
    _prepare: Callable[[], None]

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        backend: str = "auto",
        stored_variance: str = "unbiased",
        on_single: str = "error",
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self._configure(backend, stored_variance, on_single)

    def initialize_parameters(self, input: Tensor) -> None:
        super().initialize_parameters(input)
        self._prepare()


class LazyBatchNorm1d(_Lazy, nn.LazyBatchNorm1d, BatchNorm1d):
    """:class:`BatchNorm1d` that learns ``num_features`` from its first input.

    >>> import torch, gammabeta as gb
    >>> layer = gb.LazyBatchNorm1d()
    >>> layer(torch.randn(4, 7)).shape, type(layer).__name__, layer.num_features
    (torch.Size([4, 7]), 'BatchNorm1d', 7)
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d, BatchNorm2d):
    """:class:`BatchNorm2d` that learns ``num_features`` from its first input.

    >>> import torch, gammabeta as gb
    >>> layer = gb.LazyBatchNorm2d()
    >>> layer(torch.randn(4, 7, 2, 2)).shape, layer.num_features
    (torch.Size([4, 7, 2, 2]), 7)
    """

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d, BatchNorm3d):
    """:class:`BatchNorm3d` that learns ``num_features`` from its first input.

    >>> import torch, gammabeta as gb
    >>> layer = gb.LazyBatchNorm3d()
    >>> layer(torch.randn(4, 7, 2, 2, 2)).shape, layer.num_features
    (torch.Size([4, 7, 2, 2, 2]), 7)
    """

    cls_to_become = BatchNorm3d


class _Fused(Concealed):
    """y = act(BN(x) + residual): not a ``torch.nn.BatchNorm2d``, which it does not compute."""

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
        act: Act = "relu",
        bias: bool = True,
        backend: str = "auto",
        stored_variance: str = "unbiased",
        on_single: str = "error",
    ) -> None:
        _activations.parse(act)
        rest = (momentum, affine, track_running_stats, device, dtype, bias)
        super().__init__(num_features, eps, *rest, backend, stored_variance, on_single)
        self.act = act

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if is_traced(input):
            return cast(Tensor, traced_call(self, input, residual=residual, mask=mask))
        return self._forward(input, self.act, residual, mask)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", act={self.act!r}"


class BatchNormAct1d(_Fused):
    """Batch normalization, residual and activation in one layer, over (N, C) or (N, C, L).

    y = act(γ·x̂ + β + residual). Parameters and buffers have the names of
    :class:`BatchNorm1d`, so that a ``state_dict`` fits either; arguments and errors are its
    own too, and beside them:

    Args:
        act: None, "relu" (default), "leaky_relu", "sigmoid", "tanh", "softplus", "silu", "gelu"
            with PyTorch's default parameters, or ("leaky_relu", slope), ("gelu", "tanh").

    ``forward(x, residual=None, mask=None)``: residual has the shape of x.

    >>> import torch, gammabeta as gb
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> gb.BatchNormAct1d(1, act="relu")(x, residual=torch.ones(2, 1)).flatten().round().tolist()
    [0.0, 2.0]

    Source: Ioffe & Szegedy 2015, section 3.2, arXiv:1502.03167; the residual as in He et al.
    2016, arXiv:1512.03385.
    """

    _dimensions = (2, 3)


class BatchNormAct2d(_Fused):
    """Batch normalization, residual and activation in one layer, over (N, C, H, W).

    See :class:`BatchNormAct1d`.

    >>> import torch, gammabeta as gb
    >>> gb.BatchNormAct2d(2, act=("leaky_relu", 0.2))(torch.zeros(1, 2, 2, 2)).sum().item()
    0.0
    """

    _dimensions = (4,)


class BatchNormAct3d(_Fused):
    """Batch normalization, residual and activation in one layer, over (N, C, D, H, W).

    See :class:`BatchNormAct1d`.

    >>> import torch, gammabeta as gb
    >>> gb.BatchNormAct3d(2)(torch.zeros(1, 2, 2, 2, 2)).sum().item()
    0.0
    """

    _dimensions = (5,)
