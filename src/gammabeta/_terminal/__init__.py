"""What the command line shows: tables that read well at 80 columns, and progress on stderr."""

from gammabeta._terminal._card import explain
from gammabeta._terminal._demo import demo, working
from gammabeta._terminal._figures import published
from gammabeta._terminal._running import (
    Progress,
    ended,
    environment,
    estimate,
    kept,
    status,
    verified,
    verifying,
)
from gammabeta._terminal._shared import MARKS, duration, make_console, number, one_point
from gammabeta._terminal._verdicts import (
    card,
    claims,
    disputed,
    multiplicity,
    notice,
    verdicts,
)

__all__ = [
    "MARKS",
    "Progress",
    "card",
    "claims",
    "demo",
    "disputed",
    "duration",
    "ended",
    "environment",
    "estimate",
    "explain",
    "kept",
    "make_console",
    "multiplicity",
    "notice",
    "number",
    "one_point",
    "published",
    "status",
    "verdicts",
    "verified",
    "verifying",
    "working",
]
