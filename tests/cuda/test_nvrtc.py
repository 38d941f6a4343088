"""CUDA text to cubin without a GPU: what NVRTC is asked, and what it answers."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda import nvrtc
from sparsify.codegen.cuda.device import KIB, STATED, Grid, Limits
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.codegen.cuda.nvrtc import Usage
from sparsify.codegen.cuda.occupancy import why_not_resident
from sparsify.errors import BackendUnavailable, CompileError, Refusal
from tests.cuda_wheels import needs_nvrtc

HERE = Path(__file__).parents[1]
TWICE = {"twice.cuh": "__device__ inline float twice(float x) { return x + x; }\n"}
DOUBLED = Source((HERE / "cuda" / "doubled.cu").read_text(), "doubled.cu", "run_doubled")

pytestmark = needs_nvrtc


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kernel(body: str, name: str = "f") -> Source:
    text = f'extern "C" __global__ void {name}(const float *x, float *y) {{\n{body}\n}}\n'
    return Source(text, f"{name}.cu", name)


@pytest.mark.parametrize("limits", STATED, ids=lambda limits: limits.architecture)
def test_a_kernel_for_every_target(limits: Limits) -> None:
    cubin = nvrtc.compile_cubin(DOUBLED, TWICE, limits.architecture)
    usage = nvrtc.usage_of(cubin, "run_doubled")
    assert 0 < usage.registers <= 40
    assert usage == Usage(usage.registers, shared_bytes=1024, stack_bytes=0, spill_bytes=0)
    assert why_not_resident(limits, usage, Grid(70000, 256, 48 * KIB)) is None


@pytest.mark.parametrize("target", nvrtc.TARGETS)
def test_the_cubin_is_whole(target: str) -> None:
    """An ELF file that ends with its tables; without its last byte it would not hold them."""
    content = nvrtc.compile_cubin(DOUBLED, TWICE, target).read_bytes()
    assert content[:5] == b"\x7fELF\x02"
    programs, sections = struct.unpack_from("<QQ", content, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from(
        "<4H", content, 54
    )
    ends = (programs + program_size * program_count, sections + section_size * section_count)
    assert max(ends) == len(content)


def test_an_entry_is_made_once_and_holds_source_headers_and_log(cache: Path) -> None:
    cubin = nvrtc.compile_cubin(DOUBLED, TWICE, "sm_90")
    written = cubin.stat().st_mtime_ns
    assert nvrtc.compile_cubin(DOUBLED, TWICE, "sm_90") == cubin
    assert cubin.stat().st_mtime_ns == written
    assert {path.name for path in cubin.parent.iterdir()} == {
        *("doubled.cu", "twice.cuh", "kernel.cubin", "ptxas.txt", "entry.json")
    }
    parts = json.loads((cubin.parent / "entry.json").read_text())["parts"]
    major, minor = nvrtc.nvrtc_version()
    assert parts["NVRTC version"] == f"{major}.{minor}" and parts["architecture"] == "sm_90"
    assert "--fmad=false" in parts["options"] and parts["header twice.cuh"] == TWICE["twice.cuh"]


def test_all_that_matters_is_part_of_the_key(cache: Path) -> None:
    other = Source(DOUBLED.text.replace("3.0f", "5.0f"), "doubled.cu", "run_doubled")
    entries = [
        nvrtc.recipe_for(DOUBLED, TWICE, "sm_90", False).entry,
        nvrtc.recipe_for(DOUBLED, TWICE, "sm_100", False).entry,
        nvrtc.recipe_for(DOUBLED, {"twice.cuh": TWICE["twice.cuh"] + "\n"}, "sm_90", False).entry,
        nvrtc.recipe_for(other, TWICE, "sm_90", False).entry,
        nvrtc.recipe_for(other, TWICE, "sm_90", True).entry,
    ]
    assert len({*entries}) == len(entries)


def test_numbers_are_those_of_ieee() -> None:
    """Read from the virtual assembly, which the options shape like the real one."""
    api = nvrtc.find_nvrtc()
    assert not isinstance(api, Refusal)
    text = kernel("y[0] = x[0] * x[1] + x[2]; y[1] = x[3] / x[4]; y[2] = sqrtf(x[5]);").text
    program = api.createProgram(text, "f.cu", (), ())
    options = [o for o in nvrtc.options_for("compute_90", False) if "ptxas" not in o]
    api.compileProgram(program, options)
    assembly = api.getPTX(program).decode()
    api.destroyProgram(program)
    for instruction in ("mul.rn.f32", "add.rn.f32", "div.rn.f32", "sqrt.rn.f32"):
        assert instruction in assembly
    for other in ("fma.", ".ftz", ".approx", ".full"):
        assert other not in assembly


def test_a_spill_is_an_error_unless_it_is_allowed(cache: Path) -> None:
    wide = kernel(
        "float a[200];\n#pragma unroll\nfor (int i = 0; i < 200; ++i) a[i] = x[i * blockDim.x];\n"
        "__syncthreads();\n#pragma unroll\nfor (int i = 0; i < 200; ++i)\n"
        "  y[i] = a[i] * a[i * 7 % 200];"
    )
    wide = Source(wide.text.replace("void f", "void __launch_bounds__(1024) f"), "f.cu", "f")
    with pytest.raises(CompileError, match="Registers are spilled to local memory"):
        nvrtc.compile_cubin(wide, {}, "sm_90")
    allowed = nvrtc.compile_cubin(wide, {}, "sm_90", spills=True)
    assert nvrtc.usage_of(allowed, "f").spill_bytes > 0
    assert Gpu("sm_90").compile(wide, {}) == allowed


def test_an_error_has_the_log_and_the_kept_source(cache: Path) -> None:
    with pytest.raises(CompileError, match=r"NVRTC [\d.]+ rejected f\.cu: ") as caught:
        nvrtc.compile_cubin(kernel("y[0] = z;"), TWICE, "sm_90")
    assert 'f.cu(2): error: identifier "z" is undefined' in caught.value.log
    kept = Path(caught.value.source_path)
    assert kept.read_text() == kernel("y[0] = z;").text
    assert (kept.parent / "twice.cuh").exists() and (kept.parent / "log.txt").exists()


def test_names_that_are_no_unicode(cache: Path) -> None:
    """A model's file may have any name, and it stands in a comment."""
    odd = kernel("// from \udcff.py\ny[0] = x[0];")
    assert nvrtc.compile_cubin(odd, {"odd.cuh": "// \udcff\n"}, "sm_90").exists()


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((12, 0), "sm_120"), ((8, 5), "sm_80")],
)
def test_targets_of_devices(capability: tuple[int, int], target: str) -> None:
    assert nvrtc.architecture_for(capability) == target


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((6, 1), "The GPU has compute capability 6.1; kernels need at least 7.0."),
        ((7, 0), "does not compile for compute capability 7.0."),
        ((99, 0), "does not compile for compute capability 99.0."),
    ],
)
def test_devices_without_a_target(capability: tuple[int, int], reason: str) -> None:
    found = nvrtc.architecture_for(capability)
    if capability == (7, 0) and nvrtc.nvrtc_version() < (13, 0):
        assert found == "sm_70"
        return
    assert isinstance(found, Refusal) and reason in found.reason and found.remedy


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    found = nvrtc.find_nvrtc.__wrapped__()
    assert isinstance(found, Refusal) and "pip install 'sparsify-fx[cuda13]'" in found.remedy
    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: found)
    with pytest.raises(BackendUnavailable, match="CuPy is not installed"):
        nvrtc.nvrtc_version()


def test_a_log_without_the_function() -> None:
    with pytest.raises(ValueError, match="no function 'run_other'"):
        nvrtc.parse_usage("ptxas info    : 0 bytes gmem\n", "run_other")
