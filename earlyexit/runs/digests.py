"""Digests that change when a result could change, and only then.

Code is compared definition by definition. From the names that a notebook or a training uses, the
*closure* follows every name to the top-level function, class or assignment that it stands for, and
from there on, inside the package. Each definition counts by its syntax tree, without what changes no
result: comments, layout, docstrings, and the message of an error or warning. So editing one figure
makes stale what draws it, and a better message in the reader of texts retrains nothing.

What the closure cannot see: a method is looked for in the class that an annotation names, so a
function must annotate the objects whose methods it calls; and a file of the package counts where a
string names it (``"style.mplstyle"``).
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import symtable
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from earlyexit.runs.paths import PACKAGE

PARAMETERS = "parameters"  # tag of the cell with a notebook's defaults
DIGITS = 16  # hexadecimal digits kept of a definition's digest

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def of_bytes(data: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """Digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_files(folder: Path) -> str:
    """Digest of the names and bytes of all files below ``folder``, hidden ones left out."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    names = ((p.relative_to(folder), p) for p in files)
    visible = {r.as_posix(): of_file(p) for r, p in names if not r.as_posix().startswith(".")}
    return of_object(visible)


def of_object(value: Any) -> str:
    """Digest of a configuration: dataclasses, dicts, lists, tuples, strings, numbers, None.

    Raises:
        TypeError: anything else inside; a digest of its ``repr`` would change from run to run.
    """

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
        raise TypeError(f"no digest of a {type(item).__name__}: {item!r}")

    canonical = json.dumps(value, default=plain, sort_keys=True, separators=(",", ":"))
    return of_bytes(canonical.encode())


def of_code(*roots: str | Callable, package: Path = PACKAGE) -> dict[str, str]:
    """Digests of definitions and of all that they use, by ``earlyexit/<file>.py:<name>``.

    Args:
        roots: functions or classes, or their dotted names, such as
            ``"earlyexit.training.train.train"``.

    Raises:
        LookupError: the package has no definition of that name.
    """
    names = [r if isinstance(r, str) else f"{r.__module__}.{r.__qualname__}" for r in roots]
    source = _Source(package)
    found = []
    for name in names:
        module, _, last = name.rpartition(".")
        if not (targets := list(source.named(module, last))):
            raise LookupError(f"no definition {name} in {package.name}/")
        found += targets
    return source.closure(found)


def of_notebook(path: Path, package: Path = PACKAGE) -> dict[str, str]:
    """Digests of a notebook's code cells and of every definition of the package they use.

    The tagged cell of parameters is left out: its values count (see ``notebook_parameters``).

    Raises:
        SyntaxError: a cell does not parse.
    """
    cells = [
        _parse(source).body
        for source, tags in _code_cells(path)
        if PARAMETERS not in tags and "injected-parameters" not in tags
    ]
    tree = _meaning(ast.Module([node for cell in cells for node in cell], []))
    source, notebook = _Source(package), _Module(path.stem, "", {}, {}, [])
    return {"code cells": _digest(tree)} | source.closure(source.used_by(tree, notebook))


def notebook_parameters(path: Path) -> dict[str, tuple[str, Any]]:
    """Name → (type, default) of the annotated literals in a notebook's ``parameters`` cell.

    Raises:
        ValueError: no such cell, or something in it is not an annotated literal.
    """
    found = {}
    tagged = [source for source, tags in _code_cells(path) if PARAMETERS in tags]
    if len(tagged) != 1:
        raise ValueError(f"{path.name}: {len(tagged)} cells are tagged `{PARAMETERS}`, not one")
    for node in ast.parse(tagged[0]).body:
        try:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                raise ValueError
            kind = ast.unparse(node.annotation).split("[")[0]
            found[node.target.id] = (kind, ast.literal_eval(node.value))
        except (ValueError, TypeError):
            line = ast.unparse(node)
            raise ValueError(f"{path.name}: not an annotated literal: `{line}`") from None
    return found


def read_notebook(path: Path) -> dict[str, Any]:
    """A notebook as its JSON says.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no notebook: {error}") from None


def notebook_nodes(path: Path) -> Iterator[ast.AST]:
    """Every syntax node of a notebook's code cells."""
    for source, _ in _code_cells(path):
        yield from ast.walk(_parse(source))


