# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of the house, kept by reading the source.

The first part is data: what may import what, and how large things may be.  A rule is a function
that takes one module and yields `(line, what is wrong)`; each has snippets that it must refuse.
"""

from __future__ import annotations

import ast
import configparser
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vdsm_storage"

# From the roof to the ground.  A module imports from its own folder and from floors below, never
# from another folder of its floor.
FLOORS: Sequence[Collection[str]] = (
    ("__main__",),
    ("agent", "cli"),
    ("rpc", "web", "csi"),
    ("verbs",),
    ("monitor",),
    ("vms",),
    ("domains",),
    ("images",),
    ("leases",),
    ("jobs",),
    ("lvm", "host", "remote", "secrets"),
    ("schema", "config"),
    ("base",),
    ("errors",),
)

# Who alone may import a module, whatever the floors allow.  (A folder stands for its modules.)
ONLY: Mapping[str, Collection[str]] = {
    "vdsm_storage.schema": ("agent", "rpc", "web", "csi", "cli", "schema"),  # agent only wires it
    "vdsm_storage.verbs": ("agent", "rpc", "verbs"),
    "vdsm_storage.base.run": ("lvm", "host", "remote", "secrets"),
    "subprocess": ("base.run", "lvm", "host", "remote", "secrets"),
    "multiprocessing": ("host",),
    "libvirt": ("host", "secrets"),
    "sanlock": ("host",),
    "cinderclient": ("remote",),
    "rados": ("host", "remote"),
    "rbd": ("host", "remote"),
}

# Roots of threads and tasks: where an error must not end the loop.  Module -> functions.
BROAD_EXCEPT: Mapping[str, Collection[str]] = {
    "base.aside": ("run",),
    "base.lanes": ("_work",),
    "host.bounded": ("_work",),
    "host.libvirt": ("_deliver", "_take_event"),
    "leases.lost": ("_run",),
    "monitor.alarms": ("_run",),
    "monitor.crew": ("_run",),
    "monitor.poller": ("_run",),
    "rpc.dispatch": ("*",),
    "rpc.streams": ("_run",),
    "jobs.runner": ("work", "_failed", "_recover"),  # a task, its way back, recovery of each entry
}

MODULE_LINES = 400
TEST_MODULE_LINES = 600
FUNCTION_LINES = 50
PARAMETERS = 7
WIRE_SIGNATURES = ("verbs",)  # the wire decides how many parameters a verb has

LINKED = ("verbs", "schema", "lvm", "secrets")  # folders at the top that install in the package
PYTHON_FOLDERS = ("vdsm_storage", *LINKED, "tests", "functional", "benchmarks", "scripts")
SPDX = "SPDX-License-Identifier: GPL-2.0-or-later"
NEEDS_SPDX = (".py", ".yml", ".sh", ".spec", ".service", ".conf", "Makefile")
NOT_OURS = ("build", "dist", "docs", "data", "__pycache__")
HIDDEN_AND_OURS = (".ci",)

# fmt: off
MUTABLE_CALLS = (
    "list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict", "local",
    "Lock", "RLock", "Condition", "Event", "Semaphore", "Queue", "SimpleQueue",
    "ThreadPoolExecutor",
)
READ_ONLY = ("Final", "Mapping", "Sequence", "Collection", "Set", "frozenset", "tuple")
# fmt: on
CACHES = ("cache", "lru_cache")

# Texts that name a machine of ours or a package host.  Split, so as not to find themselves.
FORBIDDEN_TEXT = re.compile(
    "|".join(
        (
            r"(?<![\w.])/wor" r"k/",
            r"\.\./sha" r"red|sha" r"red/(?:facts|golden|lab|design)",
            r"far" r"m-studio",
            r"/opt/py" r"pi|py" r"pi\.org|pythonho" r"sted|deb\.deb" r"ian\.org",
        )
    )
)

Finding = tuple[int, str]


@dataclass(frozen=True)
class Module:
    """`name` is the dotted name below the package (`images.chain`), or the path of a test."""

    name: str
    source: str
    product: bool = True

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def folder(self) -> str:
        return self.name.partition(".")[0]


# -- what a module imports -------------------------------------------------------------------


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; `from a import b` gives a.b (b may be a module)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def floor(folder: str) -> int | None:
    return next((i for i, names in enumerate(FLOORS) if folder in names), None)


def imports_point_down(module: Module) -> Iterator[Finding]:
    mine = floor(module.folder)
    if mine is None:
        yield 1, f"{module.folder} is on no floor; FLOORS must say where it belongs"
        return
    for line, name in imports(module.tree):
        if not within(name, PACKAGE) or name.count(".") == 0:
            continue
        other = name.split(".")[1]
        theirs = floor(other)
        if other == module.folder or other.startswith("__version"):
            continue
        if theirs is None:
            yield line, f"imports {name}, which is on no floor"
        elif theirs <= mine:
            way = "up" if theirs < mine else "sideways"
            yield line, f"imports {way}: {module.folder} must not know {other}; pass a callback"


def reserved_imports(module: Module) -> Iterator[Finding]:
    for line, name in imports(module.tree):
        for reserved, allowed in ONLY.items():
            if within(name, reserved) and not any(within(module.name, a) for a in allowed):
                yield line, f"imports {reserved}, which is for {', '.join(allowed)} only"


def no_bare_top_folders(module: Module) -> Iterator[Finding]:
    """`import verbs` would load a second copy; Python's own `secrets` is meant by that name."""
    for line, name in imports(module.tree):
        top, _, rest = name.partition(".")
        if name.startswith("."):
            yield line, f"relative import {name}; write {PACKAGE}…"
        elif (top in LINKED and top != "secrets") or (top == "secrets" and "." in rest):
            yield line, f"imports {name}; write {PACKAGE}.{name}"


