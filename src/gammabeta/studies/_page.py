"""The verdicts as one Markdown page: tables first, then each answer in words."""

from collections.abc import Iterable, Mapping, Sequence

from gammabeta._runs import StoredCell
from gammabeta.studies._claims import claims
from gammabeta.studies._experiments import VARIATIONS
from gammabeta.studies._headline import TITLES
from gammabeta.studies._holds import holding, missing
from gammabeta.studies._judge import Judged, Multiplicity
from gammabeta.studies._provenance import Rule, digest
from gammabeta.studies._verdict import Verdict

_HEAD = """\
# Verdicts

Made from the rows in `results/` by a command, which gives this page again without training; a test
does so and compares. Do not edit it.

    gammabeta study judge results -o docs/verdicts.md

A verdict holds for its place: MNIST, the network and the budget that its answer names (`small`; or
`full`, the source's own numbers of steps in what is published, the fair part as at `small`). *As
published* is the source's own setting and way of evaluation, *fair* gives each network its own best
learning rate; they may differ, and that is the finding. *Half-width* is half the 95 % interval:
planned from a pilot, then reached. *Rule* is the commit in which the claim's rule last changed;
**amended after data** stands, for ever, where that was after the first of its rows was made.

A claim that 16 seeds leave undecided gets a *second stage*, where it says that at most 128 would
decide it and is no headline claim: twice as many fresh seeds as that, judged alone, once. What the
second stage says stands here, and the first beside it. That rule was written after the first stage
was seen, and committed before any row of the second.

*Certainty* is A where a claim was proved or is an identity, or a counterexample to one was found; B
where the verdict of a headline claim holds in at least three of four variations; C where it does
not, or none was tried; D where it is undecided.
"""
_HOLDS = """\
The headline claims are run again, in four variations: with fresh seeds, as many as the accepted
rows have; with half and with twice the units (and channels) in each hidden layer; and on MNIST at
14 x 14, each image turned by up to 15 degrees, with noise (Gaussian, a tenth of the brightest
pixel). All else is as at `small`: the same steps, the same rules, as many seeds as each rule asks
for at least (5 or 8), and the learning rates, and the dropout, that the accepted rows chose:
nothing is searched again. The three that are no mere repetition run the fair part alone. A
verdict holds where the fair verdict has the same status; undecided counts as not holding. Fresh
seeds repeat the whole procedure, Holm's correction over the twelve claims included; the three
other variations, which have fewer seeds, try each claim alone.
"""
# Where two texts contradict each other, or one text itself: what is disputed, one side, the other.
DISPUTES = (
    ("Beside batch normalization, is dropout still needed?", "no-dropout", "bn-plus-dropout"),
    ("Does it work by less covariate shift?", "ics-reduced", "not-reduce-shift"),
    ("Does it need a steady distribution to work?", "keep-consistent", "noisy-bn"),
    ("Is it noise, or a smoother loss?", "reg-by-noise", "smoother"),
    ("Is it the learning rate, or more?", "bjorck-lr", "bn-speed"),
    ("Do gradients vanish, or explode?", "vanishing-depth", "mf-explosion"),
    ("Isometry by normalization, or by weights?", "jacobian-one", "mf-orthogonal"),
    ("Are weights limited, or bound to grow?", "weight-growth", "weight-pythagoras"),
    ("Are statistics of fewer images worse, or better?", "batch-small", "ghost-bn"),
)


def write(cells: Sequence[StoredCell], found: Judged, rules: Mapping[str, Rule]) -> str:
    """The whole page; of an experiment the verdicts of its largest budget."""
    parts = [_HEAD, _table(found.verdicts, rules)]
    parts.append(_decided(found.verdicts))
    if found.multiplicity is not None:
        parts.append(_multiplicity(found.multiplicity))
    if found.varied:
        parts.append(_variations(found))
    if disputed := _disputes(found.verdicts):
        parts.append(disputed)
    if found.surprises:
        parts.append("## What surprised\n")
        parts.append("\n".join(f"- {_plain(text)}" for text in found.surprises) + "\n")
    parts.append("## The answers\n")
    parts += [_answer(verdict, rules.get(verdict.claim)) for verdict in found.verdicts]
    if left := _without_experiment():
        parts.append(left)
    parts.append(_made_by(cells))
    return "\n".join(parts)


