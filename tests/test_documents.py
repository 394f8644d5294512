"""Every block of the documents runs, what they link to exists, and their tables are made.

After a change of verdicts or of stored times: python -m tests.test_documents
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import _page
from gammabeta.studies import _published_figures

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
README = ROOT / "README.md"

FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.S | re.M)
# a block that is a file, or a part of one, begins with its name
FILE = re.compile(r"^# (src/\S+)\n(.*)", re.S)
PATCH = re.compile(r"^\+\+\+ (\S+)\n(.*)", re.S)


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, text) of each block of a document."""
    return [(found[2], found[3]) for found in FENCE.finditer((ROOT / name).read_text())]


def adds_files(name: str) -> bool:
    return any(FILE.match(text) for _, text in blocks(name))


# --- running a document ---------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """What the documents' commands find where a reader would have it."""
    from gammabeta import _runs
    from gammabeta.studies import _claims

    (folder / "train.py").write_text("import torch\nbuild = lambda: torch.nn.BatchNorm1d(3)\n")
    (folder / "package").mkdir()
    (folder / "package" / "module.py").write_text("from train import build as factory\n")
    (folder / "results").mkdir()
    for kept in ("rules.json", "activations.jsonl.gz"):
        shutil.copy(ROOT / "results" / kept, folder / "results" / kept)
    (folder / "runs" / "small" / "cells").mkdir(parents=True)
    claims = {"schema": 1, "gammabeta": "0", "claims": _claims.public()}
    _runs.write_json(folder / "runs" / "small" / "claims.json", claims)


def commands(name: str) -> list[list[str]]:
    """The words of each `gammabeta` command in the blocks without a language."""
    lines = [line for lang, text in blocks(name) if not lang for line in text.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"gammabeta \S", line)]
    return [words[1:] for words in found]


def affordable(words: list[str]) -> bool:
    """Whether a command needs no minutes, no network, no commit and no shell's files."""
    if words[:2] == ["study", "run"]:
        return "tiny" in words
    keeps = words[:2] == ["study", "accept"] or (words[:2] == ["study", "judge"] and "-o" in words)
    trains = words[:2] == ["study", "verify"]
    return not keeps and not trains and words[0] != "--install-completion"


def play(name: str, folder: Path) -> None:
    """Run the Python blocks of a document one after the other, then its commands, in a folder."""
    import gammabeta
    from gammabeta.cli import app, main
    from gammabeta.studies import _demo

    os.chdir(folder)
    names: dict[str, object] = {"__name__": "document"}
    for language, text in blocks(name):
        if language == "python" and not FILE.match(text):
            exec(compile(text, name, "exec"), names)
    if not commands(name):
        return
    prepare(folder)
    short = partial(_demo.race, steps=40, seeds=2)
    here = str(
        folder / "src" / "gammabeta" / "__init__.py"
    )  # accepted rows are those of the folder
    for words in commands(name):
        app.parse_args(words, exit_on_error=False, print_error=False)
        if not affordable(words):  # these have tests of their own
            continue
        jobs = ["--jobs", "1"] if words[:2] == ["study", "run"] else []
        with (
            mock.patch.object(_demo, "race", short),
            mock.patch.object(gammabeta, "__file__", here),
            pytest.raises(SystemExit) as ended,
        ):
            main([*words, *jobs])
        findings = words[0] == "check" and ended.value.code == 1
        assert ended.value.code == 0 or findings, (name, words)


