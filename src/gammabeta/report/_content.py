"""What the page says, gathered from run folders and records: plain values, no HTML.

Everything here came from files that a stranger may have written. `_runs` has checked names and
types; texts stay texts and are escaped where they are shown.
"""

import ast
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gammabeta
from gammabeta._runs import (
    RunError,
    StoredCell,
    is_record,
    read_cells,
    read_claims,
    read_failed,
    read_figures,
    read_verdicts,
)
from gammabeta.report._compare import Comparison, compared
from gammabeta.report._marks import Scale, is_number, number
from gammabeta.report._records import Recording, recording
from gammabeta.report._rules import AMENDED, read_rules, told
from gammabeta.report._stepped import stepped
from gammabeta.report._verdict import PLACES, add_words, ratios

Claim = dict[str, Any]
Verdict = dict[str, Any]
_MOST_SURPRISES = 3
OVERTURNED = "overturned"  # supported as published, refuted in the fair test
FIRST_SCREEN = 12  # rows: what a reader takes in at one glance
CHOSE = 800  # seeds from here on chose rates and numbers of seeds, and are no part of a verdict
# Kinds of runs that `study run` takes by another option than --budget.
VARIANTS = ("fresh-seeds", "width-half", "width-double", "images-small")

# Where a source goes on to say in which of its parts a claim stands.
_PART = re.compile(
    r",\s+(?:Sections?|Claims?|Figs?\.|part|conclusion|code|equation|Algorithm|citing)\b"
)


@dataclass(frozen=True)
class Section:
    """All that is known about one experiment."""

    id: str
    question: str
    verdicts: list[Verdict]
    unjudged: list[Claim]
    figures: list[dict[str, Any]]
    protocol: list[str]
    cells: list[StoredCell]
    failed: list[dict[str, Any]]
    reproduce: list[str]
    took: list[str]  # of each of these commands
    dispute: list[tuple[str, str]]
    code: list[tuple[str, list[str]]]
    cite: str

    @property
    def anchor(self) -> str:
        return f"exp-{self.id}"