def _code_cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(source, tags) of each code cell."""
    for cell in read_notebook(path)["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), cell["metadata"].get("tags", [])


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # perhaps an IPython magic
        from IPython.core.inputtransformer2 import TransformerManager

        return ast.parse(TransformerManager().transform_cell(source))


class _Meaning(ast.NodeTransformer):
    """Takes out of a syntax tree what changes no result."""

    def visit_FunctionDef(self, node: ast.AST) -> ast.AST:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_ClassDef = visit_Module = visit_FunctionDef

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc = ast.Call(node.exc.func, [], [])
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.unparse(node.func) in ("warnings.warn", "warn"):
            return ast.Call(node.func, [], [])
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)


def _meaning(tree: ast.Module) -> ast.Module:
    return ast.fix_missing_locations(_Meaning().visit(tree))


@dataclasses.dataclass(frozen=True)
class _Module:
    """One file of the package.

    Attributes:
        name: dotted.
        inside: the package that its relative imports start from.
        bindings: imported name → (module, name in it), with an empty name for the module itself.
        definitions: name → the statements that define it.
        always: what runs when the module is imported, beside imports and definitions.
    """

    name: str
    inside: str
    bindings: dict[str, tuple[str, str]]
    definitions: dict[str, list[ast.stmt]]
    always: list[ast.stmt]


@lru_cache(maxsize=512)
def _read_module(name: str, is_package: bool, source: str) -> _Module:
    tree = _meaning(ast.parse(source))
    definitions, always = defaultdict(list), []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_for_type_checkers(node):
            continue
        names = list(_defined(node))
        for target in names:
            definitions[target].append(node)
        if not names or not isinstance(node, Definition | ast.Assign | ast.AnnAssign):
            always.append(node)
    inside = name if is_package else name.rpartition(".")[0]
    return _Module(name, inside, _bindings(tree, inside), dict(definitions), always)


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _defined(node: ast.stmt) -> Iterator[str]:
    """The names that a top-level statement defines, in the blocks of a compound one too."""
    if isinstance(node, Definition):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if all(isinstance(t, ast.Name | ast.Tuple | ast.List) for t in targets):
            for target in targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
    else:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.stmt):
                yield from _defined(inner)


def _bindings(tree: ast.AST, inside: str) -> dict[str, tuple[str, str]]:
    """What each imported name stands for; ``inside`` is the package of relative imports."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or module] = (module, "")
        elif isinstance(node, ast.ImportFrom):
            parts = inside.split(".")
            parents = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {a.asname or a.name: (module, a.name) for a in node.names}
    return found


class _Source:
    """The package's definitions, and what each of them uses.

    A *target* is (module, name) of a definition. Instead of a name, ``""`` stands for the statements
    that run whenever the module is imported, and ``"*"`` for all that the module holds.
    """

    def __init__(self, package: Path) -> None:
        self.package = package
        files = (p for p in package.rglob("*") if p.suffix not in (".py", ".pyc") and p.is_file())
        self.data = {p.name: p for p in files}

    def closure(self, targets: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Digests of the targets and of all that they use, by ``<file>:<name>``."""
        found: dict[str, str] = {}
        seen, waiting = set(), list(targets)
        while waiting:
            if (target := waiting.pop()) in seen:
                continue
            seen.add(target)
            module, name = self.module(target[0]), target[1]
            if name == "*":
                waiting += ((module.name, inner) for inner in ("", *module.definitions))
                waiting += (t for b in module.bindings.values() for t in self.named(*b))
            elif tree := ast.Module(module.definitions.get(name, module.always), []):
                waiting += [(module.name, ""), *self.used_by(tree, module)]
                if tree.body:
                    file = self.relative(self.path(module.name))
                    found[f"{file}:{name}".rstrip(":")] = _digest(tree)
                for file in map(self.data.get, _file_names(tree)):
                    found |= {self.relative(file): of_file(file)[:DIGITS]} if file else {}
        return dict(sorted(found.items()))

    def used_by(self, tree: ast.Module, module: _Module) -> Iterator[tuple[str, str]]:
        """The targets that code of a module names."""
        names = set(_names(symtable.symtable(ast.unparse(tree), "", "exec")))
        bindings = module.bindings | _bindings(tree, module.inside)
        for root, *attributes in _chains(tree):
            if root in names and root in module.definitions:
                yield module.name, root
            elif root in names and root in bindings:
                yield from self.named(*bindings[root], *attributes)

    def named(self, module: str, *names: str) -> Iterator[tuple[str, str]]:
        """The target that ``module.name.name…`` leads to, if it lies in the package.

        What a module merely imported is followed to where it is defined.
        """
        if (found := self.module(module)) is None:
            return
        name, rest = next(filter(None, names), "*"), [n for n in names if n][1:]
        imported = found.bindings.get(name, (module, name))
        if name == "*" or name in found.definitions:
            yield module, name
        elif imported not in ((module, name), (f"{module}.{name}", "")):
            yield from self.named(*imported, *rest)
        elif self.path(f"{module}.{name}"):
            yield from self.named(f"{module}.{name}", *rest)

    def module(self, name: str) -> _Module | None:
        """The parsed file of a dotted name; None outside the package."""
        if (path := self.path(name)) is None:
            return None
        return _read_module(name, path.name == "__init__.py", path.read_text("utf-8"))

    def path(self, name: str) -> Path | None:
        """The file of a dotted module name inside the package, if there is one."""
        if name.split(".")[0] != self.package.name:
            return None
        path = self.package.parent.joinpath(*name.split("."))
        candidates = (path.with_name(path.name + ".py"), path / "__init__.py")
        return next((p for p in candidates if p.is_file()), None)

    def relative(self, path: Path) -> str:
        return path.relative_to(self.package.parent).as_posix()


def _digest(tree: ast.Module) -> str:
    return of_bytes(ast.unparse(tree).encode())[:DIGITS]


def _names(table: symtable.SymbolTable) -> Iterator[str]:
    """The names that code looks up outside of its functions, or imports inside of them."""
    inner = table.get_type() == "function"
    for symbol in table.get_symbols():
        if symbol.is_global() or (symbol.is_imported() if inner else symbol.is_referenced()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _names(child)


def _chains(node: ast.AST) -> Iterator[list[str]]:
    """Every name in a tree, with the attributes taken of it: ``a.b.c`` is [a, b, c]."""
    chain, inner = [], node
    while isinstance(inner, ast.Attribute):
        chain, inner = [inner.attr, *chain], inner.value
    if isinstance(inner, ast.Name):
        yield [inner.id, *chain]
        return
    for child in ast.iter_child_nodes(inner):
        yield from _chains(child)


def _file_names(tree: ast.AST) -> Iterator[str]:
    """The last parts of a tree's strings, read as paths."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.rpartition("/")[2]
