"""Scripts and data inside one HTML file: nothing is fetched, nothing in the data can run.

Every script of the page is known when the page is made, so the content security policy names
each by its hash: a script that came in by any other way would not run even if the escaping of
the data failed.
"""

import base64
import gzip
import hashlib
import json
import math
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gammabeta.report import INSTALL


def asset(name: str) -> str:
    """The text of one of the page's own files."""
    return files("gammabeta.report").joinpath(name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """The JavaScript of the installed plotly package, found without importing the package.

    Raises ImportError with the install command where the package or its script is missing.
    """
    spec = find_spec("plotly")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        script = Path(place) / "package_data" / "plotly.min.js"
        if script.is_file():
            return script.read_text(encoding="utf-8")
    raise ImportError(INSTALL)


def plotly_license() -> str:
    """The license text that came with plotly; it has to travel with the script."""
    try:
        package = distribution("plotly")
    except PackageNotFoundError:
        raise ImportError(INSTALL) from None
    for file in package.files or ():
        if file.name.upper().startswith("LICENSE") and ".dist-info" in str(file):
            text = file.locate()
            return Path(str(text)).read_text(encoding="utf-8")
    return "MIT License, copyright Plotly, Inc.; see the comment at the head of the script."


def script_text(source: str) -> Markup:
    """Program text as the content of a <script> element.

    Raises ValueError where the text could end its element early. Line ends become "\\n", as a
    browser reads them, so that the hash in the policy fits.
    """
    text = source.replace("\r\n", "\n").replace("\r", "\n")
    lower = text.lower()
    for mark in ("</script", "<script", "<!--"):
        if mark in lower:
            raise ValueError(
                f"a script of the page must not contain {mark!r}, which ends or nests its "
                "element; another version of plotly may not"
            )
    return Markup(text)


def policy(scripts: list[str]) -> str:
    """The content security policy: no network, only these scripts, styles of the page."""
    hashes = " ".join(
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def data_text(value: Any) -> Markup:
    """JSON as the content of a <script type="application/json"> element.

    Only ASCII comes out (U+2028 and lone surrogates are escaped by JSON itself), and the three
    characters that mean something to HTML are written as JSON escapes.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def packed(value: Any) -> str:
    """JSON, gzipped, in base64: for tables too long to stand in the page as they are."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def rounded(value: Any, digits: int = 6) -> Any:
    """The same JSON value with its floats at `digits` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value