def no_imports_inside_functions(module: Module) -> Iterator[Finding]:
    for function in functions(module.tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield node.lineno, f"import inside {function.name}; put it at the top"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            yield node.lineno, "imports by name at run time; write an import and a table"


# -- state and errors ------------------------------------------------------------------------


def called(node: ast.AST) -> str:
    """The last name of what is called or decorates: `threading.Lock()` gives Lock."""
    target = node.func if isinstance(node, ast.Call) else node
    if isinstance(target, ast.Subscript):
        target = target.value
    if isinstance(target, ast.Attribute):
        return target.attr
    return target.id if isinstance(target, ast.Name) else ""


def is_mutable(value: ast.AST | None) -> bool:
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    return isinstance(value, displays) or (
        isinstance(value, ast.Call) and called(value) in MUTABLE_CALLS
    )


def is_read_only(annotation: ast.AST) -> bool:
    if called(annotation) == "ClassVar" and isinstance(annotation, ast.Subscript):
        annotation = annotation.slice
    return called(annotation) in READ_ONLY


def no_shared_state(module: Module) -> Iterator[Finding]:
    """A module or a class holds constants only: a table is upper-case and typed read-only."""
    tree = module.tree
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    for statement in (statement for body in bodies for statement in body):
        if isinstance(statement, ast.Assign) and is_mutable(statement.value):
            names = [ast.unparse(target) for target in statement.targets]
            if names not in (["__all__"], ["__slots__"]):
                yield statement.lineno, f"{names[0]} is mutable state; annotate it as Mapping, …"
        elif isinstance(statement, ast.AnnAssign) and is_mutable(statement.value):
            name = ast.unparse(statement.target)
            if not (is_read_only(statement.annotation) and name.upper() == name):
                yield statement.lineno, f"{name} is mutable state; a table is UPPER: Mapping[…]"
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}; keep it in an object"
    for function in functions(tree):
        if any(called(decorator) in CACHES for decorator in function.decorator_list):
            yield function.lineno, f"{function.name} is cached for all; keep it in an object"


def careful_excepts(module: Module) -> Iterator[Finding]:
    """No bare except; a broad one only in BROAD_EXCEPT, or if it ends in a bare `raise`."""
    allowed = BROAD_EXCEPT.get(module.name, ())
    for name, handler in handlers(module.tree, ""):
        caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if handler.type is None:
            yield handler.lineno, "bare except; name the error"
        elif any(called(kind) in ("Exception", "BaseException") for kind in caught if kind):
            last = handler.body[-1]
            again = isinstance(last, ast.Raise) and last.exc is None
            if not again and name not in allowed and "*" not in allowed:
                where = f"{module.name}: {name}"
                yield handler.lineno, f"broad except; only roots may ({where} in BROAD_EXCEPT?)"


def handlers(node: ast.AST, function: str) -> Iterator[tuple[str, ast.ExceptHandler]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ExceptHandler):
            yield function, child
        inner = child.name if isinstance(child, FUNCTION) else function
        yield from handlers(child, inner)


# -- size ------------------------------------------------------------------------------------

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTION))


