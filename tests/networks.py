"""Small seeded float64 networks that the tests of the instruments share.

Each builder takes ``norm``: "nn" for PyTorch's layers, "gb" for ours, "none" for none. They are
healthy: no bias before a normalization, each layer at one place; batches of 16 or more give each
channel enough values in all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gammabeta as gb

CLASSES = 3
_NORMS = {
    ("nn", 1): nn.BatchNorm1d,
    ("nn", 2): nn.BatchNorm2d,
    ("gb", 1): gb.BatchNorm1d,
    ("gb", 2): gb.BatchNorm2d,
}
_ACTS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "none": nn.Identity}


def norm_of(norm: str, dimensions: int, channels: int) -> nn.Module:
    return nn.Identity() if norm == "none" else _NORMS[norm, dimensions](channels)


def seeded(model: nn.Module, size: tuple[int, ...]) -> nn.Module:
    """In float64, with γ and β that are not 1 and 0, and the size of a sample, for batch_for."""
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                noise = torch.randn(2, module.num_features, generator=generator).double()
                module.weight += 0.2 * noise[0]
                module.bias += 0.2 * noise[1]
    model.sample_size = size
    return model


def batch_for(model: nn.Module, n: int = 8, seed: int = 2) -> tuple[Tensor, Tensor]:
    """A batch (x, y) of ``n`` samples for one of these networks; y are classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *model.sample_size, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % CLASSES


def step_for(model: nn.Module, n: int = 8, **keywords: object) -> gb.Step:
    """A Step of one of these networks with the cross entropy of its classes."""
    return gb.Step(model, nn.CrossEntropyLoss(), batch_for(model, n), **keywords)


def linear_chain(depth: int = 3, width: int = 4, norm: str = "none") -> nn.Module:
    """Linear layers one after the other, without activations: the Jacobian is their product."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width, bias=False)]
        layers += [] if norm == "none" else [norm_of(norm, 1, width)]
    return seeded(nn.Sequential(*layers, nn.Linear(width, CLASSES, bias=False)), (width,))


def mlp(width: int = 5, depth: int = 3, act: str = "relu", norm: str = "gb") -> nn.Module:
    """Linear, normalization, activation, ``depth`` - 1 times, and a linear layer."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth - 1):
        layers += [nn.Linear(4 if i == 0 else width, width, bias=norm == "none")]
        layers += [norm_of(norm, 1, width), _ACTS[act]()]
    return seeded(nn.Sequential(*layers, nn.Linear(width, CLASSES)), (4,))


