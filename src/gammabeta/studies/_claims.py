"""The registry of claims: read, checked, and asked for what a user wants to run."""

import contextlib
import contextvars
import difflib
import functools
import importlib.resources
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

TOPICS = (
    "identities",
    "initialization",
    "gradients",
    "accuracy",
    "speed",
    "learning-rate",
    "batch-size",
    "regularization",
    "covariate-shift",
    "smoothness",
    "placement",
    "inference",
    "devices",
    "depth",
    "weights",
)
SETS = ("headline", "all")
"""Names that stand for several experiments; no claim and no experiment may take them."""
_MOST_NAMED = 8  # of those that a word may have meant

_FILE = "claims.toml"
_IDS = {
    "id": (re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}"), "A-Z, a-z, 0-9 and -"),
    # A module and folders are named after it, and some file systems ignore capitals.
    "experiment": (re.compile(r"[a-z0-9][a-z0-9-]{0,63}"), "a-z, 0-9 and -"),
}
_REQUIRED = ("id", "title", "question", "origin", "source", "kind", "topic", "rule")
_CHOICES = {"origin": ("text", "beyond"), "kind": ("statistical", "exact"), "topic": TOPICS}


class Claim(NamedTuple):
    """One claim about batch normalization; the comment on top of claims.toml explains the fields.

    `reported`, `caveats` and `amended` are "" and `experiment` is None where the registry has
    nothing.
    """

    id: str
    title: str
    question: str
    origin: str
    source: str
    kind: str
    topic: str
    rule: str
    reported: str = ""
    caveats: str = ""
    experiment: str | None = None
    headline: bool = False
    thresholds: Mapping[str, float] = {}
    amended: str = ""


def claims() -> dict[str, Claim]:
    """All claims by id, in the order of the registry.

    Example:
        >>> claims()["act-all"].experiment
        'activations'
    """
    return dict(_registry())


_Rules = Mapping[str, Mapping[str, float]]
_OTHER: contextvars.ContextVar[_Rules | None] = contextvars.ContextVar("rules", default=None)


def _registry() -> dict[str, Claim]:
    """The registry under the rules that are in force here; see `overruled`."""
    found = _file()
    if other := _OTHER.get():
        changed = {
            name: found[name]._replace(thresholds={**found[name].thresholds, **thresholds})
            for name, thresholds in other.items()
        }
        return found | changed
    return found


@functools.cache
def _file() -> dict[str, Claim]:
    file = importlib.resources.files(__package__).joinpath(_FILE)
    return parse(file.read_text(encoding="utf-8"))


# --- reading --------------------------------------------------------------------------------


