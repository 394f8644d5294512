"""The code that makes an experiment's rows: what its `measure` reaches, and nothing else.

A digest of it names the rows. It has to change when a number could, and should not otherwise: not
with a comment, a docstring, a rule, a figure or the choice of the cells that are wanted. So a name
is followed from `measure` on, definition by definition. Layers, kernels and rules of the check are
taken as whole folders, with all that they import: what is chosen there is chosen while it runs. The
images are named by a digest of their own.
"""

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import gammabeta

_PACKAGE = Path(__file__).resolve().parents[1]
_NAME = "gammabeta"
_START = "measure"
# Decorators that change a definition and do nothing else when its module is imported.
_PLAIN = frozenset({"dataclasses", "functools", "contextlib", "torch", "staticmethod", "property"})
_WHOLE = ("layers", "ops", "_check")
# Of no influence on a cell: how many of them there are, and how their rows are stored.
_COUNTS, _STORED = "_SEEDS", "_runs"


def code_digest(experiment: Path, budget: str = "") -> str:
    """16 hex digits of the SHA-256 over the sources that decide an experiment's rows.

    The same on every machine and Python: neither folders nor line ends nor the layout of a parsed
    tree enter. Of a table by budget, as PLANS, only this budget's line counts. A module without
    `measure` counts as a whole.
    """
    digest = hashlib.sha256()
    for place, text in sorted(reached(experiment, budget).items()):
        digest.update(f"{place}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def reached(experiment: Path, budget: str = "") -> dict[str, str]:
    """The text of all that `measure` of this module uses, by place: "file: name" or a file.

    Comments, docstrings and blank lines are left out; annotations are not followed.

    Example:
        >>> from gammabeta.studies import order
        >>> from pathlib import Path
        >>> places = reached(Path(order.__file__))
        >>> "studies/order.py: measure" in places, "studies/order.py: judge" in places
        (True, False)
    """
    first = _module(experiment)
    if _START not in first.definitions:
        return {_place(experiment): first.whole()}
    found: dict[str, str] = {}
    folders: set[Path] = set()
    open_names, seen = [(experiment, _START)], {(experiment, _START)}
    begun: set[Path] = set()
    while open_names:
        file, name = open_names.pop()
        module = _module(file)
        nodes = [module.definitions[name]] if name in module.definitions else []
        if file not in begun:  # what happens when the module is imported happens anyway
            begun.add(file)
            for k, node in enumerate(module.statements):
                found[f"{_place(file)}: statement {k}"] = module.text(node)
                nodes.append(node)
        if name in module.definitions:
            found[f"{_place(file)}: {name}"] = module.text(module.definitions[name], budget)
        for node in nodes:
            for used in module.used(node):
                if isinstance(used, Path):
                    folders.add(used)
                elif used not in seen:
                    seen.add(used)
                    open_names.append(used)
    for file in _library(folders):
        found[_place(file)] = _module(file).whole()
    return found


def _place(file: Path) -> str:
    return file.relative_to(_PACKAGE).as_posix() if file.is_relative_to(_PACKAGE) else file.name


def _library(folders: Iterable[Path]) -> Iterator[Path]:
    """All files of these parts of the library, and of those that they import in their turn."""
    open_parts, seen = list(folders), set(folders)
    while open_parts:
        part = open_parts.pop()
        for file in sorted(part.rglob("*.py")) if part.is_dir() else [part]:
            yield file
            module = _module(file)
            for dotted, name in module.imports.values():
                other = _part(dotted, name)
                if other is not None and other not in seen:
                    seen.add(other)
                    open_parts.append(other)


def _part(dotted: str, name: str | None) -> Path | None:
    """The folder or file of the library, outside the studies, that an import names."""
    words = _full(dotted, name).split(".")
    if words[0] != _NAME or len(words) < 2 or words[1] in ("studies", _STORED):
        return None
    folder, file = _PACKAGE / words[1], _PACKAGE / f"{words[1]}.py"
    return folder if folder.is_dir() else file if file.is_file() else None


def _full(dotted: str, name: str | None) -> str:
    """The dotted name with that of a public name's module in it: `gammabeta.check` is `_check`."""
    if dotted != _NAME or name is None:
        return dotted
    return f"{_NAME}.{gammabeta._NAMES.get(name, name)}"


def _file(dotted: str, beside: Path) -> Path | None:
    """The file of a module that is followed, or of one beside an experiment that lies elsewhere."""
    words = dotted.split(".")
    if words[0] == _NAME and len(words) > 1 and words[1] != _STORED:
        at = _PACKAGE.joinpath(*words[1:])
    elif words[0] != _NAME and not beside.is_relative_to(_PACKAGE):
        at = beside.parent.joinpath(*words)
    else:
        return None
    for file in (at.with_suffix(".py"), at / "__init__.py"):
        if file.is_file():
            return file
    return None


class _Module(NamedTuple):
    """One file, taken apart: what it defines, imports, and does when it is imported."""

    file: Path
    lines: list[str]
    left_out: frozenset[int]
    definitions: dict[str, ast.stmt]
    imports: dict[str, tuple[str, str | None]]
    statements: list[ast.stmt]

    def text(self, node: ast.stmt, budget: str = "") -> str:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            table = dict(zip(map(_constant, node.value.keys), node.value.values, strict=True))
            if budget in table:
                return ast.get_source_segment("\n".join(self.lines), table[budget]) or ""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(each.lineno for each in decorators)])
        return self._kept(range(first, (node.end_lineno or node.lineno) + 1))

    def whole(self) -> str:
        return self._kept(range(1, len(self.lines) + 1))

    def _kept(self, numbers: Iterable[int]) -> str:
        lines = (self.lines[n - 1].rstrip() for n in numbers if n not in self.left_out)
        return "\n".join(line for line in lines if line)

    def used(self, node: ast.stmt) -> Iterator[tuple[Path, str] | Path]:
        """Names of the studies' modules, and parts of the library, that a definition uses."""
        names, imports = _read_in(node)
        imports = self.imports | imports
        for name, attribute in names:
            if name.endswith(_COUNTS):
                continue
            if name in self.definitions:
                yield self.file, name
            if name in imports:
                yield from _resolved(*imports[name], attribute, self.file)
            if name == "import_module" and self.file.parent != _PACKAGE / "studies":
                yield self.file.parent  # whatever lies there may be meant