def short_modules(module: Module) -> Iterator[Finding]:
    lines = module.source.count("\n")
    limit = MODULE_LINES if module.product else TEST_MODULE_LINES
    if lines > limit:
        yield limit, f"{lines} lines, more than {limit}; split it"


def short_functions(module: Module) -> Iterator[Finding]:
    for function in functions(module.tree):
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > FUNCTION_LINES:
            yield function.lineno, f"{function.name} has {lines} lines, more than {FUNCTION_LINES}"


def few_parameters(module: Module) -> Iterator[Finding]:
    if module.folder in WIRE_SIGNATURES:
        return
    for function in functions(module.tree):
        spec = function.args
        names = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > PARAMETERS:
            yield function.lineno, f"{function.name} takes {count} parameters; make a dataclass"


# -- the tree --------------------------------------------------------------------------------


def files(*folders: str) -> Iterator[Path]:
    """All files of the tree, or of some folders; links are not followed."""
    for folder in folders or (".",):
        for directory, names, found in os.walk(ROOT / folder):
            names[:] = [name for name in names if is_ours(name)]
            yield from (Path(directory) / name for name in sorted(found))


def is_ours(name: str) -> bool:
    """Whether a folder is part of the tree, not made by tools that ran in it."""
    hidden = name.startswith(".") and name not in HIDDEN_AND_OURS
    return not (hidden or name in NOT_OURS or name.endswith(".egg-info"))


def modules(product: bool = True) -> Iterator[Module]:
    for path in files(*PYTHON_FOLDERS):
        relative = path.relative_to(ROOT)
        ours = relative.parts[0] in (PACKAGE, *LINKED)
        if path.suffix != ".py" or (product and not ours):
            continue
        parts = relative.parts[1:] if relative.parts[0] == PACKAGE else relative.parts
        dotted = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        if dotted != "__init__":
            yield Module(dotted if ours else str(relative), path.read_text(), ours)


PRODUCT_RULES: Sequence[Callable[[Module], Iterator[Finding]]] = (
    imports_point_down,
    reserved_imports,
    no_imports_inside_functions,
    no_shared_state,
    careful_excepts,
    short_functions,
    few_parameters,
)
EVERYWHERE: Sequence[Callable[[Module], Iterator[Finding]]] = (no_bare_top_folders, short_modules)


def report(rule: Callable[[Module], Iterator[Finding]], found: Iterator[Module]) -> list[str]:
    return [f"{m.name}:{line}: {text}" for m in found for line, text in rule(m)]


@pytest.mark.parametrize("rule", PRODUCT_RULES, ids=lambda rule: rule.__name__)
def test_product_keeps_rule(rule: Callable[[Module], Iterator[Finding]]) -> None:
    found = report(rule, modules())
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("rule", EVERYWHERE, ids=lambda rule: rule.__name__)
def test_all_python_keeps_rule(rule: Callable[[Module], Iterator[Finding]]) -> None:
    found = report(rule, modules(product=False))
    assert not found, "\n" + "\n".join(found)