def parse(text: str) -> dict[str, Claim]:
    """The claims of a registry written in TOML, by id.

    Raises:
        ValueError: the text is no TOML, or a claim has a field that is unknown, missing or not
            what it has to be, or an id comes twice. The message names the claim and the field.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{_FILE}: expected TOML, got: {error}. Correct that line.") from error
    if others := sorted(document.keys() - {"claim"}):
        raise ValueError(
            f"{_FILE}: expected nothing but [[claim]] tables, got {others[0]!r}. "
            "Move it into a claim, or remove it."
        )
    tables = document.get("claim", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{_FILE}: expected [[claim]] tables. Write the name in double brackets.")
    found: dict[str, Claim] = {}
    for number, table in enumerate(tables, 1):
        claim = _claim(table, f"claim number {number}")
        if claim.id.lower() in _spelled(found):
            _refuse(claim.id, "id", "every id once", "it a second time", "Choose another id.")
        found[claim.id] = claim
    names = _spelled(found)
    for claim in found.values():
        if claim.experiment in names:
            expected = "an id that no claim has"
            _refuse(claim.id, "experiment", expected, repr(claim.experiment), "Rename one of them.")
    return found


def _claim(table: dict[str, Any], place: str) -> Claim:
    given = table.get("id")
    name = given if isinstance(given, str) and _IDS["id"][0].fullmatch(given) else place
    for field in table:
        if field not in Claim._fields:
            near = suggest(field, Claim._fields)
            do = f"Did you mean {near[0]!r}?" if near else "Remove it."
            _refuse(name, field, f"one of the fields {', '.join(Claim._fields)}", "another", do)
    for field in _REQUIRED:
        if field not in table:
            _refuse(name, field, "this field in every claim", "none", "Add it.")
    values = {field: _value(name, field, value) for field, value in table.items()}
    return Claim(**values)


def _value(name: str, field: str, value: Any) -> Any:
    """Check one field; texts come back on one line."""
    if field == "headline":
        if not isinstance(value, bool):
            _refuse(name, field, "true or false", repr(value))
        return value
    if field == "thresholds":
        return _thresholds(name, value)
    if not isinstance(value, str):
        _refuse(name, field, "text in quotes", repr(value))
    if field in _IDS:
        pattern, letters = _IDS[field]
        if not pattern.fullmatch(value) or value.lower() in SETS:
            expected = f"1 to 64 of {letters}, and none of {', '.join(SETS)}"
            _refuse(name, field, expected, repr(value))
        return value
    if field in _CHOICES:
        if value not in _CHOICES[field]:
            near = suggest(value, _CHOICES[field])
            do = f"Did you mean {near[0]!r}?" if near else "Choose one of them."
            _refuse(name, field, f"one of {', '.join(_CHOICES[field])}", repr(value), do)
        return value
    folded = " ".join(value.split())
    if not folded and field in _REQUIRED:
        _refuse(name, field, "a text", "an empty one", "Write it.")
    return folded


def _thresholds(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        _refuse(name, "thresholds", "a table of numbers", repr(value))
    for key, number in value.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number):
            _refuse(name, f"thresholds.{key}", "a finite number", repr(number))
    return {key: float(number) for key, number in value.items()}


def _refuse(name: str, field: str, expected: str, came: str, do: str = "Correct it.") -> NoReturn:
    raise ValueError(f"{_FILE}: {name}: field {field!r}: expected {expected}, got {came}. {do}")


# --- asking ---------------------------------------------------------------------------------


def suggest(word: str, choices: Iterable[str]) -> list[str]:
    """The choices nearest to a word that is none of them, best first, at most three.

    Example:
        >>> suggest("act-al", ["act-all", "bn-order"])
        ['act-all']
    """
    word, spelled = word.lower(), _spelled(choices)
    near = difflib.get_close_matches(word, list(spelled), n=3, cutoff=0.6)
    close = [difflib.SequenceMatcher(None, choice, word).ratio() for choice in near]
    # A slip of one letter has one answer; others are offered only if they are about as near.
    best = [choice for choice, ratio in zip(near, close, strict=True) if ratio > close[0] - 0.1]
    return [spelled[choice] for choice in best]


def meant(word: str, choices: Iterable[str]) -> str:
    """A question for a word that is none of the choices: those it is a part of, else the nearest.

    "" where there are none; of many the first are named.

    Example:
        >>> meant("act-al", ["act-all", "bn-order"]), meant("xyzzy", ["act-all"])
        ('Did you mean act-all?', '')
        >>> meant("ics", ["ics-def", "not-ics", "statistics"])
        'Did you mean ics-def or not-ics?'
    """
    word, names = word.strip().lower(), list(dict.fromkeys(choices))
    begun = [name for name in names if name.lower().startswith(word)]
    parts = [name for name in names if f"-{word}" in name.lower()]
    near = list(dict.fromkeys([*begun, *parts])) if word else []
    if len(near) > _MOST_NAMED:
        listed = ", ".join(near[:_MOST_NAMED])
        return f"{len(near)} claims and experiments have {word!r} in their id: {listed}, …"
    near = near or suggest(word, names)
    first, last = ", ".join(near[:-1]), "".join(near[-1:])
    return f"Did you mean {f'{first} or {last}' if first else last}?" if near else ""


def _spelled(ids: Iterable[str]) -> dict[str, str]:
    """Each id as the registry spells it, by what it is in small letters: users may write either."""
    return {name.lower(): name for name in ids}


def resolve(ids: Sequence[str], experiments: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The experiments that ids ask for, in the order asked, each once.

    Args:
        ids: ids of claims or of experiments, "headline" (the experiments of the headline claims)
            or "all". Capitals do not matter.
        experiments: what there is to run: each experiment's id with the claims that it decides.

    Raises:
        ValueError: an id is unknown (the message has the nearest), a claim has no experiment yet,
            or `experiments` and the registry contradict each other.

    Example:
        >>> resolve(["act-sigmoid-most", "headline"], {"activations": ("act-sigmoid-most",)})
        ['activations']
    """
    known = _registry()
    owner = _owners(experiments, known)
    spelled = _spelled(known)
    found: dict[str, None] = {}
    for given in ids:
        name = given.strip().lower()
        name = spelled.get(name, name)
        if name == "all":
            found |= dict.fromkeys(experiments)
        elif name == "headline":
            headline = [owner[i] for i, claim in known.items() if claim.headline and i in owner]
            found |= dict.fromkeys(headline)
        elif name in experiments:
            found[name] = None
        elif name in owner:
            found[owner[name]] = None
        elif name in known:
            ready = ", ".join(experiments) or "none"
            raise ValueError(
                f"claim {name!r} has no experiment yet. Those that can be run: {ready}."
            )
        else:
            raise ValueError(_unknown(given, [*SETS, *experiments, *known]))
    return list(found)