@dataclass
class Content:
    """The whole page."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    told: list[str] = field(default_factory=list)  # what the runs themselves call surprising
    expected: list[tuple[str, str]] = field(default_factory=list)  # false ones, and why so many
    comparison: Comparison | None = None
    notices: list[str] = field(default_factory=list)
    rules: dict[str, str] = field(default_factory=dict)  # claim -> fixed or amended, if known
    missing: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    records: list[Recording] = field(default_factory=list)
    scale: Scale = field(default_factory=lambda: Scale([]))

    @property
    def first(self) -> list[Verdict]:
        """The rows of the first screen: headline claims, and others where all are few."""
        ordered = sorted(self.verdicts, key=lambda verdict: not verdict["text"]["headline"])
        headline = [verdict for verdict in ordered if verdict["text"]["headline"]]
        few = len(ordered) <= FIRST_SCREEN
        return (ordered if few or not headline else headline)[:FIRST_SCREEN]

    @property
    def surprises(self) -> list[tuple[Verdict | None, str]]:
        """Up to three of what the run folders themselves call surprising, each with its verdict."""
        lines: list[tuple[Verdict | None, str]] = []
        for text in self.told[:_MOST_SURPRISES]:
            name, _, rest = text.partition(": ")
            verdict = next((v for v in self.verdicts if v["claim"] == name), None)
            if verdict is None:
                lines.append((None, text))
            else:
                short = rest.removesuffix(verdict["sentence"]).strip()
                lines.append((verdict, short[:1].upper() + short[1:]))
        return lines

    @property
    def overturned(self) -> list[Claim]:
        """Claims that are supported as published and refuted in the fair test."""
        return [claim for claim in self.claims if claim["differ"] == OVERTURNED]

    @property
    def differing(self) -> list[Claim]:
        """Claims whose two verdicts are not the same."""
        return [claim for claim in self.claims if claim["differ"]]

    def marked(self, mark: str) -> list[Claim]:
        """Claims with a mark, "amended" or "second"."""
        return [claim for claim in self.claims if mark in claim["marks"]]

    @property
    def opening(self) -> str:
        """What a reader is to know first, with what is known of the rules."""
        return (
            "What is said about batch normalization, put to the test: each claim an experiment "
            "with a rule, judged twice, as its source did it (as published) and with the "
            "comparison made fair (fair). " + told(self.claims)
        ).strip()

    @property
    def waiting(self) -> list[Claim]:
        """Headline claims that these folders do not decide."""
        return [claim for claim in self.claims if claim["headline"] and not claim["judged"]]

    @property
    def sources(self) -> list[str]:
        """Who claims, the most often named first."""
        found = Counter(source for claim in self.claims for source in claim["sources"])
        return [source for source, _ in sorted(found.items(), key=lambda item: -item[1])]


def gather(
    paths: Sequence[Path], compare: bool = False, judged: Mapping[Path, Path] | None = None
) -> Content:
    """Read run folders and records of trainings and put together what the page says.

    With `compare` the verdicts of exactly two run folders stand beside each other as well. What
    was judged of a folder may lie elsewhere: `judged` says where.

    Raises RunError where a folder is not a run folder or a file is not what it has to be.
    """
    page = Content()
    records = [path for path in paths if is_record(path)]
    folders = [path for path in paths if path not in records]
    if compare and len(folders) != 2:
        raise ValueError(
            f"report: a comparison needs two run folders, got {len(folders)}. "
            "Name two: gammabeta report runs/a runs/b --compare."
        )
    if folders:
        _gather_runs(page, folders, compare, judged or {})
    for place, path in enumerate(records):
        page.records.append(recording(path, _label(path), place))
        for figure in page.records[-1].figures:
            figure["place"] = len(page.figures)
            page.figures.append(figure)
    return page


def _gather_runs(
    page: Content, paths: Sequence[Path], compare: bool, judged: Mapping[Path, Path]
) -> None:
    cells = read_cells(paths)
    failed = read_failed(paths)
    protocols: dict[str, str] = {}
    each: list[tuple[str, list[Verdict]]] = []  # by run folder, before copies are left out
    for name, path in zip(_labels(paths), paths, strict=True):
        page.runs.append({"name": name, "command": shlex.quote(name)})
        home = judged.get(path, path)
        claims = read_claims(path) or read_claims(home)
        _merge(page.claims, claims, ("id",))
        for claim, when in read_rules(path, claims).items():
            page.rules[claim] = AMENDED if page.rules.get(claim) == AMENDED else when
        derived = read_verdicts(home)
        drawn = read_figures(home)
        if derived is None:
            page.missing.append(
                f"{name} has no verdicts.json: its runs have not been judged. "
                f"gammabeta study judge {shlex.quote(name)} makes it."
            )
        else:
            new = [
                {**verdict, "run": name, "fresh": _fresh(derived, verdict["claim"])}
                for verdict in derived["verdicts"]
            ]
            each.append((name, new))
            page.expected += _expected(derived, home, name if len(paths) > 1 else "")
            same = ("claim", "data", "budget", "status", "effect", "n")
            _merge(page.verdicts, new, same)
            page.told += [text for text in derived["surprises"] if text not in page.told]
            if derived["notice"] and derived["notice"] not in page.notices:
                page.notices.append(derived["notice"])
            protocols = {**_protocols(derived, home), **protocols}
        if drawn is None:
            page.missing.append(
                f"{name} has no figures.json, so there are no plots of it. "
                f"gammabeta study judge {shlex.quote(name)} makes it."
            )
        else:
            page.figures += [{**figure, "run": name} for figure in drawn if not _held(page, figure)]
        if not claims:
            page.missing.append(f"{name} has no claims.json: claims are shown by their ids only.")
    if not cells:
        page.missing.append("There is no finished cell in " + _join(map(_label, paths)) + ".")
    page.figures += stepped(cells)
    _complete(page, [verdict for _, verdicts in each for verdict in verdicts])
    if compare:
        page.comparison = compared(_labels(paths), dict(each), [c["id"] for c in page.claims])
        shown = [v for pair in page.comparison.pairs for v in pair.verdicts if v]
        page.scale = Scale([ratio for verdict in shown for ratio in ratios(verdict)])
    page.facts = _facts(page, cells, failed)
    page.sections = _sections(page, cells, failed, protocols)


def _label(path: Path) -> str:
    """The folder as the reader named it, without what an absolute path tells of a machine."""
    return path.name or "run" if path.is_absolute() else str(path)


def _labels(paths: Sequence[Path]) -> list[str]:
    """A name for each folder, no two of them the same."""
    plain = [_label(path) for path in paths]
    twice = {name for name in plain if plain.count(name) > 1}
    return [f"{name} ({place})" if name in twice else name for place, name in enumerate(plain, 1)]


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)


def _merge(into: list[dict[str, Any]], new: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Add what is not there yet; the folder named first wins."""
    seen = {tuple(item[key] for key in keys) for item in into}
    for item in new:
        mark = tuple(item[key] for key in keys)
        if mark not in seen:
            seen.add(mark)
            into.append(item)


