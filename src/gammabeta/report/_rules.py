"""Which rules were fixed before the rows that they judge, as the file beside kept rows tells."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gammabeta._runs import RunError, read_json
from gammabeta.report._marks import number

FILE = "rules.json"
FIXED, AMENDED = "fixed", "amended"


def read_rules(path: Path, claims: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Whether the rule of each claim is "fixed" before its rows or "amended" after them.

    A rule that has changed since its rows were accepted is amended as well. Empty where the folder
    has no such file; a claim whose rule has no known date is left out.

    Raises RunError where the file is not what it has to be.
    """
    file = (path if path.is_dir() else path.parent) / FILE
    if not file.is_file():
        return {}
    rules = read_json(file, "the rules").get("rules")
    if not isinstance(rules, dict) or not all(map(_fine, rules.values())):
        raise RunError(
            f"{file}: rules: expected an object with digest, rows_since, changed and amended for "
            "each claim, got another. Take the file from where it was made."
        )
    now = {claim["id"]: digest(claim) for claim in claims}
    found = {}
    for claim, rule in rules.items():
        if rule["amended"] or now.get(claim, rule["digest"]) != rule["digest"]:
            found[claim] = AMENDED
        elif rule["changed"] is not None and rule["changed"] <= rule["rows_since"]:
            found[claim] = FIXED
    return found


def _fine(rule: Any) -> bool:
    if not isinstance(rule, dict) or not isinstance(rule.get("amended"), bool):
        return False
    texts = all(isinstance(rule.get(key), str) for key in ("digest", "rows_since"))
    return texts and (rule.get("changed") is None or isinstance(rule["changed"], str))


def digest(claim: Mapping[str, Any]) -> str:
    """16 hex digits for the words and the numbers of a claim's rule, as the file has them."""
    numbers = {str(key): float(value) for key, value in claim["thresholds"].items()}
    text = json.dumps([" ".join(claim["rule"].split()), numbers], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def told(claims: Iterable[Mapping[str, Any]]) -> str:
    """One sentence: how many of the rules were fixed beforehand, and how many amended."""
    known = [claim for claim in claims if claim["when"]]
    late = [claim for claim in known if claim["when"] == AMENDED]
    if not known:
        return ""
    early = f"{number(len(known) - len(late))} of {number(len(known))} rules were"
    if not late:
        return f"{early} fixed before the first of their rows was made."
    leading = sum(claim["headline"] for claim in late)
    share = "all" if leading == len(late) else number(leading)
    which = f" ({share} of headline claims)" if leading else ""
    return (
        f"{early} fixed before the first of their rows was made; {number(len(late))}{which} "
        f"{'was' if len(late) == 1 else 'were'} amended after data and "
        f"{'is' if len(late) == 1 else 'are'} marked."
    )
