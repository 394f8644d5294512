"""Singular values of layer Jacobians over training as GIFs, with and without BN side by side.

Reads rows of kind "spectrum": layer, activation, norm ("bn" or "none"), step, x = percent of the
singular values that are at most y. A frame is a step; both halves of every frame have the same
axes, wide enough for all that is drawn: nothing is cut off at 1 or elsewhere.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gammabeta._runs import Row, StoredCell, read_cells
from gammabeta.report._stepped import alike

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

INSTALL = 'Animations need the extra "animation": pip install "gammabeta[animation]"'

# layer, activation -> title; the two that the MNIST study showed
SHOWN = {(1, "relu"): "Layer 1, ReLU", (2, "sigmoid"): "Layer 2, sigmoid"}
NORMS = {"bn": "with batch normalization", "none": "without"}
COLORS = {"bn": "#0072b2", "none": "#c65200"}
BANDS = {"bn": "#c4dcea", "none": "#f2d6c4"}
INK, MUTED, LINE, PAPER = "#1b1b1f", "#5f6068", "#d9d9d4", "#fcfcfa"

SIZE = 860, 430
_LEFT, _TOP, _BOTTOM, _GAP = 56, 78, 74, 26
_FRAME, _LAST = 500, 2500  # milliseconds

Quantiles = dict[float, list[float]]  # percent -> one singular value for each seed


class Animation(NamedTuple):
    """What one GIF shows: by arm, then by step, the quantiles."""

    title: str
    slug: str
    where: str  # data, budget and seeds
    arms: Mapping[str, Mapping[int, Quantiles]]

    @property
    def steps(self) -> list[int]:
        """Those that both arms have."""
        return sorted(set.intersection(*(set(by_step) for by_step in self.arms.values())))

    @property
    def largest(self) -> float:
        """Of all singular values that are drawn, at any step, in either arm."""
        return max(
            value
            for by_step in self.arms.values()
            for quantiles in by_step.values()
            for values in quantiles.values()
            for value in values
        )


def animations(cells: Iterable[StoredCell]) -> list[Animation]:
    """The animations that the cells have both arms and two steps of.

    Cells of one data set, budget and code: MNIST before the digits, then the larger budget, then
    those of which there are more.
    """
    where, rows = alike(cells, {"spectrum"})
    return _animations(rows, where)


def _animations(rows: Iterable[Row], where: str) -> list[Animation]:
    found: dict[tuple[Any, Any], dict[str, dict[int, Quantiles]]] = defaultdict(
        lambda: {norm: defaultdict(lambda: defaultdict(list)) for norm in NORMS}
    )
    seeds = set()
    for row in rows:
        place, norm = (row.get("layer"), row.get("activation")), row.get("norm")
        step, x, y = row.get("step"), row.get("x"), row.get("y")
        if place not in SHOWN or norm not in NORMS or not isinstance(step, int):
            continue
        if isinstance(x, int | float) and isinstance(y, int | float):
            found[place][str(norm)][step][float(x)].append(float(y))
            seeds.add(row["seed"])
    where += f", {len(seeds)} seeds: mean and range" if len(seeds) > 1 else ", one seed"
    all_found = [
        Animation(title, title.lower().replace(", ", "-").replace(" ", "-"), where, found[place])
        for place, title in SHOWN.items()
        if place in found
    ]
    return [animation for animation in all_found if len(animation.steps) > 1]


def write(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write each animation that the run folders hold, named after `out`; the files.

    Raises:
        ImportError: Pillow is not installed.
        RunError: a folder cannot be read.
        ValueError: no rows of singular values over training.
        OSError: a file cannot be written.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(INSTALL) from error
    made = animations(read_cells(paths))
    if not made:
        raise ValueError(
            "Singular values over training were expected (layer 1 with ReLU or layer 2 with "
            "sigmoid, with and without batch normalization), and these run folders have none. "
            "Make some with `gammabeta study run jacobian-one`."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for animation in made:
        file = out.with_name(f"{out.stem}-{animation.slug}.gif")
        first, *others = frames(animation)
        first.save(
            file,
            save_all=True,
            append_images=others,
            duration=[_FRAME] * len(others) + [_LAST],
            loop=0,
            comment=f"{animation.title}: singular values over training".encode(),
        )
        files.append(file)
    return files


def frames(animation: Animation) -> "list[Image.Image]":
    """One picture for each step."""
    return [_frame(animation, step) for step in animation.steps]


# -- drawing ------------------------------------------------------------------------------------


class Box(NamedTuple):
    """One half of a frame: its corners in pixels, and the largest value on its y axis."""

    left: float
    top: float
    right: float
    bottom: float
    largest: float

    def at(self, percent: float, value: float) -> tuple[float, float]:
        """Pixels of a point; the same at every step and in both arms."""
        return (
            self.left + percent / 100 * (self.right - self.left),
            self.bottom - value / self.largest * (self.bottom - self.top),
        )


def boxes(largest: float) -> dict[str, Box]:
    """The halves of all frames; the y axis ends at a tick above the largest value."""
    width, height = SIZE
    half = (width - _LEFT - 2 * _GAP) / 2
    tick = spacing(largest)
    top = tick * math.ceil(largest / tick + 1e-9)
    return {
        norm: Box(left := _LEFT + place * (half + _GAP), _TOP, left + half, height - _BOTTOM, top)
        for place, norm in enumerate(NORMS)
    }


def spacing(largest: float) -> float:
    """Distance of ticks: 1, 2 or 5 times a power of ten, four to ten of them.

    >>> spacing(4.4), spacing(0.31)
    (1.0, 0.05)
    """
    power = 10.0 ** math.floor(math.log10(largest / 4))
    return max(m * power for m in (1, 2, 5) if m * power <= largest / 4 * (1 + 1e-9))


def _frame(animation: Animation, step: int) -> "Image.Image":
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(picture)
    title = f"{animation.title}: singular values of the batch's Jacobian, step {step:,}"
    draw.text((_LEFT, 14), title, INK, _font(19))
    draw.text((_LEFT, SIZE[1] - 22), f"On {animation.where}.", MUTED, _font(13))
    for norm, box in boxes(animation.largest).items():
        _axes(draw, box, NORMS[norm], norm == "bn")
        _curve(draw, box, animation.arms[norm][step], norm)
    return picture.quantize(colors=64, dither=Image.Dither.NONE)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _axes(draw: "ImageDraw.ImageDraw", box: Box, title: str, labelled: bool) -> None:
    small = _font(13)
    draw.text((box.left, _TOP - 28), title, INK, _font(15))
    tick = spacing(box.largest)
    for k in range(round(box.largest / tick) + 1):
        (x, y), (end, _) = box.at(0, k * tick), box.at(100, k * tick)
        draw.line((x, y, end, y), LINE)
        if labelled:
            draw.text((x - 8, y), f"{k * tick:g}", MUTED, small, anchor="rm")
    (x, y), (end, _) = box.at(0, 1), box.at(100, 1)
    if box.largest >= 1:
        for dash in range(math.floor(x), math.floor(end), 9):
            draw.line((dash, y, min(dash + 4, end), y), MUTED)
    for percent in (0, 25, 50, 75, 100):
        x, y = box.at(percent, 0)
        draw.line((x, y, x, y + 4), MUTED)
        draw.text((x, y + 7), f"{percent}", MUTED, small, anchor="ma")
    below = (box.left + box.right) / 2, box.bottom + 28
    draw.text(below, "% of the singular values, sorted", MUTED, small, anchor="ma")


def _curve(draw: "ImageDraw.ImageDraw", box: Box, quantiles: Quantiles, norm: str) -> None:
    """The mean over seeds, over the range of the seeds."""
    places = sorted(quantiles)
    upper = [box.at(p, max(quantiles[p])) for p in places]
    lower = [box.at(p, min(quantiles[p])) for p in places]
    if len(places) > 1:
        draw.polygon([*upper, *reversed(lower)], BANDS[norm])
    line = [box.at(p, statistics.fmean(quantiles[p])) for p in places]
    draw.line(line, COLORS[norm], 3)
    for x, y in line:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), COLORS[norm])
