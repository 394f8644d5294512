"""wd-efflr: with BN weight decay acts through the norms of the weights alone.

784-100-100-10, ReLU, BN before it, 5,000 images, batches of 64, 300 steps of SGD at the rate that
docs/verdicts.md names as chosen: test accuracy with a decay of 0.01 minus that without, where after
each step the weights of each hidden unit are given the norm that they have in the run with decay.
Decay of the weights before BN alone, or of all parameters.
"""

import torch
from networks import draw, final, images, mlp
from plain import tell
from torch import nn

SEEDS, RATE, DECAY = range(120, 125), 0.3, 0.01


def gain(everything, seed):
    def trained(after):
        torch.manual_seed(seed)
        net = mlp(2, nn.BatchNorm1d)
        hidden = [net[0].weight, net[3].weight]
        before, behind = after(net, hidden)
        hooks = {"after_backward": before, "after_step": behind}
        return final(net, draw(train, 5000, seed), test, RATE, 300, 64, seed, **hooks)

    norms = {}

    def with_decay(net, hidden):
        def decay():
            for p in net.parameters() if everything else hidden:
                p.grad += DECAY * p.detach()

        def keep(step):
            norms[step] = [w.detach().norm(dim=1, keepdim=True) for w in hidden]

        return decay, keep

    def with_norms(net, hidden):
        def take(step):
            with torch.no_grad():
                for w, norm in zip(hidden, norms[step], strict=True):
                    w *= norm / w.norm(dim=1, keepdim=True)

        return None, take

    return trained(with_decay) - trained(with_norms)


if __name__ == "__main__":
    train, test = images()
    tell("wd-efflr", "weights before BN alone", [gain(False, seed) for seed in SEEDS])
    tell("wd-efflr", "all parameters", [gain(True, seed) for seed in SEEDS])