@pytest.mark.parametrize("name", [name for name in NAMES if not adds_files(name)])
def test_the_blocks_of_a_document_run_one_after_the_other(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    play(name, tmp_path)
    for module in ("train", "package", "package.module"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("name", [name for name in NAMES if adds_files(name)])
def test_what_a_recipe_adds_works_in_a_copy_of_the_sources(name, tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for language, text in blocks(name):
        if found := FILE.match(text):
            path = tmp_path / found[1]
            if language == "toml":
                path.write_text(f"{path.read_text()}\n{found[2]}")
            else:
                assert not path.exists(), f"{name} writes over {found[1]}"
                path.write_text(found[2])
        elif language == "diff" and (found := PATCH.match(text)):
            path, lines = tmp_path / found[1], found[2].splitlines()
            before, after = (
                "\n".join(line[1:] for line in lines if line[0] in signs) + "\n"
                for signs in (" -", " +")
            )
            assert path.read_text().count(before) == 1, f"{name}: {found[1]} has no {before!r}"
            path.write_text(path.read_text().replace(before, after))
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_documents", name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_block_is_code_that_runs_or_a_file_or_a_command_or_a_drawing():
    for name in NAMES:
        for language, text in blocks(name):
            assert language in ("", "python", "toml", "diff"), (name, language)
            if language in ("toml", "diff"):
                assert FILE.match(text) or PATCH.match(text), (name, text)


# --- links, targets, tables -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_links_between_documents_lead_somewhere(name):
    path = ROOT / name
    prose = FENCE.sub("", path.read_text())
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (path.parent / target).exists(), f"{name} links to {target}"
    for target in re.findall(r"`((?:examples|docs|src|tests|benchmarks)/[\w./-]+)`", prose):
        assert (ROOT / target).exists(), f"{name} names {target}"


def test_every_page_is_in_the_index_and_every_lecture_too():
    index = (ROOT / "docs" / "README.md").read_text()
    for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("examples/lecture/*.py")):
        assert path.name == "README.md" or path.name in index, path.name


def test_the_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    for name in NAMES:
        for language, text in blocks(name):
            for target in re.findall(r"^(?:\w+=\S+ )*make (\w+)", "" if language else text, re.M):
                assert f"\n{target}:" in makefile, f"{name}: make {target}"


def test_the_page_on_speed_is_made_from_the_stored_results():
    assert _page.PAGE.read_text() == _page.page(*map(_page.stored, ("kernels", "end_to_end")))


def test_the_tables_of_the_readme_are_those_of_verdicts_and_stored_times():
    assert README.read_text() == with_tables(README.read_text())


def test_a_table_of_the_readme_follows_what_it_is_made_from(monkeypatch):
    text = README.read_text()
    stored = _page.stored("end_to_end")
    monkeypatch.setattr(_page, "stored", lambda name: stored if name == "end_to_end" else KERNELS)
    stored["ms"]["ours"] = 123.45
    assert "123.5 ms" in with_tables(text)
    assert with_tables(text) != text


KERNELS = _page.stored("kernels")


def with_tables(text: str) -> str:
    """The README with its tables as they should be."""
    for name, lines in (
        ("picture", picture()),
        ("headline", headline()),
        ("published", published()),
        ("speed", speed()),
    ):
        start, end = f"<!-- {name}: python -m tests.test_documents -->\n", "<!-- end -->"
        head, rest = text.split(start)
        inside = ["", *lines, "", end] if lines else [end]
        text = head + start + "\n".join(inside) + rest.split(end, 1)[1]
    return text


def picture() -> list[str]:
    """The report's first screen, where `make picture` has drawn it."""
    if not (ROOT / "docs" / "report.png").exists():
        return []
    alt = "The first screen of the report: the headline claims with both verdicts and effects"
    return [f"[![{alt}](docs/report.png)](docs/verdicts.md)"]


def headline() -> list[str]:
    """The headline claims with what docs/verdicts.md says of them, the larger budget first."""
    from gammabeta.studies._claims import claims

    page = (ROOT / "docs" / "verdicts.md").read_text()
    rows: dict[str, list[str]] = {}
    for line in page.splitlines():
        if found := re.match(r"\| \[([\w-]+)\]\(#", line):
            rows[found[1]] = [cell.strip() for cell in line.strip("| ").split(" | ")]
    lines = ["| question | as published | fair | effect, fair |", "|---|---|---|---|"]
    amended = 0
    for claim in claims().values():
        if not claim.headline:
            continue
        if claim.id not in rows:
            lines.append(f"| {claim.question} | – | – | no accepted rows yet |")
            continue
        link, published, fair, effect, interval, unit, n = rows[claim.id][:7]
        if "amended after data" in rows[claim.id][-1]:
            amended += 1
            fair += " ¹"
        anchor = link[link.index("(") + 1 : link.index(")")]
        shown = "–" if effect == "–" else f"{effect} ({interval}) {unit}, n = {n}"
        question = f"[{claim.question}](docs/verdicts.md{anchor})"
        lines.append(f"| {question} | {published} | {fair} | {shown} |")
    if amended:
        why = "the rule was changed after the first row; protocols say why"
        lines += ["", f"¹ Amended after data: {why} (`gammabeta study explain CLAIM`)."]
    return lines


@cache  # three tables are made, from the same rows
def published() -> list[str]:
    """How many numbers of the MNIST study come again, and at which learning rates."""
    shown = _published_figures.of_runs([ROOT / "results"])
    agree, compared, points = shown.best()
    by_rate: dict[str, list[str]] = {}
    for figure in shown.figures:
        rate = "an open one" if figure.rate is None else f"{figure.rate:g}"
        by_rate.setdefault(rate, []).append(figure.figure.removeprefix("fig-"))
    rates = "; ".join(f"Figs. {', '.join(names)}: {rate}" for rate, names in by_rate.items())
    return [
        f"Of {points} numbers that can be read off the MNIST study's figures the runs reach",
        f"{compared}; {agree} agree (±0.01 in accuracy, ±5 % in steps, ±12 % in magnitude),",
        "each figure at one learning rate, where the study's code has 0.01 for all:",
        f"{rates}. `gammabeta study show --published results` has every number.",
    ]


def speed() -> list[str]:
    """The whole step of a network first, then layers; PyTorch beside each."""
    whole, kernels = _page.stored("end_to_end"), _page.stored("kernels")
    threads = whole["threads_used"]
    lines = [
        f"Training steps on the CPU ({whole['device']}, {threads} threads, "
        f"torch {whole['versions']['torch']}),",
        "forward and backward, all Python included; a ratio above 1 is faster than PyTorch.",
        "Means are geometric; worst is the lower end of the interval of the slowest case.",
        "[docs/speed.md](docs/speed.md) has every case, the bars that are not met too,",
        "[docs/memory.md](docs/memory.md) what a step keeps.",
        "",
        "| | PyTorch | gammabeta | ratio (90 % interval) |",
        "|---|---|---|---|",
    ]
    for name, theirs, ours in (
        ("ResNet-20, 64 images of 32×32, the whole step", "PyTorch", "ours"),
        ("the same under `torch.compile`", "PyTorch, compiled", "ours, compiled"),
    ):
        key = "PyTorch/ours" if ours == "ours" else "compiled: PyTorch/ours"
        middle, low, high = whole["ratios"][key]
        lines.append(
            f"| {name} | {whole['ms'][theirs]:.1f} ms | {whole['ms'][ours]:.1f} ms "
            f"| {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    for row in kernels["rows"]:
        shape = (tuple(row["shape"]), row["layout"], row["dtype"])
        if shape in (
            ((32, 64, 56, 56), "contiguous", "float32"),
            ((32, 512, 14, 14), "contiguous", "float32"),
            ((64, 100), "rows", "float32"),
        ):
            middle, low, high = row["ratios"]["eager/ours"]
            size = "×".join(map(str, row["shape"]))
            lines.append(
                f"| a layer with ReLU, {size} | {row['ms']['eager']:.3g} ms "
                f"| {row['ms']['ours']:.3g} ms | {middle:.2f} ({low:.2f} to {high:.2f}) |"
            )
    count = sum(row["dtype"] == "float32" for row in kernels["rows"])
    for name, key in (
        ("a layer with ReLU", "float32: BatchNorm + ReLU, all"),
        ("a layer alone", "float32: BatchNorm alone"),
        ("inference", "float32: inference"),
    ):
        found = kernels["summary"][key]
        lines.append(
            f"| {name}, {count} shapes | | | mean {found['mean']:.2f}, worst {found['worst']:.2f} |"
        )
    return lines


if __name__ == "__main__":
    if sys.argv[1:]:
        play(sys.argv[1], Path.cwd())
    else:
        README.write_text(with_tables(README.read_text()))
