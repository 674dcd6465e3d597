"""A digest changes when a result could change, and only then.

Code is compared definition by definition. From the names that a notebook or a training uses, the
*closure* follows every name to the top-level function, class or assignment that defines it, and
from there on, inside the package. Each definition counts by its syntax tree, without what changes no
result: comments, layout, docstrings, the messages of errors and warnings, and decorators that only
refuse or verify (``CHECKS``). What writes the page and the cards does not count (``WRITES``). So editing
one figure makes stale what draws it, and a better message in the reader of texts retrains nothing.

The closure has two limits: a method is found through the class that an annotation names, so a
function must annotate the objects whose methods it calls; and a data file of the package counts only
where a string names it (``"style.mplstyle"``).
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import symtable
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from earlyexit.runs.paths import PACKAGE

# Decorators of earlyexit.checked and runs.kept.
CHECKS = ("bounded", "listed", "refused", "verified")
# It writes of results that are there, in templates, which count as little.
WRITES = "earlyexit/runs/publish.py"
PARAMETERS = "parameters"  # tag of the cell with a notebook's defaults
DIGITS = 16  # hexadecimal digits kept of a definition's digest
PARSER = Lock()  # python 3.11 fails with SystemError when two threads make syntax trees at once
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def of_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_files(folder: Path) -> str:
    """Return the digest of the names and bytes of all files below ``folder`` but hidden ones."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return of_object({n: of_file(p) for n, p in files.items() if not n.startswith(".")})


def of_object(value: Any) -> str:
    """Return the digest of dataclasses, dicts, lists, tuples, strings, numbers and None.

    Raises:
        TypeError: the value holds anything else, whose ``repr`` could change from run to run.
    """

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
        raise TypeError(f"no digest of a {type(item).__name__}: {item!r}")

    canonical = json.dumps(value, default=plain, sort_keys=True, separators=(",", ":"))
    return of_bytes(canonical.encode())


def of_code(
    *roots: str | Callable, contract: str | type = "", package: Path = PACKAGE
) -> dict[str, str]:
    """Return the digests of definitions and all they use, by ``earlyexit/<file>.py:<name>``.

    Args:
        roots: functions or classes, or their dotted names, such as
            ``"earlyexit.training.train.train"``.
        contract: the class through which the roots know the objects that they are given. A base class
            that derives directly from it and overrides nothing of it only adds what the roots do not
            use, and is left out: training does not depend on the code that runs a model with exits.

    Raises:
        LookupError: the package has no definition of that name.
    """
    source = _Source(package)

    def find(root: str | Callable) -> tuple[str, str]:
        name = root if isinstance(root, str) else f"{root.__module__}.{root.__qualname__}"
        module, _, last = name.rpartition(".")
        if target := next(source.named(module, last), None):
            return target
        raise LookupError(f"no definition {name} in {package.name}/")

    source.contract = find(contract) if contract else None
    return source.closure(map(find, roots))


def of_notebook(path: Path, package: Path = PACKAGE) -> dict[str, str]:
    """Return the digests of a notebook's code cells and of every definition they use.

    The tagged cell of parameters is left out: its values are compared instead.

    Raises:
        SyntaxError: a cell does not parse.
    """
    skipped = {PARAMETERS, "injected-parameters"}
    cells = (_parse(source).body for source, tags in _code_cells(path) if not skipped & set(tags))
    code = ast.unparse(_meaning(ast.Module([node for cell in cells for node in cell], [])))
    source = _Source(package)
    closure = source.closure(source.used_by(code, _Module(path.stem, {}, {})))
    return {"code cells": of_bytes(code.encode())[:DIGITS]} | closure


def notebook_parameters(path: Path) -> dict[str, tuple[str, Any]]:
    """Return name → (type, default) of the annotated literals in the ``parameters`` cell.

    Raises:
        ValueError: there is no such cell, or a line of it is not an annotated literal.
    """
    found = {}
    tagged = [source for source, tags in _code_cells(path) if PARAMETERS in tags]
    if len(tagged) != 1:
        raise ValueError(f"{path.name}: {len(tagged)} cells are tagged `{PARAMETERS}`, not one")
    for node in _tree(tagged[0]).body:
        try:
            kind = ast.unparse(node.annotation).split("[")[0]
            found[node.target.id] = (kind, ast.literal_eval(node.value))
        except (AttributeError, ValueError, TypeError):
            line = ast.unparse(node)
            raise ValueError(f"{path.name}: not an annotated literal: `{line}`") from None
    return found


