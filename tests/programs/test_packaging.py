"""What the distribution holds, and the two links that let the tree be read in place."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "sparsify": "sparsify",
    "sparsify/checking": "sparsify/checking",
    "sparsify/choosing": "sparsify/choosing",
    "sparsify/codegen": "codegen",
    "sparsify/codegen/cpp": "codegen/cpp",
    "sparsify/codegen/cuda": "codegen/cuda",
    "sparsify/codegen/emulator": "codegen/emulator",
    "sparsify/command_line": "sparsify/command_line",
    "sparsify/comparing": "sparsify/comparing",
    "sparsify/compiling": "sparsify/compiling",
    "sparsify/graphs": "sparsify/graphs",
    "sparsify/passes": "passes",
    "sparsify/passes/events": "passes/events",
    "sparsify/passes/gradients": "passes/gradients",
    "sparsify/passes/hoisting": "passes/hoisting",
    "sparsify/passes/loops": "passes/loops",
    "sparsify/passes/lowering": "passes/lowering",
    "sparsify/passes/nodes": "passes/nodes",
    "sparsify/passes/packing": "passes/packing",
    "sparsify/passes/products": "passes/products",
    "sparsify/passes/recurrent_layers": "passes/recurrent_layers",
    "sparsify/passes/results": "passes/results",
    "sparsify/passes/sizes": "passes/sizes",
    "sparsify/products": "sparsify/products",
    "sparsify/pruning": "sparsify/pruning",
    "sparsify/recording": "sparsify/recording",
    "sparsify/regions": "sparsify/regions",
    "sparsify/rounding": "sparsify/rounding",
    "sparsify/scalars": "sparsify/scalars",
    "sparsify/scans": "sparsify/scans",
    "sparsify/serving": "sparsify/serving",
    "sparsify/verification": "sparsify/verification",
}
SHIPPED = {".py", ".h", ".cpp", ".cuh", ".typed"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of what is shipped so that the checkout stays clean."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "pytest_sparsify.py"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    for folder in {*FOLDERS.values()}:
        (tree / folder).mkdir(parents=True, exist_ok=True)
        for path in (ROOT / folder).iterdir():
            if path.is_file():
                (tree / folder / path.name).write_bytes(path.read_bytes())
    code = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_source_of_the_package(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{package}/{path.name}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).iterdir()
        if path.suffix in SHIPPED
    }
    expected.add("pytest_sparsify.py")
    assert {"sparsify/py.typed", "sparsify/codegen/cpp/kernel.h"} <= expected
    assert "sparsify/codegen/cuda/device.py" in expected
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == expected


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = wheel.read(name).decode()
    assert "Name: sparsify-fx" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    for needed in ("torch>=2.11", "numpy", "networkx"):
        assert f"Requires-Dist: {needed}\n" in metadata
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "sparsify = sparsify.command_line.main:main" in wheel.read(entry_points).decode()


def test_licence_is_the_whole_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("name", ["passes", "codegen"])
def test_links_are_relative_and_committed(name: str) -> None:
    link = ROOT / "sparsify" / name
    assert os.readlink(link) == f"../{name}"
    listing = subprocess.run(
        ["git", "ls-files", "-s", f"sparsify/{name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listing.stdout.startswith("120000 ")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("passes", ""),
        ("codegen", ""),
        ("cpp", "codegen"),
        ("cuda", "codegen"),
        ("emulator", "codegen"),
    ],
)
def test_bare_names_are_refused(name: str, folder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        cwd=ROOT / folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    full = ".".join(filter(None, ["sparsify", folder, name]))
    assert f"import this package as {full}, not as {name}" in done.stderr


def test_mapping_lists_every_folder(project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    assert {name.replace(".", "/") for name in setuptools["packages"]} == set(FOLDERS)
    for name, folder in setuptools["package-dir"].items():
        assert FOLDERS[name.replace(".", "/")] == folder


def test_every_file_of_a_shipped_folder_is_shipped_or_is_no_source() -> None:
    """A suffix that no pattern of the package data names would be left out of the wheel."""
    for folder in FOLDERS.values():
        for path in (ROOT / folder).iterdir():
            if path.is_file():
                assert path.suffix in SHIPPED, path


def test_extras_are_installed(project: dict[str, Any]) -> None:
    """Tests run with everything that the extra promises, and need nothing else."""
    for requirement in project["project"]["optional-dependencies"]["test"]:
        importlib.metadata.distribution(requirement.split(">")[0])
