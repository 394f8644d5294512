"""The headline experiments in brief, and varied: what a cell of these kinds measures.

The protocol is that of the budget `small`, cell by cell, but for what the kind says. The
experiments stay as they are, and with them the rows that were accepted: what a kind changes is put
in their place for the time of one cell.

brief          shorter training, or fewer looks at it, in some, since all twelve shall fit five
               minutes (`SHORTER`)
fresh-seeds    nothing is changed but the seeds
width-half     half the units, and channels, in each hidden layer
width-double   twice as many
images-small   MNIST at 14 x 14, turned by up to 15 degrees, with noise (see `varied`)
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Generator

from gammabeta._runs import Row, Scalar
from gammabeta.studies._covariate_shift.deep import varied
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP, Norm

# experiment -> fields of its plan at `small` that are others in brief
SHORTER: Mapping[str, Mapping[str, Any]] = {
    "activations": {"fair_steps": 600, "published_steps": 400},
    "batch-size": {"ghost_steps": 300, "published_steps": 800},
    "covariate-shift": {"moments": {"deep": 10, "published": 20, "linear": 12}},
    "order": {"steps": {"dense": 500, "convolutional": 400}},
}
# kind -> what its cells have in their arm
CHANGES: Mapping[str, Mapping[str, Scalar]] = {
    "brief": {},
    "fresh-seeds": {},
    "width-half": {"width": 0.5},
    "width-double": {"width": 2.0},
    "images-small": {"images": "hard"},
}
_OF = "gammabeta.studies"
# Experiments whose arms know no width: where their networks are made, and by which name.
_MADE: Mapping[str, tuple[str, str]] = {
    "activations": (f"{_OF}.activations", "m2"),
    "batch-size": (f"{_OF}.batch_size", "m2"),
    "jacobians": (f"{_OF}.jacobians", "m2"),
    "initialization": (f"{_OF}._initialization.depth", "MLP"),
}
_KNOWS_IMAGES = ("covariate-shift",)


def measure(
    experiment: str,
    module: ModuleType,
    arm: Mapping[str, Scalar],
    seed: int,
    kind: str,
    data: Images,
) -> Iterator[Row]:
    """The rows of one cell of a kind, by the experiment's own code."""
    own, width = dict(arm), float(arm.get("width") or 1.0)
    if own.get("images") and experiment not in _KNOWS_IMAGES:
        del own["images"]
        data = hard(data)
    with contextlib.ExitStack() as changed:
        changed.enter_context(planned(experiment, module, kind))
        if "width" in own and experiment in _MADE:
            del own["width"]
            place, name = _MADE[experiment]
            wider = _m2(width) if name == "m2" else _mlp(width)
            changed.enter_context(_instead(importlib.import_module(place), name, wider))
        yield from module.measure(own, seed, "small", data)


@contextlib.contextmanager
def planned(experiment: str, module: ModuleType, kind: str) -> Iterator[None]:
    """Within the block the experiment's plan at `small` is that of the kind."""
    if kind != "brief" or experiment not in SHORTER:
        yield
        return
    small = module.PLANS["small"]._replace(**SHORTER[experiment])
    with _instead(module, "PLANS", {**module.PLANS, "small": small}):
        yield


@contextlib.contextmanager
def _instead(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Within the block the module has this value under the name."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _m2(width: float) -> Callable[..., MLP]:
    def m2(pixels: int, *args: Any, **options: Any) -> MLP:
        units = round(100 * width)
        return MLP((pixels, units, units, 10), *args, **options)

    return m2


def _mlp(width: float) -> Callable[..., MLP]:
    def mlp(sizes: Sequence[int], activation: str, norm: Norm, generator: Generator) -> MLP:
        hidden = [round(width * units) for units in sizes[1:-1]]
        return MLP((sizes[0], *hidden, sizes[-1]), activation, norm, generator)

    return mlp


@functools.lru_cache(maxsize=1)
def hard(data: Images) -> Images:
    """All images at half their size, turned, with noise: the same for every seed.

    Raises:
        ValueError: the bundled digits, which are small as they are.
    """
    if data.name != "mnist":
        raise ValueError(f"images-small halves the images of MNIST, got {data.name}. Use mnist.")
    train, test = (
        varied(images, "hard", 0, purpose, data.pixel_max)
        for images, purpose in ((data.train_x, "training"), (data.test_x, "test"))
    )
    return data._replace(train_x=train, test_x=test)