def read_notebook(path: Path) -> dict[str, Any]:
    """Return the parsed JSON of a notebook.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no notebook: {error}") from None


def code_cells(path: Path) -> list[str]:
    """Return the source of each code cell."""
    return [source for source, _ in _code_cells(path)]


def _code_cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the source and the tags of each code cell."""
    for cell in read_notebook(path)["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), cell["metadata"].get("tags", [])


def _tree(source: str) -> ast.Module:
    with PARSER:
        return ast.parse(source)


def _parse(source: str) -> ast.Module:
    try:
        return _tree(source)
    except SyntaxError:  # perhaps an IPython magic
        from IPython.core.inputtransformer2 import TransformerManager

        return _tree(TransformerManager().transform_cell(source))


class _Meaning(ast.NodeTransformer):
    """A transformer that removes from a syntax tree what changes no result."""

    def visit_FunctionDef(self, node: ast.AST) -> ast.AST:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, Definition):
            node.decorator_list = [d for d in node.decorator_list if not _only_checks(d)]
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


def _only_checks(decorator: ast.expr) -> bool:
    return getattr(getattr(decorator, "func", decorator), "id", None) in CHECKS


def _meaning(tree: ast.Module) -> ast.Module:
    return ast.fix_missing_locations(_Meaning().visit(tree))


class _Module(NamedTuple):
    """One module of the package.

    Attributes:
        name: dotted name.
        bindings: imported name → (module, name in it), with an empty name for the module itself.
        definitions: name → the code that defines it; ``""``: the code that runs on every import.
    """

    name: str
    bindings: dict[str, tuple[str, str]]
    definitions: dict[str, str]


@lru_cache(maxsize=1024)
def _read_module(name: str, package: str, text: str) -> _Module:
    """Parse a file's text; its relative imports start from ``package``."""
    tree, code = _meaning(_tree(text)), {"": []}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".")
            parents = parts[: len(parts) - node.level + 1]
            node.module = ".".join([*parents, *filter(None, [node.module])])
            node.level = 0
    for node in tree.body:
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if constant or isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = list(_defined(node))
        plain = names and isinstance(node, Definition | ast.Assign | ast.AnnAssign)
        for target in names if plain else [*names, ""]:
            code.setdefault(target, []).append(ast.unparse(node))
    definitions = {target: "\n".join(parts) for target, parts in code.items()}
    return _Module(name, _bindings(tree), definitions)


def _defined(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement defines, also inside its blocks."""
    if isinstance(node, Definition):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name | ast.Tuple | ast.List):
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
    else:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.stmt):
                yield from _defined(inner)


def _bindings(tree: ast.AST) -> dict[str, tuple[str, str]]:
    """Return imported name → (module, name in it)."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or module] = (module, "")
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: (node.module, a.name) for a in node.names}
    return found


@lru_cache(maxsize=4096)
def _uses(code: str) -> tuple[list[list[str]], dict[str, tuple[str, str]], set[str]]:
    """Return the names that a piece of code uses.

    Returns:
        Names that it does not define, with their attributes (``a.b.c`` is [a, b, c]); the bindings of
        the imports inside it; and the last part of each of its strings, read as a path.
    """
    tree = _tree(code)
    bindings = _bindings(tree)
    names = set(_outside_names(symtable.symtable(code, "", "exec")))
    chains = [chain for chain in _chains(tree) if chain[0] in names]
    chains += [["*"]] if "*" in bindings else []
    strings = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    return chains, bindings, {s.rpartition("/")[2] for s in strings if isinstance(s, str)}


def _outside_names(table: symtable.SymbolTable) -> Iterator[str]:
    """Yield the names that code looks up outside its functions, or imports inside them."""
    for symbol in table.get_symbols():
        inside = table.get_type() == "function"
        if symbol.is_global() or symbol.is_imported() if inside else symbol.is_referenced():
            yield symbol.get_name()
    for child in table.get_children():
        yield from _outside_names(child)


def _chains(node: ast.AST) -> Iterator[list[str]]:
    chain, inner = [], node
    while isinstance(inner, ast.Attribute):
        chain, inner = [inner.attr, *chain], inner.value
    if isinstance(inner, ast.Name):
        yield [inner.id, *chain]
        return
    for child in ast.iter_child_nodes(inner):
        yield from _chains(child)


