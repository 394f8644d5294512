"""The house stays as docs/architecture.md draws it: imports, public names, packages."""

import ast
import doctest
import importlib
import inspect
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import gammabeta

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "gammabeta"
SNAPSHOT = ROOT / "tests" / "public_names.txt"

# A module imports only from rows below its own; rooms of one row never import each other.
ROWS = [
    {"__main__"},
    {"cli"},
    {"_terminal"},
    {"report", "studies"},
    {"_check"},
    {"probes", "models"},
    {"_population"},
    {"_sites"},
    {"_guard"},
    {"layers"},
    {"ops"},
    {"moments", "_runs"},
]


def room_of(module: str) -> str:
    if module.startswith("gammabeta.models._population"):
        return "_population"  # what probes and models share
    return module.split(".")[1] if "." in module else ""


def row_of(room: str) -> int:
    found = [row for row, rooms in enumerate(ROWS) if room in rooms]
    assert found, f"the room {room!r} has no row in ROWS: place it there and in the architecture"
    return found[0]


def modules() -> list[str]:
    paths = sorted(SRC.rglob("*.py"))
    names = [path.relative_to(SRC.parent).with_suffix("").as_posix() for path in paths]
    return [name.replace("/", ".").removesuffix(".__init__") for name in names]


def imports_of(module: str) -> set[str]:
    path = SRC.parent / module.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write the import in full, without leading dots"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "gammabeta"}


def breaches(module: str, imported: set[str]) -> list[str]:
    """What of ``imported`` a module of that name must not import."""
    room = room_of(module)
    wrong = []
    for name in imported:
        other = room_of(name)
        if other in ("__version__", "") or room == "" or other == room:
            continue
        if row_of(other) <= row_of(room):
            wrong.append(f"{module} (row {row_of(room)}) imports {name} (row {row_of(other)})")
    if room == "layers":
        public = {n for n in imported if room_of(n) == "layers" and n.split(".")[2][0] != "_"}
        wrong += [f"{module} imports {name}, another public file of layers" for name in public]
    return wrong


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_rows_below_its_own(module):
    assert breaches(module, imports_of(module)) == []


def test_the_rule_of_rows_sees_a_breach():
    assert breaches("gammabeta.ops._native", {"gammabeta.layers.batch_norm"})
    assert breaches("gammabeta.report.page", {"gammabeta.studies._claims"})
    assert breaches("gammabeta.layers.renorm", {"gammabeta.layers.batch_norm.BatchNorm1d"})
    assert not breaches("gammabeta.layers.renorm", {"gammabeta.layers._running.RunningMoments"})


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **env}, timeout=240
    )


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, gammabeta; print(*sys.modules)"
    loaded = set(run(sys.executable, "-c", code).stdout.split())
    heavy = {"torch", "numpy", "scipy", "joblib", "sklearn", "plotly", "cyclopts", "rich", "numba"}
    assert "gammabeta" in loaded
    assert not loaded & heavy


def test_the_layers_import_no_library_but_torch():
    code = "import torch, sys; a = set(sys.modules); import gammabeta as gb; gb.BatchNorm2d(3)\n"
    code += "print(*{m.split('.')[0] for m in set(sys.modules) - a})"
    assert set(run(sys.executable, "-c", code).stdout.split()) <= {"gammabeta"}


def test_help_answers_in_under_half_a_second():
    times = []
    for _ in range(5):
        before = os.times()
        done = run(sys.executable, "-m", "gammabeta", "--help")
        after = os.times()
        # processor time: what else runs on the machine is not the program's doing
        times.append(sum(after[2:4]) - sum(before[2:4]))
        assert done.returncode == 0, done.stderr
        assert "study" in done.stdout
    assert min(times) < 0.5, times


def public_names() -> str:
    lines = []
    for name in sorted(gammabeta.__all__):
        value = getattr(gammabeta, name)
        if name == "__version__":
            continue
        if inspect.isclass(value) and issubclass(value, Exception):
            lines.append(f"class {name}({value.__base__.__name__})")
            continue
        kind = "class" if inspect.isclass(value) else "def"
        lines.append(f"{kind} {name}{inspect.signature(value)}")
        if inspect.isclass(value) and "forward" in dir(value):
            lines.append(f"    def forward{inspect.signature(value.forward)}")
    return "\n".join(lines) + "\n"


def test_the_public_names_are_those_of_the_snapshot():
    """After a wanted change: python -m tests.test_house, and a line in CHANGELOG.md."""
    assert public_names() == SNAPSHOT.read_text()


def test_an_unknown_name_is_an_attribute_error_and_dir_lists_the_known():
    with pytest.raises(AttributeError, match="no attribute 'BatchNorm4d'"):
        _ = gammabeta.BatchNorm4d
    assert set(gammabeta.__all__) <= set(dir(gammabeta))


def test_no_public_function_shares_a_name_with_a_module():
    names = {module.rsplit(".", 1)[-1] for module in modules() if module.count(".") == 1}
    assert not names & set(gammabeta.__all__)


@pytest.mark.parametrize("module", [m for m in modules() if "__main__" not in m])
def test_the_examples_in_docstrings_show_true_numbers(module):
    loaded = importlib.import_module(module)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(loaded, optionflags=flags).failed == 0


def test_every_public_name_has_an_example():
    for name in set(gammabeta.__all__) - {"__version__"}:
        assert ">>>" in (inspect.getdoc(getattr(gammabeta, name)) or ""), name


def test_the_wheel_and_the_sdist_install_and_run(tmp_path):
    """Built from the checkout, the sdist again into a wheel, installed into a new environment."""
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path))
    done = run(*build, str(ROOT))  # an sdist, and a wheel made from that sdist
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.stat().st_size < 2_000_000
    inside = zipfile.ZipFile(wheel).namelist()
    for needed in ("py.typed", "studies/claims.toml", "cli/__init__.py"):
        assert f"gammabeta/{needed}" in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    # torch and the rest come from this environment: the wheel's own contents are on trial
    target = tmp_path / "env"
    venv.create(target, with_pip=False, symlinks=True)
    python = target / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q")
    done = run(*pip, "--no-index", str(wheel))
    assert done.returncode == 0, done.stderr
    site = next((target / "lib").glob("python*/site-packages"))
    others = [p for p in sys.path if p.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    code = "import gammabeta as g, torch; print(g.__file__); g.BatchNorm1d(2)(torch.randn(4, 2))"
    done = run(str(python), "-c", code)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    done = run(str(target / "bin" / "gammabeta"), "study", "list", "--json")
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    SNAPSHOT.write_text(public_names())