def _held(page: Content, figure: Mapping[str, Any]) -> bool:
    """Whether the same figure came with an earlier folder, as it does from a copied run."""
    return any({**old, "run": None} == {**figure, "run": None} for old in page.figures)


def _protocols(derived: Mapping[str, Any], path: Path) -> dict[str, str]:
    value = derived.get("protocols", {})
    texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    if not texts:
        raise RunError(
            f"{path / 'verdicts.json'}: protocols: expected an object of texts, got "
            f"{type(value).__name__}. Judge the run again: gammabeta study judge."
        )
    return dict(value)


def _fresh(derived: Mapping[str, Any], claim: str) -> str | None:
    """The status of a claim in the variation with fresh seeds, where the run tells it."""
    found = derived.get("varied")
    own = found.get(claim) if isinstance(found, dict) else None
    status = own.get("fresh-seeds") if isinstance(own, dict) else None
    return status if isinstance(status, str) else None


def _expected(derived: Mapping[str, Any], path: Path, run: str) -> list[tuple[str, str]]:
    """How many of the supported claims are so by chance, at most, and how that was counted."""
    found = derived.get("multiplicity")
    if found is None:
        return []
    texts = isinstance(found, dict) and isinstance(found.get("how"), str)
    if not texts or not all(is_number(found.get(k)) for k in ("expected_false", "supported")):
        raise RunError(
            f"{path / 'verdicts.json'}: multiplicity: expected an object with numbers "
            "expected_false and supported and a text how, got something else. "
            "Judge the run again: gammabeta study judge."
        )
    told = (
        f"Of {number(found['supported'])} claims that are supported, done fairly, chance alone "
        f"explains {number(found['expected_false'])} on average at most."
    )
    return [(f"{run}: {told}" if run else told, found["how"])]


def _complete(page: Content, verdicts: Sequence[Verdict]) -> None:
    """Tie verdicts to their claims, order both, and find the scale of the bars."""
    known = {claim["id"]: claim for claim in page.claims}
    for claim in page.claims:
        claim["when"] = page.rules.get(claim["id"], "")
        why = claim.get("amended")  # the registry's words, where it has them
        claim["why"] = why if isinstance(why, str) else ""
        claim["amended"] = claim["when"] == AMENDED
    place = {claim: number for number, claim in enumerate(known)}
    judged: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        claim = known.get(verdict["claim"]) or _unknown(verdict)
        verdict["text"] = claim
        add_words(verdict, claim["kind"] == "exact")
    for number_, verdict in enumerate(page.verdicts):
        verdict["anchor"] = f"verdict-{verdict['claim']}"
        if verdict["claim"] in judged:
            verdict["anchor"] += f"-{number_}"
        judged.setdefault(verdict["claim"], []).append(verdict)
    page.verdicts.sort(key=lambda verdict: place.get(verdict["claim"], len(place)))
    for claim in page.claims:
        claim["judged"] = judged.get(claim["id"], [])
        claim["statuses"] = list(dict.fromkeys(verdict["status"] for verdict in claim["judged"]))
        claim["published"] = list(dict.fromkeys(v["published_status"] for v in claim["judged"]))
        claim["differ"] = _differ(claim["judged"])
        claim["second"] = any(verdict["second"] for verdict in claim["judged"])
        marks = {"amended": claim["amended"], "second": claim["second"]}
        claim["marks"] = [mark for mark, there in marks.items() if there]
        claim["sources"] = _sources(claim["source"])
        claim["ratio"] = next((v["ratio"] for v in claim["judged"] if v["ratio"] is not None), None)
    page.scale = Scale([ratio for verdict in page.first for ratio in ratios(verdict)])


def _differ(verdicts: Sequence[Verdict]) -> str:
    """How the verdicts as published and in the fair test differ, "" where they agree."""
    pairs = {(verdict["published_status"], verdict["status"]) for verdict in verdicts}
    if ("supported", "refuted") in pairs:
        return OVERTURNED
    return "yes" if any(published not in (None, fair) for published, fair in pairs) else ""


def _sources(text: str) -> list[str]:
    """The sources of a claim by their names alone, without section, figure and number.

    >>> _sources("Kathuria, Paperspace article; Ioffe & Szegedy 2015, Section 3 (arXiv 1502.03167)")
    ['Kathuria, Paperspace article', 'Ioffe & Szegedy 2015']
    """
    names = [re.sub(r"\s*\(.*", "", _PART.split(part)[0]).strip() for part in text.split(";")]
    return list(dict.fromkeys(name for name in names if name))


