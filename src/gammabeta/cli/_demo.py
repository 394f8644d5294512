"""`gammabeta demo`: what batch normalization does, seen in half a minute."""

from __future__ import annotations

from gammabeta.cli._parts import FINE, Json, dump, uninterrupted, usable


def demo(*, json: Json = False) -> int:
    """Train small networks with and without batch normalization, and draw how it went.

    It takes scikit-learn's bundled digits and no network: half a minute.
    """
    with usable():
        with uninterrupted():
            from gammabeta import _terminal
            from gammabeta.studies import _demo
        with _terminal.working("Training nine small networks ..."):
            found = _demo.race()
    if json:
        return dump(found.to_json())
    _terminal.demo(found)
    return FINE
