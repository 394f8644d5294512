"""Every Python block of the documents runs, and what they link to exists."""

import re
from pathlib import Path

import pytest

from benchmarks import _page

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


@pytest.mark.parametrize("name", NAMES)
def test_the_python_blocks_of_a_document_run_one_after_the_other(name, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.S | re.M)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "document"}
    for block in blocks:
        exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize("name", NAMES)
def test_links_between_documents_lead_somewhere(name):
    path = ROOT / name
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (path.parent / target).exists(), f"{name} links to {target}"


def test_the_page_on_speed_is_made_from_the_stored_results():
    assert _page.PAGE.read_text() == _page.page(*map(_page.stored, ("kernels", "end_to_end")))


def test_the_commands_of_the_readme_exist():
    from gammabeta.cli import app

    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.M):
        assert f"\n{target}:" in makefile
    commands = re.findall(r"^gammabeta ((?:study|data) [a-z]+|[a-z]+)", text, re.M)
    assert commands
    for command in commands:
        found, _, rest = app.parse_commands(command.split())
        assert list(found) == command.split(), f"README: there is no `gammabeta {command}`"
        assert not rest