class _Residual(nn.Module):
    """Two convolutions and a shortcut, as in ResNet: what He et al. 2016 call a basic block."""

    def __init__(self, inside: int, out: int, stride: int, norm: str, act: Callable) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, padding=1, bias=False)
        self.bn1 = norm_of(norm, 2, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = norm_of(norm, 2, out)
        self.relu = act()
        self.downsample = None
        if stride != 1 or inside != out:
            conv = nn.Conv2d(inside, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, norm_of(norm, 2, out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class _ResNet(nn.Module):
    def __init__(self, norm: str, widths: list[int], act: Callable) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, widths[0], 3, padding=1, bias=False)
        self.bn1 = norm_of(norm, 2, widths[0])
        self.relu = act()
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.layers = nn.Sequential(
            *(_Residual(a, b, 1 if a == b else 2, norm, act) for a, b in pairs)
        )
        self.fc = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layers(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def conv_residual(norm: str = "gb", act: str = "relu") -> nn.Module:
    """A convolution and one residual block: the smallest convolutional network with a shortcut."""
    torch.manual_seed(0)
    return seeded(_ResNet(norm, [3], _ACTS[act]), (2, 4, 4))


def resnet_like(norm: str = "gb") -> nn.Module:
    """Three residual blocks, two of them with a strided shortcut; activations in place."""
    torch.manual_seed(0)
    return seeded(_ResNet(norm, [4, 6, 8], lambda: nn.ReLU(inplace=True)), (2, 8, 8))


class _Inverted(nn.Module):
    """Expand, convolve each channel alone, project: the block of MobileNetV2."""

    def __init__(self, inside: int, out: int, stride: int, norm: str) -> None:
        super().__init__()
        hidden = 2 * inside
        self.shortcut = stride == 1 and inside == out
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.conv = nn.Sequential(
            *(nn.Conv2d(inside, hidden, 1, bias=False), norm_of(norm, 2, hidden), nn.ReLU6(True)),
            *(depthwise, norm_of(norm, 2, hidden), nn.ReLU6(True)),
            *(nn.Conv2d(hidden, out, 1, bias=False), norm_of(norm, 2, out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


def mobilenet_like(norm: str = "gb") -> nn.Module:
    """Inverted residuals with ReLU6 and dropout before the classifier."""
    torch.manual_seed(0)
    stem = (nn.Conv2d(2, 4, 3, padding=1, bias=False), norm_of(norm, 2, 4), nn.ReLU6(True))
    blocks = (_Inverted(4, 4, 1, norm), _Inverted(4, 6, 2, norm))
    last = (nn.Conv2d(6, 8, 1, bias=False), norm_of(norm, 2, 8), nn.ReLU6(True))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, CLASSES))
    return seeded(nn.Sequential(*stem, *blocks, *last, *head), (2, 8, 8))


class _Dense(nn.Module):
    """Normalize, activate, convolve, append the result to the channels: DenseNet's layer."""

    def __init__(self, inside: int, growth: int, norm: str) -> None:
        super().__init__()
        self.norm1 = norm_of(norm, 2, inside)
        self.conv1 = nn.Conv2d(inside, 2 * growth, 1, bias=False)
        self.norm2 = norm_of(norm, 2, 2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x), inplace=True))
        new = self.conv2(F.relu(self.norm2(new), inplace=True))
        return torch.cat([x, new], 1)


def densenet_like(norm: str = "gb") -> nn.Module:
    """Two dense layers, a transition with average pooling, one more, all normalized before."""
    torch.manual_seed(0)
    stem = (nn.Conv2d(2, 4, 3, padding=1, bias=False),)
    dense = (_Dense(4, 2, norm), _Dense(6, 2, norm))
    transition = (norm_of(norm, 2, 8), nn.ReLU(True), nn.Conv2d(8, 4, 1, bias=False))
    rest = (nn.AvgPool2d(2), _Dense(4, 2, norm), norm_of(norm, 2, 6), nn.ReLU(True))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return seeded(nn.Sequential(*stem, *dense, *transition, *rest, *head), (2, 8, 8))


class _Functional(nn.Module):
    """Calls torch.nn.functional, operators and a lambda, with control flow, and no nn.ReLU."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6, bias=False)
        self.bn1 = norm_of(norm, 1, 6)
        self.fc2 = nn.Linear(6, 6, bias=False)
        self.bn2 = norm_of(norm, 1, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.bn1(F.linear(x, self.fc1.weight)))
        if hidden.shape[0] > 1:
            hidden = hidden + F.dropout(self.bn2(self.fc2(hidden)), 0.5, self.training).tanh()
        return self.head(hidden)


def functional_net(norm: str = "gb") -> nn.Module:
    """Layers called through torch.nn.functional, with dropout."""
    torch.manual_seed(0)
    return seeded(_Functional(norm), (4,))


def renormalized() -> nn.Module:
    """Linear layers and batch renormalization, whose output depends on the running statistics."""
    torch.manual_seed(0)
    hidden = (nn.Linear(4, 5, bias=False), gb.BatchRenorm1d(5), nn.ReLU())
    return seeded(nn.Sequential(*hidden, nn.Linear(5, CLASSES)), (4,))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "linear_chain": linear_chain,
    "mlp": mlp,
    "conv_residual": conv_residual,
    "resnet_like": resnet_like,
    "mobilenet_like": mobilenet_like,
    "densenet_like": densenet_like,
    "functional_net": functional_net,
}