def _owners(
    experiments: Mapping[str, tuple[str, ...]], known: Mapping[str, Claim]
) -> dict[str, str]:
    """Which experiment decides each claim, after checking that modules and registry agree."""
    owner: dict[str, str] = {}
    names = _spelled(known)
    for experiment, decided in experiments.items():
        if experiment in names or experiment in SETS:
            raise ValueError(
                f"experiment {experiment!r}: expected an id that is neither a claim's nor one of "
                f"{', '.join(SETS)}, got one that is. Rename its module."
            )
        for claim in decided:
            if claim not in known:
                near = _unknown(claim, known).removesuffix(_SHOWS)
                raise ValueError(f"experiment {experiment!r}, CLAIMS: {near} Add it to {_FILE}.")
            if known[claim].experiment != experiment:
                raise ValueError(
                    f"claim {claim!r}: experiment {experiment!r} lists it in CLAIMS, but {_FILE} "
                    f"gives it the experiment {known[claim].experiment!r}. Make the two agree."
                )
            owner[claim] = experiment
    return owner


_SHOWS = " `gammabeta study list` shows all."


def _unknown(name: str, choices: Iterable[str]) -> str:
    hint = meant(name, choices)
    return f"unknown claim or experiment {name!r}.{f' {hint}' if hint else ''}{_SHOWS}"


# --- other rules ----------------------------------------------------------------------------


def rules(texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Thresholds by claim from texts CLAIM.THRESHOLD=VALUE; of two for the same the last holds.

    Raises:
        ValueError: a text is not of that form, the claim or its threshold is unknown, or the
            value is no finite number.

    Example:
        >>> rules(["act-all.delta=0.5"])
        {'act-all': {'delta': 0.5}}
    """
    found: dict[str, dict[str, float]] = {}
    spelled = _spelled(_file())
    for text in texts:
        place, _, number = text.partition("=")
        given, _, key = place.partition(".")
        name, key = given.strip().lower(), key.strip()
        name = spelled.get(name, name)
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not key or not math.isfinite(value):
            raise ValueError(
                f"a rule: expected CLAIM.THRESHOLD=VALUE with a finite number, got {text!r}. "
                "Write for example act-all.delta=0.5."
            )
        if name not in _file():
            raise ValueError(_unknown(given, _file()))
        if key not in (own := _file()[name].thresholds):
            has = f"has {', '.join(own)}" if own else "has none yet"
            raise ValueError(f"claim {name!r} has no threshold {key!r}; it {has}.")
        found.setdefault(name, {})[key] = value
    return found


@contextlib.contextmanager
def overruled(other: _Rules) -> Iterator[None]:
    """Within the block the claims have these thresholds in place of the registry's.

    Example:
        >>> with overruled({"act-all": {"delta": 0.5}}):
        ...     claims()["act-all"].thresholds["delta"]
        0.5
    """
    token = _OTHER.set(other)
    try:
        yield
    finally:
        _OTHER.reset(token)


# --- giving ---------------------------------------------------------------------------------


def listing() -> list[dict[str, str | None]]:
    """What `study list --json` prints: id, title, origin, source, experiment and kind of all."""
    fields = ("id", "title", "origin", "source", "experiment", "kind")
    return [{field: getattr(claim, field) for field in fields} for claim in _registry().values()]


def public() -> list[dict[str, Any]]:
    """All claims with all their fields, as they are copied into a run folder's claims.json."""
    return [
        claim._asdict() | {"thresholds": dict(claim.thresholds)} for claim in _registry().values()
    ]
