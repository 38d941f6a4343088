"""Who may import whom, read from the sources: a package knows what stands before it in a list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What may be missing where the package is installed, so is imported where it is used.
OPTIONAL = {"sklearn", "tqdm", "jax", "pytest", "cupy", "cupy_backends"}
# Modules that stand alone, and packages in the order in which they may know one another.
VOCABULARY = {
    "sparsify",
    "sparsify.arrangement",
    "sparsify.autocast",
    "sparsify.bench",
    "sparsify.call_conditions",
    "sparsify.errors",
    "sparsify.free_lock",
    "sparsify.free_memory",
    "sparsify.graph_meta",
    "sparsify.interpreter",
    "sparsify.ir",
    "sparsify.options",
    "sparsify.plan",
    "sparsify.saved_bits",
    "sparsify.thread_count",
    "sparsify.training_step",
    "sparsify.uncollected",
    "sparsify.weight_pattern",
}
LAYERS = (
    "sparsify.recording",
    "sparsify.scalars",
    "sparsify.check_ir",
    "sparsify.reference",
    "sparsify.codegen",
    "sparsify.codegen.cpp",
    "sparsify.codegen.cuda",
    "sparsify.codegen.emulator",
    "sparsify.scans",
    "sparsify.regions",
    "sparsify.passes",
    "sparsify.passes.nodes",
    "sparsify.passes.events",
    "sparsify.passes.lowering",
    "sparsify.passes.hoisting",
    "sparsify.passes.products",
    "sparsify.passes.recurrent_layers",
    "sparsify.passes.loops",
    "sparsify.passes.gradients",
    "sparsify.passes.pipeline",
    "sparsify.passes.packing",
    "sparsify.passes.sizes",
    "sparsify.passes.results",
    "sparsify.graphs",
    "sparsify.products",
    "sparsify.checking",
    "sparsify.rounding",
    "sparsify.comparing",
    "sparsify.choosing",
    "sparsify.compiling",
    "sparsify.serving",
    "sparsify.pruning",
    "sparsify.api",
    "sparsify.verification",
    "sparsify.command_line",
    "sparsify.__main__",
)
DEFERRED = {
    # A pickle of a sparsified module must not pay for the engine's imports; a cycle otherwise.
    ("sparsify.serving.install", "sparsify.serving.engine"),
}


def sources() -> dict[str, ast.Module]:
    """Every module of the package by its import name."""
    found: dict[str, ast.Module] = {}
    for top, package in (
        (ROOT / "sparsify", "sparsify"),
        (ROOT / "passes", "sparsify.passes"),  # a link within sparsify, not followed by rglob
        (ROOT / "codegen", "sparsify.codegen"),
    ):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found.setdefault(name, ast.parse(path.read_text(encoding="utf-8"), str(path)))
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
    assert {
        "sparsify.ir",
        "sparsify.codegen.cpp.backend",
        "sparsify.passes.loops.roll_loops",
    } <= set(MODULES)
    assert {"sparsify.codegen.cuda.device", "sparsify.codegen.emulator"} <= set(MODULES)
    assert "sparsify.recording.recording" in MODULES


def layer_of(module: str) -> int:
    """The place in ``LAYERS`` of the innermost one; -1 for the vocabulary."""
    if module in VOCABULARY:
        return -1
    within = (layer for layer in LAYERS if is_within(module, layer))
    return LAYERS.index(max(within, key=len))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"sparsify"}))
def test_imports_go_one_way(module: str) -> None:
    deferred = {name for importer, name in DEFERRED if importer == module}
    for name in (imported(module) & set(MODULES)) - deferred - {"sparsify"}:
        assert layer_of(name) <= layer_of(module), f"{module} imports {name}"


def test_every_layer_has_modules() -> None:
    assert set(MODULES) >= VOCABULARY
    assert all(modules_in(layer) for layer in LAYERS)


@pytest.mark.parametrize("module", modules_in("sparsify.codegen"))
def test_codegen_knows_no_graphs(module: str) -> None:
    for name in imported(module):
        for forbidden in ("torch.fx", "sparsify.recording"):
            assert not is_within(name, forbidden), f"{module} imports {name}"


@pytest.mark.parametrize("module", modules_in("sparsify.passes"))
def test_passes_know_no_codegen(module: str) -> None:
    assert not any(is_within(name, "sparsify.codegen") for name in imported(module))


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