def cycle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """One import cycle as a list of modules, or an empty list."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next((c for n in graph.get(name, ()) if (c := walk(n, [*path, name]))), [])
        done.add(name)
        return found

    return next((found for name in graph if (found := walk(name, []))), [])


def test_no_import_cycles() -> None:
    known = {f"{PACKAGE}.{m.name}": m for m in modules()}
    graph = {
        name: {
            target
            for _, imported in imports(module.tree)
            for target in (imported, imported.rpartition(".")[0])
            if target in known and target != name
        }
        for name, module in known.items()
    }
    assert cycle(graph) == []


def test_packages_listed_are_the_packages_there() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    there = {PACKAGE}
    for module in modules():
        folders = module.name.split(".")[:-1]
        there.update(f"{PACKAGE}.{'.'.join(folders[: i + 1])}" for i in range(len(folders)))
    assert sorted(listed) == listed
    assert set(listed) - {f"{PACKAGE}.{m.name}" for m in modules()} <= there
    assert there <= set(listed), "setup.cfg [options] packages lacks a folder"
    mapped = dict(row.split(" = ") for row in config["options"]["package_dir"].split("\n") if row)
    links = {n for n in LINKED if f"{PACKAGE}.{n}" in listed}
    assert mapped == {f"{PACKAGE}.{name}": name for name in links}
    for name in links:
        assert os.readlink(ROOT / PACKAGE / name) == f"../{name}"


def test_pythons_secrets_is_not_shadowed() -> None:
    assert not (ROOT / "secrets" / "__init__.py").exists(), "it would hide Python's own `secrets`"


def test_every_source_names_its_license() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in files()
        if path.name.endswith(NEEDS_SPDX) and SPDX not in path.read_text()[:200]
    ]
    assert bare == [], f"first line: {SPDX}"


def test_no_text_names_a_machine_of_ours() -> None:
    named = [(str(p.relative_to(ROOT)), text) for p in files() for text in machine_names(p)]
    assert named == []


def machine_names(path: Path) -> list[str]:
    try:
        return FORBIDDEN_TEXT.findall(path.read_text())
    except UnicodeDecodeError:
        return []  # not a text


# -- each rule refuses what it is there for --------------------------------------------------

P = "vdsm_storage"
REFUSED: Sequence[tuple[Callable[[Module], Iterator[Finding]], str, str]] = (
    (imports_point_down, "images.chain", f"from {P}.domains.registry import Registry"),
    (imports_point_down, "host.mount", f"import {P}.lvm.command"),
    (imports_point_down, "errors", f"from {P} import base"),
    (imports_point_down, "attic.box", "import os"),
    (reserved_imports, "domains.file", f"from {P}.base.run import run"),
    (reserved_imports, "domains.file", f"from {P}.base import run"),
    (reserved_imports, "verbs.volume", f"from {P}.schema.loader import load"),
    (reserved_imports, "cli", f"from {P}.verbs.table import Verb"),
    (reserved_imports, "leases.lease", "import sanlock"),
    (reserved_imports, "images.copy", "import subprocess"),
    (no_bare_top_folders, "rpc.dispatch", "import verbs"),
    (no_bare_top_folders, "rpc.dispatch", "from secrets.registry import Registry"),
    (no_bare_top_folders, "rpc.dispatch", "from . import frames"),
    (no_imports_inside_functions, "images.copy", "def f():\n    import os"),
    (no_imports_inside_functions, "agent", "m = importlib.import_module('x')"),
    (no_shared_state, "base.x", "cache = {}"),
    (no_shared_state, "base.x", "CACHE: dict[str, int] = {}"),
    (no_shared_state, "base.x", "lock = threading.Lock()"),
    (no_shared_state, "base.x", "class C:\n    seen: ClassVar[set[int]] = set()"),
    (no_shared_state, "base.x", "def f():\n    global n"),
    (no_shared_state, "base.x", "@functools.lru_cache(maxsize=None)\ndef f(a): pass"),
    (careful_excepts, "base.x", "try: pass\nexcept: pass"),
    (careful_excepts, "base.x", "try: pass\nexcept (OSError, Exception): pass"),
    (short_modules, "base.x", "\n" * (MODULE_LINES + 1)),
    (short_functions, "base.x", "def f():" + "\n    a = 1" * FUNCTION_LINES),
    (few_parameters, "base.x", "def f(self, a, b, c, d, *, e, f, g, h): pass"),
)
ACCEPTED: Sequence[tuple[Callable[[Module], Iterator[Finding]], str, str]] = (
    (imports_point_down, "domains.file", f"from {P}.images import volume\nfrom {P} import errors"),
    (reserved_imports, "host.sanlock", f"import sanlock\nfrom {P}.base.run import run"),
    (no_bare_top_folders, "secrets.store", f"import secrets\nfrom {P}.secrets.registry import R"),
    (no_shared_state, "base.x", "T: Mapping[str, int] = {}\nF = frozenset({1})\n__all__ = ['T']"),
    (no_shared_state, "base.x", "class C:\n    K: ClassVar[Mapping[str, int]] = {}"),
    (careful_excepts, "base.x", "try: pass\nexcept BaseException:\n    undo()\n    raise"),
    (few_parameters, "verbs.volume", "def create(a, b, c, d, e, f, g, h, i): pass"),
)


@pytest.mark.parametrize(("rule", "name", "source"), REFUSED)
def test_rule_refuses(rule: Callable[[Module], Iterator[Finding]], name: str, source: str) -> None:
    assert list(rule(Module(name, source)))


@pytest.mark.parametrize(("rule", "name", "source"), ACCEPTED)
def test_rule_accepts(rule: Callable[[Module], Iterator[Finding]], name: str, source: str) -> None:
    assert list(rule(Module(name, source))) == []


def test_a_cycle_is_found() -> None:
    assert cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert cycle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