def _unknown(verdict: Verdict) -> Claim:
    """Stands in for a claim that is in no registry of these folders."""
    texts = dict.fromkeys(("source", "topic", "rule", "caveats"), "")
    same = {"id": verdict["claim"], "title": verdict["claim"], "question": verdict["claim"]}
    more = {"reported": verdict["reported"], "origin": "beyond", "kind": "statistical"}
    rest = {"experiment": verdict["experiment"], "headline": False, "thresholds": {}}
    rest |= {"when": "", "why": "", "amended": False, "second": False}
    if verdict["status"] in ("exact", "fails"):
        more["kind"] = "exact"
    return {**texts, **same, **more, **rest}


def _facts(
    page: Content, cells: list[StoredCell], failed: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """The line of small print under the title: what was run, on what, with which versions."""
    specs = [cell.spec for cell in cells]
    versions = {
        name: sorted({spec["versions"][name] for spec in specs if name in spec["versions"]})
        for name in ("gammabeta", "torch", "python")
    }
    count = f"{number(len(cells))} finished" + (f", {len(failed)} failed" if failed else "")
    decided = sum(bool(claim["judged"]) for claim in page.claims)
    facts = [
        ("Run folders", _join(run["name"] for run in page.runs)),
        ("Cells", count),
        ("Claims", f"{decided} of {len(page.claims)} judged here"),
        ("Data", _join(sorted({spec["data"]["name"] for spec in specs}))),
        ("Budget", _join(sorted({spec["budget"] for spec in specs}))),
        ("Versions", _join(f"{name} {_join(found)}" for name, found in versions.items() if found)),
        ("Code", _join(sorted({spec["code"] for spec in specs}))),
    ]
    return [(name, text) for name, text in facts if text]


def _sections(
    page: Content,
    cells: list[StoredCell],
    failed: list[dict[str, Any]],
    protocols: Mapping[str, str],
) -> list[Section]:
    for place, figure in enumerate(page.figures):
        figure["place"] = place  # where the page's script finds its numbers
        name = f"fig-{figure['experiment']}-{figure['id']}"
        used = [old.get("anchor") for old in page.figures]
        figure["anchor"] = f"{name}-{place}" if name in used else name
    by_cell: dict[str, list[StoredCell]] = {}
    for cell in cells:
        by_cell.setdefault(cell.spec["experiment"], []).append(cell)
    present = {*by_cell, *(verdict["experiment"] for verdict in page.verdicts)}
    present |= {item["spec"]["experiment"] for item in failed}
    present |= {figure["experiment"] for figure in page.figures}
    registered = [claim["experiment"] for claim in page.claims if claim["experiment"] in present]
    sections = []
    for name in dict.fromkeys([*registered, *sorted(present)]):
        claims = [claim for claim in page.claims if claim["experiment"] == name]
        verdicts = [verdict for verdict in page.verdicts if verdict["experiment"] == name]
        broken = [item for item in failed if item["spec"]["experiment"] == name]
        specs = [cell.spec for cell in by_cell.get(name, [])] + [item["spec"] for item in broken]
        texts = claims or [verdict["text"] for verdict in verdicts]
        for verdict in verdicts:
            verdict["by_seed"] = _by_seed(verdict, by_cell.get(name, []))
        sections.append(
            Section(
                id=name,
                question=texts[0]["question"] if texts else name,
                verdicts=verdicts,
                unjudged=[claim for claim in claims if not claim["judged"]],
                figures=[figure for figure in page.figures if figure["experiment"] == name],
                protocol=[part for part in protocols.get(name, "").split("\n\n") if part.strip()],
                cells=by_cell.get(name, []),
                failed=[_failure(item) for item in broken],
                reproduce=_reproduce(name, specs),
                took=_took(specs),
                dispute=_dispute(page, verdicts),
                code=_code(name),
                cite=_cite(name, specs),
            )
        )
    return sections


def _by_seed(verdict: Verdict, cells: Sequence[StoredCell]) -> list[str]:
    """The parts of a verdict whose numbers stand in the rows, one a seed.

    Rows of kind "value" hold them, by "cell"; they count where they give the part's n and effect.
    """
    found: dict[str, dict[int, float]] = {}
    for cell in cells:
        spec = cell.spec
        if spec["budget"] == verdict["budget"] and spec["seed"] < CHOSE:
            for row in cell.rows:
                value, name = row.get("value"), row.get("cell")
                if row.get("kind") == "value" and is_number(value) and isinstance(name, str):
                    found.setdefault(name, {})[spec["seed"]] = float(str(value))
    names = []
    for part in verdict["cells"]:
        own, effect = list(found.get(str(part["name"]), {}).values()), part.get("effect")
        if len(own) > 1 and len(own) == part.get("n") and is_number(effect):
            near = 1e-6 * max(map(abs, own))
            if abs(sum(own) / len(own) - float(str(effect))) <= near:
                names.append(part["name"])
    return list(dict.fromkeys(names))


def _failure(item: Mapping[str, Any]) -> dict[str, Any]:
    spec = item["spec"]
    lines = [line for line in item["error"].splitlines() if line.strip()]
    raised = [line for line in lines if not line.startswith((" ", "Traceback"))]
    arm = _join(f"{key} {number(value)}" for key, value in spec["arm"].items())
    return {
        "name": f"{arm}, seed {spec['seed']}, {spec['data']['name']}, budget {spec['budget']}",
        "line": (raised or lines or ["no error text was kept"])[0][:300],
        "error": item["error"],
    }


def _reproduce(name: str, specs: list[dict[str, Any]]) -> list[str]:
    """The commands that make these cells again, one for each budget and data set."""
    made = Counter((spec["budget"], spec["data"]["name"]) for spec in specs)
    return [
        f"gammabeta study run {name} --{'variant' if budget in VARIANTS else 'budget'} {budget} "
        f"--data {data} --out runs/{name}"
        for budget, data in made
    ]


def _took(specs: list[dict[str, Any]]) -> list[str]:
    """What the cells of each command took, where all of them tell it; kept rows do not."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for spec in specs:
        own = seconds.setdefault((spec["budget"], spec["data"]["name"]), [])
        own.append(float(spec.get("cpu_seconds", 0)))
    return [
        f"Took {number(sum(own) / 60)} CPU minutes, all cells together." if all(own) else ""
        for own in seconds.values()
    ]


def _code(name: str) -> list[tuple[str, list[str]]]:
    """The file of an experiment and its functions with their lines; none for a foreign one."""
    file = Path(gammabeta.__file__).parent / "studies" / f"{name.replace('-', '_')}.py"
    if not file.is_file():
        return []
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lines = {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}
    shown = [f"{at}, line {lines[at]}" for at in ("measure", "judge", "figures") if at in lines]
    return [(f"gammabeta/studies/{file.name}", shown)]


def _cite(name: str, specs: Sequence[Mapping[str, Any]]) -> str:
    """A line to cite: what was run, on what, by which code."""
    made = {
        "version": sorted({spec["versions"].get("gammabeta", "") for spec in specs} - {""}),
        "data": sorted({PLACES.get(spec["data"]["name"], spec["data"]["name"]) for spec in specs}),
        "budget": sorted({spec["budget"] for spec in specs}),
        "code": sorted({spec["code"] for spec in specs}),
    }
    told = [f"experiment “{name}”", *made["data"]]
    told += [f"budget {_join(made['budget'])}"] if made["budget"] else []
    told += [f"code {_join(made['code'])}"] if made["code"] else []
    version = _join(made["version"]) or gammabeta.__version__
    return f"The gammabeta developers: gammabeta {version}, {', '.join(told)}."


def _dispute(page: Content, verdicts: list[Verdict]) -> list[tuple[str, str]]:
    """For each verdict a sentence and the command that judges it by another threshold."""
    found: dict[str, tuple[str, str]] = {}
    for verdict in verdicts:
        thresholds = verdict["text"]["thresholds"]
        key = "delta" if "delta" in thresholds else next(iter(sorted(thresholds)), None)
        if key is None or not is_number(thresholds[key]):
            continue
        harder = verdict["status"] == "supported"
        value = thresholds[key] * (2 if harder else 0.5)
        claim = shlex.quote(f"{verdict['claim']}.{key}={value:.4g}")
        run = shlex.quote(verdict["run"])
        asked = "twice as large" if harder else "half as large"
        found[verdict["claim"]] = (
            f"{verdict['claim']}, {key} {asked} ({value:.4g} in place of {thresholds[key]:.4g}):",
            f"gammabeta study judge {run} --set {claim}",
        )
    return list(found.values())


def columns(cells: Sequence[StoredCell]) -> dict[str, Any]:
    """The rows of an experiment's cells as columns: names, one list of values per name.

    A column that a row does not have holds None there. "cell" is the name of the cell that made a
    row, where rows have no column "cell" of their own: arm, seed, budget and data name it too.
    """
    flat = [(cell.path.name, row) for cell in cells for row in cell.flat()]
    own = any("cell" in row for _, row in flat)
    rows = [row if own else {**row, "cell": name} for name, row in flat]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {"names": names, "rows": len(rows), "values": [[r.get(n) for r in rows] for n in names]}