def _table(verdicts: Iterable[Verdict], rules: Mapping[str, Rule]) -> str:
    known = claims()
    order = {claim: number for number, claim in enumerate(known)}
    rows = []
    for v in sorted(verdicts, key=lambda v: order.get(v.claim, len(order))):
        effect = "–" if v.effect is None else _number(v.effect)
        interval = "–" if v.ci is None else f"{_number(v.ci[0])} to {_number(v.ci[1])}"
        widths = f"{_size(v.planned_half_width)} / {_size(v.half_width)}"
        star = " *" if v.claim in known and known[v.claim].headline else ""
        columns = (
            f"[{v.claim}](#{v.claim.lower()}-{v.budget}){star}",
            v.published_status or "–",
            v.status,
            effect,
            interval,
            _plain(v.unit) or "–",
            f"{v.n}{' †' if v.stage > 1 else ''}",
            _size(v.delta),
            widths,
            _rule(v.claim, rules.get(v.claim)),
        )
        rows.append(f"| {' | '.join(columns)} |")
    head = (
        "| claim | as published | fair | effect | 95 % interval | unit | n | delta "
        "| half-width planned / reached | rule |\n" + "|---" * 10 + "|"
    )
    told = "\n\n\\* headline claim; † second stage: so many fresh seeds, judged alone\n"
    return "\n".join([head, *rows]) + told


def _variations(found: Judged) -> str:
    """Whether the headline verdicts come again."""
    known = claims()
    own = {v.claim: v for v in found.verdicts if v.claim in known and known[v.claim].headline}
    names = [name for name in VARIATIONS if any(name in by for by in found.varied.values())]
    lines = ["## Do the headline verdicts hold?\n", _HOLDS]
    heads = ("claim", "accepted", *(TITLES[name] for name in names), "holds in", "certainty")
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    agree: dict[str, int] = dict.fromkeys(names, 0)
    for claim, verdict in own.items():
        by = found.varied.get(claim, {})
        for name in names:
            agree[name] += by.get(name) == verdict.status
        held = f"{holding(verdict.status, by)} of {len(by)}"
        each = (by.get(name, "–") for name in names)
        lines.append(f"| {' | '.join((claim, verdict.status, *each, held, verdict.certainty))} |")
    told = "; ".join(f"{TITLES[name]} {count} of {len(own)}" for name, count in agree.items())
    absent = missing(dict.fromkeys(names, ""))
    return "\n".join(lines) + f"\n\nThe same verdict as the accepted rows{absent}: {told}.\n"


def _disputes(verdicts: Iterable[Verdict]) -> str:
    """Pairs of claims that cannot both be the whole truth, and which one the runs support."""
    known, own = claims(), {v.claim: v for v in verdicts}
    rows = []
    for question, *sides in DISPUTES:
        if not all(side in own for side in sides):
            continue
        holds = [side for side in sides if own[side].status in ("supported", "exact")]
        said = [f"{_plain(known[side].title)} **{own[side].status}** ({side})" for side in sides]
        open_ = any(own[side].status == "inconclusive" for side in sides)
        none = "undecided" if open_ else "neither"
        answer = {0: none, 1: "".join(holds), 2: "both"}[len(holds)]
        rows.append(f"| {question} | {said[0]} | {said[1]} | {answer} |")
    if not rows:
        return ""
    head = "| disputed | one says | another says | the runs support |\n|---|---|---|---|"
    return "\n".join(["## Where the texts contradict each other\n", head, *rows]) + "\n"


def _rule(claim: str, rule: Rule | None) -> str:
    if rule is None:
        return "–"
    commit = f"`{rule.commit[:10]}`" if rule.commit else "no history"
    changed = claim in claims() and digest(claims()[claim]) != rule.digest
    return f"{commit}, **amended after data**" if rule.amended or changed else commit


