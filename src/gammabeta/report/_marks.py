"""Small marks that stand in tables: numbers as text, an interval as a bar, a status as a shape."""

import math
from typing import Any

from markupsafe import Markup

WIDTH = 210  # of a bar, in CSS pixels
HEIGHT = 26
_EDGE = 8  # room at both ends, where an arrow says that the interval goes on
_NARROW = 16  # an interval that a dot of 4 pixels would all but cover
_MINUS = "\N{MINUS SIGN}"

# status -> the word on the page, and what it means
STATUSES = {
    "supported": ("supported", "The whole interval lies above zero and the effect reaches δ."),
    "refuted": ("refuted", "The whole interval lies below δ: absent, too small, or reversed."),
    "mixed": ("mixed", "Supported at one of the levels declared beforehand, refuted at another."),
    "inconclusive": ("inconclusive", "These runs cannot tell; the page says how many would."),
    "exact": ("exact", "An identity, confirmed to the rounding of the computation."),
    "fails": ("fails", "An identity with a counterexample that is shown."),
    "demo": ("demo only", "Measured on the bundled digits: shows the method, decides nothing."),
    "none": ("not run here", "No run of it lies in the given folders."),
}

# letter -> how sure a reader may be
CERTAINTY = {
    "A": "exact, by a proof or a counterexample",
    "B": "the same verdict in at least three of four variations: fresh seeds, half the width, "
    "twice the width, harder images",
    "C": "not the same in three of the four variations, or none of them was tried",
    "D": "undecided",
}

# What else a reader meets in verdicts, tables and notes -> what it means.
WORDS = {
    "as published": "In the source's own setting, with its way of evaluation.",
    "fair": "Each network at the learning rate that is best for it, all evaluated alike. Where the "
    "two verdicts differ, what was found depended on the source's setting.",
    "as worded, as rightly stated": "For identities: the sentence as the source has it, and what "
    "holds of it exactly.",
    "effect, points": "What the claim is about as one number, positive where it points as claimed. "
    "Points are percentage points of test accuracy.",
    "95 % interval": "Where the mean effect lies with a confidence of 95 %, from the spread "
    "between seeds. A sign-flip p is the chance of a mean so far from zero if each seed's number "
    "might as well have the other sign.",
    "n, seeds, draws": "How often it was repeated, each time with other random numbers: initial "
    "weights, and order of the images. Both networks of a comparison share them.",
    "δ (delta)": "The smallest effect that matters, fixed in each claim's rule. An effect of 3 δ "
    "is three times as large.",
    "weakest": "Of several comparisons that all have to hold, the one that comes nearest to "
    "failing. Its effect stands for the claim.",
    "the cell nearest to its limit": "The same for claims about numbers: of all that was measured "
    "(a layer, a batch size, ...: a cell), the one with the least room to the limit that its rule "
    "sets, or the most beyond it.",
    "positive control": "A case where the effect is known to be there. Where the experiment does "
    "not see it, it says nothing about the claim either.",
    "ln": "A natural logarithm: +0.69 is twice as much, −0.69 half as much.",
    "per decrease of the loss": "Divided by how much the loss fell in the same steps, so that "
    "networks that learn at different speeds can be compared.",
    "Holm": "A correction for testing several claims at once: each headline claim has to be surer "
    "than if it stood alone, so that there is a false “supported” among all of them in "
    "5 % of cases at most.",
    "budget": "How long was trained. “small”: thousands of steps at most, the usual one; "
    "“full”: as many as the source, in what is published, and the fair part as at "
    "“small”; “tiny” and “brief” decide nothing.",
    "planned": "The precision that a few runs, made before and not counted, promised.",
    "rule amended after data": "The rule was changed after the first of its rows had been made, so "
    "whoever changed it may have seen the outcome. The mark stays for ever.",
    "second stage": "The first seeds left the claim undecided and said how many would decide it. "
    "Twice as many fresh ones were run, once, and judged alone; what the first had said stands in "
    "the notes.",
}

