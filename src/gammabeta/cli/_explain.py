"""`gammabeta study explain`: the whole card of a claim."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from gammabeta.cli._parts import (
    FINE,
    Json,
    Unusable,
    Words,
    dump,
    newest_run,
    sorted_out,
    uninterrupted,
    usable,
)


def explain(
    what: Words = None,
    /,
    *,
    protocol: Annotated[bool, Parameter(show_default=False)] = False,
    json: Json = False,
) -> int:
    """Tell all about a claim: answer, verdicts, numbers, caveats, source, protocol, commands.

    Parameters
    ----------
    what
        Claims or experiments; kept rows or run folders (results/, else the newest run).
    protocol
        The whole protocol of the experiment, also what is about its other claims.
    """
    with usable():
        paths, asked = sorted_out(what or [])
        if not asked:
            raise Unusable("A claim was expected, such as act-all: `gammabeta study list` has all.")
        with uninterrupted():
            from gammabeta import _terminal
            from gammabeta.studies import _card
        cards = [_card.card(claim, paths, newest_run()) for claim in asked]
    if json:
        return dump([card.to_json() for card in cards])
    for number, card in enumerate(cards):
        if number:
            print()
        _terminal.explain(card, protocol)
    return FINE
