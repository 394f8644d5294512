"""What an experiment is: one module of this folder, found by listing it.

The module holds its protocol as its docstring, CLAIMS, and four functions:

    cells(budget, data, seeds, rows) -> list[Cell]     everything wanted so far, best first
    measure(arm, seed, budget, data) -> Iterable[Row]  one cell's measurements
    judge(rows) -> list[Verdict]                       pure
    figures(rows) -> list[dict]                        pure

and, if later waves depend on earlier ones, expected(budget, data, seeds) -> list[Cell]: about
what a whole run will ask for, used only to estimate how long it takes. What does not fit into one
file stands in a folder of the same name with an underscore before it.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._reach import code_digest

if TYPE_CHECKING:
    from gammabeta.studies._data import Images
    from gammabeta.studies._verdict import Verdict

BUDGETS = ("tiny", "small", "full")
# What takes a budget's place: the headline claims in brief, and run again (see `_headline`).
BRIEF = "brief"
AGAIN = "fresh-seeds"  # the whole again: as many seeds, and corrected for the number of claims
SECOND = "second-stage"  # fresh seeds for undecided claims (see `_second`)
VARIATIONS = (AGAIN, "width-half", "width-double", "images-small")


class Cell(NamedTuple):
    """One piece of work: one arm with one seed.

    `cost` is its time relative to the other cells; all cells of a lower `wave` run before those
    of a higher one, over all experiments of a run.
    """

    experiment: str
    arm: Mapping[str, Scalar]
    seed: int
    cost: float = 1.0
    wave: int = 0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment; its module is imported when something of it is first used.

    `module` is an importable name, so that a worker process can import it too.
    """

    id: str
    module: str

    def _load(self) -> ModuleType:
        try:
            return importlib.import_module(self.module)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            # A package that is not installed is for the user to install, not a defect.
            kind = ModuleNotFoundError if isinstance(error, ModuleNotFoundError) else ImportError
            raise kind(
                f"The experiment {self.id} ({self.module}) cannot be imported: {reason}"
            ) from error

    def _get(self, name: str) -> Any:
        try:
            return getattr(self._load(), name)
        except AttributeError as error:
            raise AttributeError(
                f"An experiment's module must define CLAIMS, cells, measure, judge and figures; "
                f"{self.module} has no {name}. Add it there."
            ) from error

    @property
    def CLAIMS(self) -> tuple[str, ...]:
        return tuple(self._get("CLAIMS"))

    @property
    def protocol(self) -> str:
        """The protocol in plain words: the module's docstring."""
        return str(self._get("__doc__") or "")

    def cells(self, budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
        """What is wanted, given the rows so far; RuntimeError if the experiment breaks its word."""
        if budget == SECOND:
            return []  # what is wanted follows from the rows of the first stage
        if budget in (BRIEF, *VARIATIONS):
            from gammabeta.studies import _headline

            return _headline.cells(self, self._load(), budget, data, seeds)
        wanted: list[Cell] = self._call("cells", budget, data, seeds, rows)
        self._check(wanted)
        return wanted

    def expected(self, budget: str, data: str, seeds: int | None) -> list[Cell]:
        """About what a whole run will ask for: for estimates only."""
        if budget in (BRIEF, SECOND, *VARIATIONS) or not hasattr(self._load(), "expected"):
            return self.cells(budget, data, seeds, [])
        wanted: list[Cell] = self._call("expected", budget, data, seeds)
        self._check(wanted)
        return wanted

    def measure(
        self, arm: Mapping[str, Scalar], seed: int, budget: str, data: "Images"
    ) -> Iterable[Row]:
        if budget in (BRIEF, *VARIATIONS):
            from gammabeta.studies import _variations

            return _variations.measure(self.id, self._load(), arm, seed, budget, data)
        measure: Callable[..., Iterable[Row]] = self._get("measure")
        return measure(arm, seed, "small" if budget == SECOND else budget, data)

    def judge(self, rows: list[Row]) -> "list[Verdict]":
        if rows and rows[0]["budget"] in (BRIEF, *VARIATIONS):
            from gammabeta.studies import _headline

            return _headline.judge(self, self._load(), rows)
        verdicts: list[Verdict] = self._call("judge", rows)
        return verdicts

    def figures(self, rows: list[Row]) -> list[dict[str, Any]]:
        if rows and rows[0]["budget"] in (BRIEF, *VARIATIONS):
            from gammabeta.studies import _headline

            return _headline.figures(self, self._load(), rows)
        figures: list[dict[str, Any]] = self._call("figures", rows)
        return figures

    def _call(self, name: str, *args: Any) -> Any:
        function = self._get(name)
        try:
            return function(*args)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(
                f"The experiment {self.id}: {name}() must give an answer for any rows, raised "
                f"{reason}. Mend {self.module}."
            ) from error

    def _check(self, wanted: list[Cell]) -> None:
        for cell in wanted:
            if cell.experiment != self.id or not cell.cost > 0 or cell.wave < 0 or cell.seed < 0:
                raise RuntimeError(
                    f"A cell of {self.id} must name it, cost more than 0 and have wave and seed "
                    f"of 0 or more, got {cell}. Mend {self.module}."
                )

    def code_of(self, budget: str) -> str:
        """16 hex digits for the code that makes the rows of a budget (see `code_digest`).

        What is done to brief and varied cells enters theirs.
        """
        if budget not in self._codes:
            self._codes[budget] = self._code_of(budget)
        return self._codes[budget]

    @functools.cached_property
    def _codes(self) -> dict[str, str]:
        return {}  # by budget; taken once, whatever happens to the files later

    def _code_of(self, budget: str) -> str:
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            raise ImportError(f"The experiment {self.id}: there is no module {self.module}.")
        own = Path(spec.origin)
        budget = "small" if budget == SECOND else budget
        if budget not in (BRIEF, *VARIATIONS):
            return code_digest(own, budget)
        varied = code_digest(Path(__file__).with_name("_variations.py"))
        return hashlib.sha256(f"{code_digest(own, 'small')} {varied}".encode()).hexdigest()[:16]


def experiments() -> dict[str, Experiment]:
    """The experiments of the package by id: file names without underscore, `_` written `-`."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    ids = {name.replace("_", "-"): name for name in names}
    return {key: Experiment(key, f"gammabeta.studies.{name}") for key, name in ids.items()}


def choose(ids: Iterable[str], catalogue: Mapping[str, Experiment] | None) -> list[Experiment]:
    """The experiments of these ids, each once, in the order given.

    Raises:
        ValueError: there is no such experiment; the nearest one is named.
    """
    known = experiments() if catalogue is None else catalogue
    for unknown in (key for key in ids if key not in known):
        near = difflib.get_close_matches(unknown, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
        raise ValueError(f"An experiment's id was expected, got {unknown!r}. {hint}")
    return [known[key] for key in dict.fromkeys(ids)]
