"""Who may import whom, read from the sources.

vocabulary <- codegen; vocabulary, recording and report <- passes; everything <- engine, api, cli.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRONT_DOORS = {"sparsify.api", "sparsify.cli"}
ENTRANCES = ("sparsify.__main__", "sparsify.cli", "sparsify.demo")
# What may be missing where the package is installed, so is imported where it is used.
OPTIONAL = {"sklearn", "tqdm", "jax", "pytest", "cupy", "cupy_backends"}
DEFERRED = {
    # A pickle of a sparsified module must not pay for the engine's imports; a cycle otherwise.
    ("sparsify.install", "sparsify.engine"),
}


def sources() -> dict[str, ast.Module]:
    """Every module of the package by its import name."""
    found = {}
    for folder, package in (
        (ROOT / "sparsify", "sparsify"),
        (ROOT / "sparsify" / "pruning", "sparsify.pruning"),
        (ROOT / "sparsify" / "recording", "sparsify.recording"),
        (ROOT / "passes", "sparsify.passes"),
        (ROOT / "codegen", "sparsify.codegen"),
        (ROOT / "codegen" / "cuda", "sparsify.codegen.cuda"),
        (ROOT / "codegen" / "emulator", "sparsify.codegen.emulator"),
    ):
        for path in sorted(folder.glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imports_of(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """What is imported at run time; ``from a import b`` gives ``a`` and ``a.b``."""
    for node in _outside_type_checking(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield str(node.module), node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def _outside_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        test = child.test if isinstance(child, ast.If) else None
        if isinstance(test, ast.Name) and test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _outside_type_checking(child)


MODULES = sources()


def imported(module: str) -> set[str]:
    return {name for name, _ in imports_of(MODULES[module])}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def modules_in(package: str) -> list[str]:
    return [name for name in MODULES if is_within(name, package)]


def test_the_whole_package_is_read() -> None:
    assert {"sparsify.ir", "sparsify.codegen.cpp", "sparsify.passes.roll_loops"} <= set(MODULES)
    assert {"sparsify.codegen.cuda.device", "sparsify.codegen.emulator"} <= set(MODULES)
    assert "sparsify.recording.recording" in MODULES


@pytest.mark.parametrize("module", modules_in("sparsify.codegen"))
def test_codegen_knows_neither_graphs_nor_passes(module: str) -> None:
    for name in imported(module):
        for forbidden in ("torch.fx", "sparsify.passes", "sparsify.recording", "sparsify.engine"):
            assert not is_within(name, forbidden), f"{module} imports {name}"


@pytest.mark.parametrize("module", modules_in("sparsify.passes"))
def test_passes_know_no_codegen(module: str) -> None:
    for name in imported(module):
        for forbidden in ("sparsify.codegen", "sparsify.engine"):
            assert not is_within(name, forbidden), f"{module} imports {name}"


@pytest.mark.parametrize("module", modules_in("sparsify.recording"))
def test_recording_knows_neither_passes_nor_codegen(module: str) -> None:
    for name in imported(module):
        for forbidden in ("sparsify.passes", "sparsify.codegen", "sparsify.engine"):
            assert not is_within(name, forbidden), f"{module} imports {name}"


def test_vocabulary_imports_vocabulary_only() -> None:
    vocabulary = {f"sparsify.{name}" for name in ("errors", "ir", "elementary", "check_ir")}
    vocabulary |= {"sparsify.scalar_ops", "sparsify.reference", "sparsify.graph_meta"}
    vocabulary |= {"sparsify.options", "sparsify.scalar_op", "sparsify.arithmetic_ops"}
    vocabulary |= {"sparsify.elementary_ops", "sparsify.logical_ops", "sparsify.logarithms"}
    vocabulary |= {"sparsify.error_function", "sparsify.halves"}
    for module in vocabulary:
        own = {name for name in imported(module) if name in MODULES}
        assert own <= vocabulary | {"sparsify"}, f"{module} imports {own - vocabulary}"


def test_nothing_imports_the_front_doors() -> None:
    """They wire everything, so whoever imported them would import everything."""
    entrances = {name for name in MODULES if name.startswith(ENTRANCES)} | {"sparsify"}
    for module in set(MODULES) - entrances - FRONT_DOORS:
        found = {name for door in FRONT_DOORS for name in imported(module) if is_within(name, door)}
        assert not found, f"{module} imports {found}"


def test_imports_are_at_the_top() -> None:
    for module, tree in MODULES.items():
        top = {id(node) for node in _top_level(tree)}
        for name, node in imports_of(tree):
            allowed = name.split(".")[0] in OPTIONAL or any(
                (module, name) == (importer, deferred)
                or (importer == module and is_within(name, deferred))
                for importer, deferred in DEFERRED
            )
            assert id(node) in top or allowed, f"{module}:{node.lineno} imports {name}"


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run at import, also those under ``if`` and ``try``; not those of a script."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        statement = waiting.pop()
        yield statement
        is_script = isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test)
        if isinstance(statement, (ast.If, ast.Try)) and not is_script:
            waiting += [s for s in ast.iter_child_nodes(statement) if isinstance(s, ast.stmt)]


def test_deferred_imports_are_still_needed() -> None:
    for module, name in DEFERRED:
        assert name in imported(module)


def test_importing_registers_nothing() -> None:
    """At import, modules define and compute constants; ``sparsify.api`` binds the one method."""
    found = {what for module, tree in MODULES.items() for what in _acts(module, tree)}
    assert found == {("sparsify.api", "bind()")}


def _acts(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Statements that do something beyond giving a name a value."""
    for statement in _top_level(tree):
        if isinstance(statement, (ast.For, ast.While, ast.With, ast.Delete)):
            yield module, type(statement).__name__
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            yield module, ast.unparse(statement)
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in targets):
            yield module, ast.unparse(statement)


def test_only_the_front_door_patches_torch() -> None:
    """``nn.Module.sparsify`` is the one patch that outlives a call."""
    patches = [
        (module, ast.unparse(node))
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and ast.unparse(target).startswith(("nn.", "torch."))
    ]
    assert patches == [("sparsify.api", "nn.Module.sparsify = sparsify")]
