"""Networks with auxiliary heads, several side by side (the protocol is the experiment's)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row
from gammabeta.studies._data import Images
from gammabeta.studies._nets import ACTIVATIONS, MLP
from gammabeta.studies._train import batches, fair_split, log_steps, pixels, stream

DEPTH, EVERY, WEIGHT = 12, 3, 0.3


class Trial(NamedTuple):
    """One of the networks: whether its heads teach it, and at which learning rate."""

    heads: bool
    rate: float


class Supervised(nn.Module):
    """``count`` networks side by side, alike at the start; they do not meet.

    Each is that of ``MLP``, pixels-[100]*depth-10, with a linear head to 10 on the activations of
    every third layer but the last.
    """

    def __init__(
        self, inputs: int, depth: int, activation: str, norm: bool, count: int, seed: int
    ) -> None:
        super().__init__()
        g = stream(seed, "weights")
        one = MLP((inputs, *[100] * depth, 10), activation, norm, g)
        heads = [MLP((100, 10), activation, False, g) for _ in range(EVERY, depth, EVERY)]

        def repeated(layers: Sequence[nn.Linear]) -> tuple[nn.ParameterList, nn.ParameterList]:
            weights = (m.weight.detach().T for m in layers)
            biases = (m.bias.detach() for m in layers if m.bias is not None)
            return (
                nn.ParameterList([w.repeat(count, 1, 1) for w in weights]),
                nn.ParameterList([b.repeat(count, 1, 1) for b in biases]),
            )

        linear = [m for m in one.layers if isinstance(m, nn.Linear)]
        self.weights, self.biases = repeated(linear)
        of_heads = [m for head in heads for m in head.layers if isinstance(m, nn.Linear)]
        self.head_weights, self.head_biases = repeated(of_heads)
        self.activation, self.depth, self.norm = ACTIVATIONS[activation](), depth, norm
        # PyTorch's: in ours a batch with one value that is not finite enters the statistics of no
        # channel, and a network that diverged would leave its mark on the others.
        norms = [nn.BatchNorm1d(count * 100) for _ in range(depth if norm else 0)]
        self.norms = nn.ModuleList(norms)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits (count, n, 10) for x of (n, inputs): the network's own, then those of the heads.

        Heads teach; in eval mode they are left out.
        """
        count = len(self.weights[0])
        heads: list[Tensor] = []
        h = x.expand(count, *x.shape)
        for k in range(self.depth):
            if self.norm:
                z = torch.bmm(h, self.weights[k])
                # A channel for each unit of each network.
                y: Tensor = self.norms[k](z.transpose(0, 1).reshape(len(x), -1))
                z = y.view(len(x), count, -1).transpose(0, 1)
            else:
                z = torch.baddbmm(self.biases[k], h, self.weights[k])
            h = self.activation(z)
            if self.training and (k + 1) % EVERY == 0 and k + 1 < self.depth:
                at = len(heads)
                heads.append(torch.baddbmm(self.head_biases[at], h, self.head_weights[at]))
        return [torch.baddbmm(self.biases[-1], h, self.weights[-1]), *heads]


def trained(
    seed: int,
    images: Images,
    activation: str,
    norm: bool,
    trials: Sequence[Trial],
    evaluation: str,
    steps: int,
    count: int,
    depth: int = DEPTH,
) -> Iterator[tuple[int, Row]]:
    """Train some networks at once: which of the trials, and a row, for each evaluation.

    The loss of a network is its mean cross-entropy, plus 0.3 times that of each head if its heads
    teach it. The first row of each tells the gradient of its first layer at the first step.

    Args:
        count: evaluation images at most.
    """
    train_x, train_y, x, y = fair_split(images, seed, evaluation)
    train_x, x, y = train_x.flatten(1), pixels(x[:count], images.pixel_max), y[:count]
    net = Supervised(x.shape[1], depth, activation, norm, len(trials), seed)
    parameters = list(net.parameters())
    weights = torch.tensor([WEIGHT * trial.heads for trial in trials])
    rates = torch.tensor([trial.rate for trial in trials])
    stops = log_steps(steps, 3)[-3:]
    order = batches(len(train_x), 64, stream(seed, "order"))
    for step, at in zip(range(1, steps + 1), order, strict=False):
        own, *heads = net.train()(pixels(train_x[at], images.pixel_max))
        losses = _loss(own, train_y[at])
        total = losses.sum()
        for head in heads:
            total = total + (weights * _loss(head, train_y[at])).sum()
        gradients = torch.autograd.grad(total, parameters)
        if step == 1:
            norms = gradients[0].flatten(1).norm(dim=1)
            for k, size in enumerate(norms):
                yield k, {"step": 0, "gradient": float(size)}
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                each = parameter.view(len(trials), -1)
                each.sub_(rates[:, None] * gradient.reshape(len(trials), -1))
            if step in stops:
                (logits,) = net.eval()(x)
                right = (logits.argmax(2) == y).double().mean(1)
                for k, (share, loss) in enumerate(zip(right, losses, strict=True)):
                    finite = bool(torch.isfinite(loss))
                    yield k, {"step": step, "accuracy": float(share), "diverged": not finite}


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each network."""
    count = len(logits)
    each = cross_entropy(logits.flatten(0, 1), labels.repeat(count), reduction="none")
    return each.view(count, -1).mean(1)