class _Source:
    """The definitions of a package, and what each of them uses.

    A *target* is the pair (module, name) of a definition. The name ``""`` stands for the code that
    runs whenever the module is imported, and ``"*"`` for all that the module holds.
    """

    def __init__(self, package: Path) -> None:
        self.package = package
        self.contract: tuple[str, str] | None = None  # (module, name); see of_code
        files = (p for p in package.rglob("*") if p.suffix not in (".py", ".pyc") and p.is_file())
        self.data = {p.name: p for p in files}
        self.path, self.module = cache(self._path), cache(self._module)

    def closure(self, targets: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Return the digests of the targets and of all that they use, by ``<file>:<name>``."""
        found: dict[str, str] = {}
        seen, waiting = set(), list(targets)
        while waiting:
            if (target := waiting.pop()) in seen:
                continue
            seen.add(target)
            module, name = self.module(target[0]), target[1]
            if self._relative(self.path(module.name)) == WRITES:
                continue
            if name == "*":
                waiting += ((module.name, inner) for inner in module.definitions)
                waiting += (t for b in module.bindings.values() for t in self.named(*b))
                continue
            waiting += [(module.name, ""), *self.used_by(module.definitions[name], module)]
            if code := module.definitions[name]:
                key = f"{self._relative(self.path(module.name))}:{name}".rstrip(":")
                found[key] = of_bytes(code.encode())[:DIGITS]
            for file in self.data.keys() & _uses(code)[2]:
                found[self._relative(self.data[file])] = of_file(self.data[file])[:DIGITS]
        return dict(sorted(found.items()))

    def used_by(self, code: str, module: _Module) -> Iterator[tuple[str, str]]:
        """Yield the targets that code of a module names."""
        for target in self._named_in(code, module):
            yield from self._bases(target) if self._only_adds(target) else [target]

    def _named_in(self, code: str, module: _Module) -> Iterator[tuple[str, str]]:
        chains, inside, _ = _uses(code)
        bindings = module.bindings | inside
        for root, *attributes in chains:
            if root in module.definitions:
                yield module.name, root
            elif root in bindings:
                yield from self.named(*bindings[root], *attributes)

    def named(self, module: str, *names: str) -> Iterator[tuple[str, str]]:
        """Yield the target that ``module.name.name…`` leads to, if it lies in the package.

        A name that a module only imports is followed to where it is defined.
        """
        if (found := self.module(module)) is None:
            return
        name, *rest = [n for n in names if n] or ["*"]
        imported = found.bindings.get(name, (module, name))
        if name == "*" or name in found.definitions:
            yield module, name
        elif imported not in ((module, name), (f"{module}.{name}", "")):
            yield from self.named(*imported, *rest)
        elif self.path(f"{module}.{name}"):
            yield from self.named(f"{module}.{name}", *rest)

    def _only_adds(self, target: tuple[str, str]) -> bool:
        """Tell whether this class derives directly from the contract and overrides nothing of it."""
        if self.contract is None or list(self._bases(target)) != [self.contract]:
            return False
        bodies = (self._node(t).body for t in (target, self.contract))
        own, contract = ({name for inner in body for name in _defined(inner)} for body in bodies)
        return not own & contract

    def _bases(self, target: tuple[str, str]) -> Iterator[tuple[str, str]]:
        """Yield the base classes of a definition that lie in the package."""
        bases = "\n".join(map(ast.unparse, getattr(self._node(target), "bases", [])))
        yield from self._named_in(bases, self.module(target[0]))

    def _node(self, target: tuple[str, str]) -> ast.stmt | None:
        code = self.module(target[0]).definitions.get(target[1], "")
        return next(iter(_tree(code).body), None)

    def _module(self, name: str) -> _Module | None:
        """Return the module of a dotted name; None outside the package."""
        if (path := self.path(name)) is None:
            return None
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        return _read_module(name, inside, path.read_text("utf-8"))

    def _path(self, name: str) -> Path | None:
        """Return the file of a dotted module name; None outside the package."""
        if name.split(".")[0] != self.package.name:
            return None
        path = self.package.parent.joinpath(*name.split("."))
        candidates = (path.with_name(path.name + ".py"), path / "__init__.py")
        return next((p for p in candidates if p.is_file()), None)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.package.parent).as_posix()
