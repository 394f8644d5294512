"""Where a claim's rule comes from: the commit that last changed it, and whether rows came first.

A rule is the text `rule` of a claim and its thresholds. `results/rules.json` holds what was found
when rows were accepted or verdicts written, so that an installed package, without git, knows it
too. A rule that was changed after the first row is marked for ever.
"""

import datetime
import hashlib
import json
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gammabeta import _runs
from gammabeta._runs import RunError
from gammabeta.studies import _claims

FILE = "rules.json"
_REGISTRY = Path(_claims.__file__).with_name("claims.toml")


class Rule(NamedTuple):
    """One claim's rule: its digest, its commit (None: no history at hand), its date.

    `rows_since` is the day and time of the oldest accepted row; `amended`: the rule is younger.
    """

    digest: str
    commit: str | None
    changed: str | None
    rows_since: str
    amended: bool


def digest(claim: _claims.Claim) -> str:
    """16 hex digits for the words and the numbers of a claim's rule."""
    return _digest(claim.rule, claim.thresholds)


def _digest(rule: object, thresholds: object) -> str:
    numbers = thresholds if isinstance(thresholds, Mapping) else {}
    plain = {str(key): float(value) for key, value in numbers.items()}
    text = json.dumps([" ".join(str(rule).split()), plain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def commits(ids: Iterable[str], registry: Path = _REGISTRY) -> dict[str, tuple[str, int]]:
    """For each claim the commit that made its rule what it is, with the author's time.

    Empty where there is no git or no history of the registry.

    Raises:
        ValueError: the rule of a claim is not committed yet.
    """
    history = _git(registry, "log", "--format=%H %at", "--", registry.name)
    if not history:
        return {}
    now = _rules(registry.read_text(encoding="utf-8"))
    open_ids = {name for name in ids if name in now}
    found: dict[str, tuple[str, int]] = {}
    for line in history.splitlines():
        commit, _, seconds = line.partition(" ")
        then = _rules(_git(registry, "show", f"{commit}:./{registry.name}") or "")
        same = {name for name in open_ids if then.get(name) == now[name]}
        if missing := sorted(open_ids - same - found.keys()):
            raise ValueError(
                f"A rule must be committed before rows are accepted or verdicts written; that of "
                f"{missing[0]} is not. Commit {registry.name} first."
            )
        open_ids = same
        found |= dict.fromkeys(same, (commit, int(seconds)))
        if not open_ids:
            break
    return found


def _rules(text: str) -> dict[str, str]:
    """Digests of the rules of any state of the registry, also of one that is refused today."""
    try:
        tables = tomllib.loads(text).get("claim", [])
        return {t["id"]: _digest(t.get("rule", ""), t.get("thresholds", {})) for t in tables}
    except (tomllib.TOMLDecodeError, TypeError, KeyError, ValueError, AttributeError):
        return {}


def _git(file: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *words],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
    except OSError:
        return None  # no git
    return done.stdout if done.returncode == 0 else None


def recorded(folder: Path) -> dict[str, Rule]:
    """What rules.json in a folder of kept rows says; empty where there is none.

    Raises:
        RunError: the file is not what it has to be.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    value = _runs.read_json(path, "the rules")
    rules = value.get("rules")
    fields = Rule.__annotations__.keys()
    if not isinstance(rules, dict) or not all(
        isinstance(rule, dict) and rule.keys() == fields and _fine(rule) for rule in rules.values()
    ):
        raise RunError(
            f"{path}: rules: expected an object of {', '.join(fields)} for each claim, got "
            "another. Take the file from where it was made."
        )
    return {str(claim): Rule(**rule) for claim, rule in rules.items()}


def _fine(rule: Mapping[str, Any]) -> bool:
    texts = all(isinstance(rule[key], str) for key in ("digest", "rows_since"))
    open_texts = all(rule[k] is None or isinstance(rule[k], str) for k in ("commit", "changed"))
    return texts and open_texts and isinstance(rule["amended"], bool)


def record(
    folder: Path,
    ids: Iterable[str],
    oldest_row: float | None = None,
    registry: Path = _REGISTRY,
) -> dict[str, Rule]:
    """Bring rules.json up to date for some claims, and give all of it.

    Args:
        folder: that of the kept rows.
        ids: claims whose rows are kept there.
        oldest_row: when the oldest of new rows was made; None: there are no new ones.

    Raises:
        ValueError: a rule is not committed yet; RunError: the file is damaged.
    """
    rules = recorded(folder)
    known = _claims.claims()
    wanted = [name for name in ids if name in known]
    made = commits(wanted, registry)
    for name in wanted:
        before, now = rules.get(name), digest(known[name])
        if before is None and oldest_row is None:
            continue  # no rows were ever accepted for it
        commit, changed = made.get(name, (None, None))
        since = _date(oldest_row) if oldest_row is not None else ""
        if before is not None:
            since = min(filter(None, (since, before.rows_since)))
            if before.digest == now and commit is None:
                commit, changed_text = before.commit, before.changed
            else:
                changed_text = _date(changed) if changed is not None else None
        else:
            changed_text = _date(changed) if changed is not None else None
        amended = (before is not None and (before.amended or before.digest != now)) or (
            changed_text is not None and changed_text > since
        )
        rules[name] = Rule(now, commit, changed_text, since, amended)
    plain = {name: rules[name]._asdict() for name in sorted(rules)}
    value = {"schema": _runs.SCHEMA, "rules": plain}
    if rules != recorded(folder):
        _runs.write_json(folder / FILE, value)
    return rules


def _date(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
