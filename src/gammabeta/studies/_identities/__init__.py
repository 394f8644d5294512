"""The checks of the exact claims: one function per claim, in four files by topic.

A check draws its numbers from a generator and yields rows (`_compare.check`, `_compare.point`);
its claim's formula is a function beside it. To add one, write it and list it in its file's CHECKS.
"""

from gammabeta.studies._identities import forward, gradients, inference, weights
from gammabeta.studies._identities._compare import Check

CHECKS: dict[str, Check] = {
    **forward.CHECKS,
    **inference.CHECKS,
    **gradients.CHECKS,
    **weights.CHECKS,
}