# One shape per status, drawn in a box of 16 by 16, so that color is never the only cue.
_RING = '<circle class="mo" cx="8" cy="8" r="6.2"/>'
_SHAPES = {
    "supported": '<circle class="mf" cx="8" cy="8" r="7"/>'
    '<path class="mi" d="M4.6 8.3 7 10.7l4.5-5"/>',
    "refuted": '<rect class="mf" x="1.5" y="1.5" width="13" height="13" rx="2"/>'
    '<path class="mi" d="m5 5 6 6m0-6-6 6"/>',
    "mixed": _RING + '<path class="mf" d="M8 1.8a6.2 6.2 0 0 1 0 12.4z"/>',
    "inconclusive": '<circle class="mo md" cx="8" cy="8" r="6.2"/>',
    "exact": _RING + '<path class="mo" d="M5.2 6.6h5.6M5.2 9.4h5.6"/>',
    "fails": '<path class="mo" d="M8 1.8 14.6 14H1.4z"/><path class="mo" d="M8 6v3.6M8 11.3v1"/>',
    "demo": '<path class="mo" d="m8 1.5 6.5 6.5L8 14.5 1.5 8z"/>',
    "none": '<path class="mo" d="M4 8h8"/>',
}


def number(value: Any, sign: bool = False) -> str:
    """A number as a reader wants it: three significant digits, a true minus, "–" for none.

    >>> number(2.3456), number(-0.5, sign=True), number(1234567.0), number(None)
    ('2.35', '−0.5', '1.23e6', '–')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int) and abs(value) < 10**15:
        text = f"{abs(value):,}".replace(
            ",", "\N{NARROW NO-BREAK SPACE}" if abs(value) > 9999 else ""
        )
    else:
        size = abs(float(value))
        digits = f"{size:.3g}"
        if "e" in digits:
            mantissa, power = digits.split("e")
            digits = f"{mantissa}e{int(power)}".replace("-", _MINUS)
        text = digits
    return (_MINUS if value < 0 else "+" if sign and value > 0 else "") + text


def is_number(value: Any) -> bool:
    """Whether a value from a run folder can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def status_mark(status: str | None) -> Markup:
    """The status as shape and word; None means that there is no run."""
    key = status if status in STATUSES else "none"
    return Markup(
        '<span class="status s-{}"><svg width="16" height="16" aria-hidden="true">'
        '<use href="#m-{}"/></svg>{}</span>'
    ).format(key, key, STATUSES[str(key)][0])


def shapes() -> Markup:
    """The shapes that `status_mark` refers to: once in a page."""
    return Markup('<svg width="0" height="0" class="shapes" aria-hidden="true">{}</svg>').format(
        Markup("").join(
            Markup('<symbol id="m-{}" viewBox="0 0 16 16">{}</symbol>').format(key, Markup(shape))
            for key, shape in _SHAPES.items()
        )
    )


def certainty_mark(certainty: tuple[str, str]) -> Markup:
    """The letter and its words."""
    letter, words = certainty
    return Markup('<span class="certainty"><b class="grade g-{}">{}</b> · {}</span>').format(
        letter.lower(), letter, words
    )


def _room(name: str) -> int:
    """Pixels that a name on the axis takes, as much on the left of 0 as on the right."""
    return 7 * (len(name.removeprefix(_MINUS)) + (name != "0")) + 5


