"""Digests that change when a result could change, and only then.

Code is compared by its syntax tree without docstrings: a comment, a blank line or a better sentence
costs nobody an hour of training. Every function that covers several parts returns them one by one,
so that a stale result can name the part.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from earlyexit.runs.paths import PACKAGE

PARAMETERS = "parameters"  # tag of the cell with a notebook's defaults


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


def of_source(*sources: str) -> str:
    """Digest of Python code without docstrings, comments and layout.

    Raises:
        SyntaxError: the code does not parse.
    """
    trees = [_without_docstrings(_parse(source)) for source in sources]
    return of_bytes("\n\0".join(ast.unparse(tree) for tree in trees).encode())


def of_modules(*names: str, without: Iterable[str] = (), package: Path = PACKAGE) -> dict[str, str]:
    """Digests of modules and of all they import from the package, by file (``earlyexit/trace.py``).

    Args:
        names: dotted names inside the package, such as ``"earlyexit.calibration.trace"``.
        without: modules that are imported on the way but that the work in question never runs.

    Raises:
        FileNotFoundError: no such module.
    """
    for name in (*names, *without):
        if _file_of(name, package) is None:
            raise FileNotFoundError(f"no module {name} in {package.name}/")
    return _digest_files(names, package, without)


def of_notebook(path: Path, package: Path = PACKAGE) -> dict[str, str]:
    """Digests of a notebook's code cells and of every package file they lead to.

    The tagged cell of parameters is left out: its values count (see ``notebook_parameters``).

    Raises:
        SyntaxError: a cell does not parse.
    """
    sources = [
        source
        for source, tags in _code_cells(path)
        if PARAMETERS not in tags and "injected-parameters" not in tags
    ]
    names = {name for source in sources for name in _imports(_parse(source), "", package)}
    return {"code cells": of_source(*sources)} | _digest_files(names, package)


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


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        documented = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        )
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


def _digest_files(
    names: Iterable[str], package: Path, without: Iterable[str] = ()
) -> dict[str, str]:
    """Digests of the modules ``names`` and, transitively, of the package files they use."""
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        path = _file_of(name, package)
        key = f"{package.name}/{path.relative_to(package).as_posix()}" if path else None
        if key is None or key in found or name in without:
            continue
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[key], imported, styles = _read_module(path.read_text("utf-8"), inside, package)
        waiting += imported
        found |= {f"{package.name}/{style}": of_file(package / style) for style in styles}
    return dict(sorted(found.items()))


@lru_cache(maxsize=512)
def _read_module(source: str, inside: str, package: Path) -> tuple[str, list[str], list[str]]:
    """Digest of a module's code, the package's modules it imports, and the styles it names."""
    tree = ast.parse(source)
    strings = set(_strings(tree))
    styles = [p.name for p in package.glob("*.mplstyle") if p.name in strings]
    return of_source(source), list(_imports(tree, inside, package)), styles


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _imports(tree: ast.AST, inside: str, package: Path) -> Iterator[str]:
    """Names of the package's modules imported anywhere in ``tree``, code of package ``inside``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == package.name)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, inside)
            if base.split(".")[0] == package.name:
                yield from (_origin(base, alias.name, package) for alias in node.names)


def _absolute(node: ast.ImportFrom, inside: str) -> str:
    """The module an ``import from`` names, relative dots resolved."""
    parents = inside.split(".")[: len(inside.split(".")) - node.level + 1] if node.level else []
    return ".".join([*parents, *([node.module] if node.module else [])])


def _origin(base: str, name: str, package: Path) -> str:
    """The module that ``from base import name`` reads.

    A name that a package's ``__init__`` merely hands on is followed to where it is defined, so that
    importing one class from the package does not depend on all of the package.
    """
    if _file_of(f"{base}.{name}", package):
        return f"{base}.{name}"
    path = _file_of(base, package)
    if path is not None and path.name == "__init__.py" and name != "*":
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and _absolute(node, base) != base:
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return _origin(_absolute(node, base), alias.name, package)
    return base


def _file_of(name: str, package: Path) -> Path | None:
    """The file of a dotted module name inside the package, if there is one."""
    path = package.parent.joinpath(*name.split("."))
    candidates = (path.with_name(path.name + ".py"), path / "__init__.py")
    return next((p for p in candidates if p.is_file()), None)