@functools.cache  # most experiments reach the same definitions
def _read_in(
    node: ast.stmt,
) -> tuple[tuple[tuple[str, str | None], ...], dict[str, tuple[str, str | None]]]:
    return tuple(_names(node)), _imports(node)


def _resolved(
    dotted: str, name: str | None, attribute: str | None, beside: Path
) -> Iterator[tuple[Path, str] | Path]:
    """What an imported name stands for, and through it an attribute of it."""
    if name is None:  # import gammabeta, and then gammabeta.something
        name, attribute = attribute, None
    part, dotted = _part(dotted, name), _full(dotted, name)
    module = _file(f"{dotted}.{name}", beside)
    file = _file(dotted, beside)
    if part is not None and part.name in _WHOLE:
        yield part
    elif module is not None:  # of a module one name, or all of it
        own = _module(module)
        for each in own.definitions if attribute is None else [attribute]:
            yield module, each
            if each in own.imports:
                yield from _resolved(*own.imports[each], None, module)
    elif file is not None and name is not None:
        yield file, name
        if name in _module(file).imports:  # handed on
            yield from _resolved(*_module(file).imports[name], attribute, file)


def _constant(node: ast.expr | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _names(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """The names that are read in a tree, with the attribute that is taken of them, if any."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        yield node.value.id, node.attr
        return
    if isinstance(node, ast.Name):
        yield node.id, None
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _names(child)


def _imports(node: ast.AST) -> dict[str, tuple[str, str | None]]:
    """What each imported name stands for: a module, and a name in it; not what types alone need."""
    found: dict[str, tuple[str, str | None]] = {}
    if isinstance(node, ast.If) and "TYPE_CHECKING" in {name for name, _ in _names(node.test)}:
        return found
    if isinstance(node, ast.Import):
        for each in node.names:
            found[each.asname or each.name.split(".")[0]] = each.name, None
    elif isinstance(node, ast.ImportFrom) and not node.level:
        for each in node.names:
            found[each.asname or each.name] = node.module or "", each.name
    for child in ast.iter_child_nodes(node):
        found |= _imports(child)
    return found


@functools.cache
def _parsed(file: Path, text: str) -> _Module:
    tree = ast.parse(text, str(file))
    definitions: dict[str, ast.stmt] = {}
    statements: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            definitions[node.name] = node
            if any(_registers(each) for each in node.decorator_list):
                statements.append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            definitions.update(dict.fromkeys(names, node))
            if not all(isinstance(t, ast.Name | ast.Tuple) for t in targets):
                statements.append(node)
        elif not isinstance(node, ast.Import | ast.ImportFrom) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            statements.extend([] if guard else [node])
    top = ast.Module([n for n in tree.body if n not in definitions.values()], [])
    lines = text.split("\n")
    lines, left_out = _without_comments(text, lines), frozenset(_docstrings(tree))
    return _Module(file, lines, left_out, definitions, _imports(top), statements)


def _module(file: Path) -> _Module:
    return _parsed(file, file.read_text(encoding="utf-8"))  # "\r\n" is read as "\n"


def _registers(decorator: ast.expr) -> bool:
    """Whether a decorator may do more than to change what it decorates."""
    root = {name for name, _ in _names(decorator)}
    return not root <= _PLAIN


def _docstrings(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or len(body) == 0 or not isinstance(body[0], ast.Expr):
            continue
        text = body[0].value
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            yield from range(text.lineno, (text.end_lineno or text.lineno) + 1)


def _without_comments(text: str, lines: list[str]) -> list[str]:
    kept = list(lines)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            kept[row - 1] = kept[row - 1][:column]
    return kept
