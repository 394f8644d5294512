"""The networks that are timed as a whole, made of PyTorch's own layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
Act = Callable[[], nn.Module]


class _Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + x), with every activation a module of its own."""

    def __init__(self, inside: int, width: int, stride: int, norm: Norm, act: Act) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1, self.act1 = norm(width), act()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2, self.act2 = norm(width), act()
        self.stride, self.extra = stride, width - inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.extra:  # option A of He et al. 2016: no parameters
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0,) * 5 + (self.extra,))
        return self.act2(y + x)


def resnet20(norm: Norm = nn.BatchNorm2d, act: Act = nn.ReLU) -> nn.Module:
    """ResNet-20 for 32x32 images, 16-32-64 channels (He et al. 2016, section 4.2)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), norm(16), act()]
    inside = 16
    for width, first in ((16, 1), (32, 2), (64, 2)):
        for stride in (first, 1, 1):
            layers.append(_Block(inside, width, stride, norm, act))
            inside = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def stack(norm: Norm = nn.BatchNorm2d, act: Act = nn.ReLU, depth: int = 8) -> nn.Module:
    """A plain stack of convolution, normalization and activation, 64 channels."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(64 if i else 3, 64, 3, 1, 1, bias=False), norm(64), act()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def images(batch: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    return x, torch.randint(10, (batch,), generator=generator)
