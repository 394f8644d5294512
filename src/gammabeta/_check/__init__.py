"""The check: ten rules that find misuse of batch normalization in a model.

A rule is a function of the :class:`~._evidence.Evidence`, in one file with those that look at
the same things, and one line of the table below; its docstring is what ``--explain`` and
docs/check.md tell. It measures through the evidence, which leaves no trace in the model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from gammabeta._check._evidence import Evidence
from gammabeta._check._finding import Finding, Findings, Rule, Untried
from gammabeta._check._setting import bias_before, dropout_before, few_values
from gammabeta._check._statistics import differs, momentum, not_usable
from gammabeta._check._updates import (
    frozen_but_updating,
    not_counted_once,
    outside_training,
    several_sites,
)
from gammabeta.models._population import Forward

RULES = {
    rule.code: rule
    for rule in (
        Rule(
            "BN001",
            "batch not counted once per optimizer step",
            not_counted_once,
            ("step", "recomputation"),
        ),
        Rule("BN002", "frozen but updating", frozen_but_updating, ("optimizer", "requires_grad")),
        Rule("BN003", "updating outside training", outside_training, ("evaluate", "model.eval()")),
        Rule("BN004", "statistics not finite or never updated", not_usable),
        Rule("BN005", "train/eval gap above 5 %", differs, ("batches", "parts of one batch")),
        Rule("BN006", "fewer than 16 values per channel", few_values),
        Rule(
            "BN007", "momentum 0, above 0.5, or too small", momentum, ("epoch", "0 and above 0.5")
        ),
        Rule("BN008", "dropout before the layer", dropout_before),
        Rule("BN009", "bias before the layer", bias_before),
        Rule("BN010", "one layer at several sites", several_sites),
    )
}


def check(
    model: nn.Module,
    batch: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    step: Callable[[nn.Module, Any], Any] | None = None,
    evaluate: Callable[[nn.Module, Any], Any] | None = None,
    epoch: int | None = None,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
) -> Findings:
    """Find misuse of batch normalization in ``model``, by ten rules.

    Each finding has the rule's code, the places, the effect measured in this model, and the cure
    as a line of code. Nothing of the model, the optimizer or the random states changes. Rules that
    need what was not given say so in ``skipped``, those that it would make whole in ``partly``. The
    guide docs/check.md, and :func:`gammabeta.gap` for BN005, tell of each rule.

    Args:
        model: any module, as you use it: in training mode while it trains, in eval mode when it
            is to be used. The layers may be ours or ``torch.nn``'s.
        batch: one batch as in training, x or (x, y); better at least 64 values a channel.
        optimizer: the one of the training; shows which parameters it trains.
        batches: several batches as training draws them, with which the train/eval gap (BN005) is
            measured more exactly, and groups of batches are seen.
        forward: ``forward(model, batch)`` runs the model on a batch. Without it, of a tuple or
            list the first element is the input, a mapping holds keyword arguments.
        step: ``step(model, batch)``, your whole training step, tried once and undone; give the
            ``optimizer`` too if it uses one. For BN001.
        evaluate: ``evaluate(model, batch)``, your validation, tried once and undone. For BN003.
        epoch: steps in an epoch, for BN007.
        select: codes, "BN001,BN005" or a list; only these rules are tried.
        ignore: codes of rules that are not tried.

    Returns:
        A list of findings, empty if there are none; ``print`` tells all.

    Raises:
        ValueError: no such code; a model without batch normalization; lazy parameters; an
            optimizer that holds none of the model's parameters.
        TypeError: the model is no module, scripted or sharded; the optimizer is none; ``forward``,
            ``step`` or ``evaluate`` is no function, ``batches`` nothing to go through.
        RuntimeError: the model cannot be run on the batch; the cause is what it raised.

    >>> import torch, gammabeta as gb
    >>> layer = gb.BatchNorm1d(16, momentum=0.9)
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), layer)
    >>> print(gb.check(model, torch.randn(256, 8)))
    BN007 momentum 0, above 0.5, or too small
        where   1
        effect  momentum 0.9: the average has 90 % of the noise of a single batch
                (23 % at 0.1)
        cure    model[1].momentum = 0.1
    1 finding, 9 rules tried, 4 of them in part.
    In part: BN001 for recomputation only: give step=.
    In part: BN002 for requires_grad only: give optimizer=.
    In part: BN003 for model.eval() only: give evaluate=.
    In part: BN007 for 0 and above 0.5 only: give epoch=.
    Not tried: BN005: no batch of training has entered the running statistics yet.

    Source: each rule's.
    """
    chosen = [
        code
        for code in codes_of(select, "select") or RULES
        if code not in codes_of(ignore, "ignore")
    ]
    for name, function in (("forward", forward), ("step", step), ("evaluate", evaluate)):
        if function is not None and not callable(function):
            raise TypeError(
                f"check: {name} must be a function {name}(model, batch), got {function!r:.50}."
            )
    try:
        batches = None if batches is None else list(batches)
    except TypeError as error:
        text = f"check: batches must be several batches, such as a list, got {batches!r:.50}."
        raise TypeError(text) from error
    evidence = Evidence(model, batch, optimizer, batches, forward, step, evaluate, epoch)
    if not evidence.layers:
        raise ValueError(
            f"check: expected a model with batch normalizations, got {type(model).__name__} "
            "without. There is nothing to check."
        )
    _holding(evidence)
    findings, tried, skipped, partly = [], [], {}, {}
    for code in sorted(chosen):
        rule = RULES[code]
        try:
            found = rule.find(evidence)
        except Untried as reason:
            skipped[code] = str(reason)
            continue
        tried.append(code)
        if rule.without is not None and not evidence.has(rule.without[0]):
            partly[code] = f"for {rule.without[1]} only: give {rule.without[0]}="
        if found is not None:
            places = tuple(found.values)
            findings.append(
                Finding(code, rule.title, places, found.effect, found.cure, found.values)
            )
    return Findings(findings, tried, skipped, partly)


def _holding(evidence: Evidence) -> None:
    """An optimizer of other parameters would make everything look frozen."""
    optimizer = evidence.optimizer
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "check: optimizer must be a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}. Pass the one that trains the model, or none."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = [id(p) for p in evidence.model.parameters()]
    if own and held.isdisjoint(own):
        raise ValueError(
            "check: the optimizer must hold parameters of this model, holds none: make it after "
            "gb.convert."
        )


def codes_of(given: str | Iterable[str], argument: str) -> list[str]:
    words = given.split(",") if isinstance(given, str) else list(given)
    codes = [word.strip().upper() for word in words if word.strip()]
    for code in codes:
        if code not in RULES:
            near = difflib.get_close_matches(code, RULES, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"check: {argument} must name rules, BN001 to BN010, got {code!r}.{hint}"
            )
    return codes