def _decided(verdicts: Iterable[Verdict]) -> str:
    """How many claims are decided, and how precisely."""
    known = claims()
    own = [v for v in verdicts if v.claim in known and known[v.claim].kind == "statistical"]
    decided = [v for v in own if v.status in ("supported", "refuted")]
    sized = [(v.half_width, v.delta) for v in decided if v.delta and v.half_width is not None]
    fine = sum(width <= delta / 2 for width, delta in sized)
    count = {s: sum(v.status == s for v in own) for s in ("mixed", "inconclusive")}
    share = 100 * len(decided) / max(len(own), 1)
    return (
        f"Of {len(own)} statistical claims {len(decided)} are decided in the fair setting "
        f"({share:.0f} %), {sum(v.stage > 1 for v in decided)} of them by a second stage; "
        f"{count['mixed']} are mixed, {count['inconclusive']} undecided. Where the rule has a "
        f"delta, {fine} of {len(sized)} decided effects are known to half of it: the others are "
        "far from their limit, or spread too much for 16 seeds.\n"
    )


def _multiplicity(found: Multiplicity) -> str:
    lines = [
        "## Many claims at once\n",
        f"{found.supported} claims are supported in the fair setting; at most "
        f"{found.expected_false:.2f} false ones are to be expected. {found.how}\n",
        "| headline claim | p | p after Holm |",
        "|---|---|---|",
    ]
    for claim, (p, adjusted) in found.family.items():
        shown = [("–" if value is None else f"{value:.2g}") for value in (p, adjusted)]
        lines.append(f"| {claim} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines) + "\n"


def _answer(verdict: Verdict, rule: Rule | None) -> str:
    known = claims()
    question = known[verdict.claim].question if verdict.claim in known else verdict.claim
    lines = [f"### {verdict.claim} {verdict.budget}\n", f"{_plain(question)}\n"]
    lines.append(f"{_plain(verdict.sentence)}\n")
    if verdict.reported:
        lines.append(f"- Reported: {_plain(verdict.reported)}")
    if verdict.certainty:
        told = f"- Certainty: {verdict.certainty}. {_plain(verdict.variations)}"
        lines.append(told.rstrip())
    if rule is not None:
        changed = f" of {rule.changed}" if rule.changed else ""
        lines.append(
            f"- Rule: {_rule(verdict.claim, rule)}{changed}; oldest row {rule.rows_since}."
        )
    lines += [f"- {_plain(note)}" for note in verdict.notes]
    return "\n".join(lines) + "\n"


def _without_experiment() -> str:
    """The claims that cannot be judged yet."""
    left = [claim for claim in claims().values() if claim.experiment is None]
    if not left:
        return ""
    return "\n".join(
        [
            "## Without an experiment yet\n",
            f"{len(left)} of {len(claims())} claims are left for later: all of them go beyond the "
            "texts that the registry began with, and no claim of those rests on them. Their rules "
            "are fixed (`gammabeta study explain ID`).\n",
            *(f"- {claim.id}: {_plain(claim.question)} {_plain(claim.source)}." for claim in left),
            "",
        ]
    )


def _made_by(cells: Sequence[StoredCell]) -> str:
    lines = ["## The rows\n", "| experiment | budget | cells | rows | code | versions |"]
    lines.append("|---" * 6 + "|")
    groups: dict[tuple[str, str, str, str], list[StoredCell]] = {}
    for cell in cells:
        spec = cell.spec
        versions = ", ".join(f"{name} {text}" for name, text in sorted(spec["versions"].items()))
        key = (spec["experiment"], spec["budget"], spec["code"], versions)
        groups.setdefault(key, []).append(cell)
    for (experiment, budget, code, versions), group in sorted(groups.items()):
        count = sum(len(cell.rows) for cell in group)
        columns = (experiment, budget, f"{len(group)}", f"{count}", f"`{code}`", versions)
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is, on one line."""
    folded = " ".join(text.split())
    for sign in "\\`*_<>|[]":
        folded = folded.replace(sign, f"\\{sign}")
    return folded


def _number(value: float) -> str:
    """A signed number of three digits, with a true minus sign."""
    return f"{value:+.3g}".replace("-", "−")


def _size(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
