"""The rules in words: what ``--explain`` says, and the page docs/check.md."""

from __future__ import annotations

import inspect

from gammabeta._check import RULES, codes_of


def explain(code: str) -> str:
    """What a rule is about: why, when it fires, an example, the cure.

    Raises:
        ValueError: no such code.
    """
    (found,) = codes_of([code], "explain")
    rule = RULES[found]
    return f"{found} {rule.title}\n\n{inspect.getdoc(rule.find)}"


_PAGE = """# The check

`gb.check` looks for ten ways of misusing batch normalization, measures each in your own model, and
says what to do about it. It leaves no trace: parameters, gradients, buffers, optimizer, modes and
random states are what they were. Layers of PyTorch and of this package are checked alike.

```
print(gb.check(model, batch, optimizer))      # in Python
gammabeta check package.module:factory        # from a shell
gammabeta check --explain BN004
```

`factory` returns the model, a tuple (model, batch, optimizer), or a dict of the arguments of
`gb.check`. Exit codes: 0 nothing found, 1 findings, 2 the command cannot be used. `--json`,
`--select BN001,BN005`, `--ignore BN009`.

A batch of real data is what most rules need; without one, those that can still be tried are. The
other arguments make rules sharper: `optimizer=` (BN002, BN004), `batches=` (BN005), `step=`
(BN001), `evaluate=` (BN003), `epoch=` (BN007). What was not tried, or only in part, and why, stands
at the end.

This page is made from the rules by `python -m tests.test_check`. Its examples run one after the
other, after these lines:

```python
import copy

import torch
from torch import nn

import gammabeta as gb

torch.manual_seed(0)
x = torch.randn(512, 8)
```
"""


def page() -> str:
    """The text of docs/check.md."""
    rules = (
        f"## {code}: {rule.title}\n\n{inspect.getdoc(rule.find)}\n" for code, rule in RULES.items()
    )
    return "\n".join([_PAGE, *rules])