class Scale:
    """One scale for all bars of the page, in multiples of each claim's own δ.

    A value v stands at asinh(v/δ): nearly linear up to δ, logarithmic beyond, so that an effect
    of half a δ and one of fifty can be read on the same line. `span` is the largest |v/δ| shown.
    """

    def __init__(self, ratios: list[float]) -> None:
        largest = max((abs(ratio) for ratio in ratios if math.isfinite(ratio)), default=3.0)
        self.span = min(max(1.15 * largest, 3.0), 300.0)

    def at(self, ratio: float) -> float:
        """The horizontal place of v/δ in a bar."""
        half = WIDTH / 2 - _EDGE
        share = math.asinh(max(-self.span, min(self.span, ratio))) / math.asinh(self.span)
        return WIDTH / 2 + half * share

    def ticks(self) -> list[tuple[float, str]]:
        """Places and names of the marks on the axis."""
        steps = [1] + [step for step in (10, 100) if step < 0.8 * self.span]
        named = [(float(step), "δ" if step == 1 else f"{step}δ") for step in steps]
        left = [(-step, _MINUS + name) for step, name in reversed(named)]
        marks = [(self.at(step), name) for step, name in [*left, (0.0, "0"), *named]]
        # 0 stands, then the outer ones inwards; a name that would touch another is left out.
        found: dict[float, str] = {}
        for at, name in sorted(marks, key=lambda mark: (mark[1] != "0", -abs(mark[0] - WIDTH / 2))):
            if all(abs(at - x) > (_room(name) + _room(other)) / 2 for x, other in found.items()):
                found[at] = name
        return [(at, found.get(at, "")) for at, _ in marks]

    def axis(self, name: str = "") -> Markup:
        """The axis alone, for the head of a column of bars; under a name it can be used again."""
        ticks = self.ticks()
        marks = [Markup('<text x="{:.1f}" y="11">{}</text>').format(*tick) for tick in ticks]
        path = "".join(f"M{x:.1f} 15v5" for x, _ in ticks)
        marks.append(Markup('<path stroke="currentColor" d="{}"/>').format(path))
        return Markup(
            '<svg class="bar axis" viewBox="0 0 {} 20" width="{}" height="20" '
            'aria-hidden="true"><g{}>{}</g></svg>'
        ).format(
            WIDTH, WIDTH, Markup(' id="{}"').format(name) if name else "", Markup("").join(marks)
        )

    def bar(self, effect: Any, lo: Any, hi: Any, delta: Any) -> Markup:
        """Effect and interval beside the band of effects too small to matter.

        Empty where there is no effect or no δ to measure it by.
        """
        if not (is_number(effect) and is_number(delta) and delta > 0):
            return Markup("")
        middle = HEIGHT / 2
        left, right = self.at(-1.0), self.at(1.0)
        parts = [
            Markup('<rect class="band" x="{:.1f}" y="2" width="{:.1f}" height="{}"/>').format(
                left, right - left, HEIGHT - 4
            ),
            Markup('<path class="zero" d="M{:.1f} 0v{}"/>').format(WIDTH / 2, HEIGHT),
        ]
        label = f"effect {number(effect, sign=True)}"
        narrow = False
        if is_number(lo) and is_number(hi):
            a, b = self.at(lo / delta), self.at(hi / delta)
            narrow = b - a < _NARROW
            parts.append(Markup('<path class="ci" d="M{:.1f} {}H{:.1f}"/>').format(a, middle, b))
            for end, ratio in ((a, lo / delta), (b, hi / delta)):
                beyond = abs(ratio) > self.span
                side = int(math.copysign(5, ratio))
                form = f"m{-side} -5 {side} 5 {-side} 5" if beyond else "m0 -8v16"
                parts.append(
                    Markup('<path class="ci" d="M{:.1f} {}{}"/>').format(end, middle, form)
                )
            label += f", interval {number(lo, sign=True)} to {number(hi, sign=True)}"
        # A full dot would hide a narrow interval.
        parts.append(
            Markup('<circle class="dot{}" cx="{:.1f}" cy="{}" r="{}"/>').format(
                " thin" if narrow else "", self.at(effect / delta), middle, 2.4 if narrow else 4
            )
        )
        label += f", smallest effect that matters {number(delta)}"
        return Markup(
            '<svg class="bar" viewBox="0 0 {} {}" width="{}" height="{}" role="img" '
            'aria-label="{}">{}</svg>'
        ).format(WIDTH, HEIGHT, WIDTH, HEIGHT, label, Markup("").join(parts))
