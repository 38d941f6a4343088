from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.codegen.emulator.device import EmulatedDevice
from sparsify.command_line.main import main
from sparsify.command_line.target import UsageError, load_target
from sparsify.errors import Refusal

ROOT = Path(__file__).parents[2]
MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(20, 128, bias=False)
        self.rec = nn.Linear(128, 128, bias=False)

    def forward(self, x):
        v = z = x.new_zeros(x.shape[1], 128)
        spikes = []
        for x_t in x:
            v = 0.5 * v + self.inp(x_t) + self.rec(z)
            z = self.spike(v - 1)
            v = v - z
            spikes.append(z)
        return torch.stack(spikes)

    def spike(self, above):
        return (above > 0).to(above.dtype)


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, above):
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx, grad):
        (above,) = ctx.saved_tensors
        return grad * torch.relu(1 - above.abs())


class Trainable(Net):
    def spike(self, above):
        return Spike.apply(above)


def make(batch=2, net=Net):
    torch.manual_seed(0)
    model = net().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randint(-32, 33, weight.shape) / 64)
    return model, (torch.rand(6, batch, 20) < 0.15).float()


def trainable(batch=2):
    return make(batch, Trainable)


def fixed():
    return make()


def as_tuple():
    model, x = make()
    return model, (x,)


def as_keywords():
    model, x = make()
    return model, {"x": x}


def dense():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.ones(2, 4)


def raises():
    return make(), wrong_name


def wrong_input():
    model, x = make()
    return model, x[:, :, :7]


def nothing():
    pass


def not_a_model():
    return 3, torch.ones(2)


def bad_inputs():
    return make()[0], 3


constant = 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "user_model.py"
    path.write_text(MODEL)
    before = list(sys.path)
    yield str(path)
    sys.path[:] = before
    sys.modules.pop("user_model", None)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("factory", ["make", "as_tuple", "as_keywords"])
def test_verify_prints_the_figures(
    file: str, factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "verify", f"{file}:{factory}")
    assert (status, err) == (0, "")
    assert re.search(r"verified: [12] of 2 sites run as events", out)
    assert "threshold decisions equal" in out


def test_verify_checks_gradients(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "verify", f"{file}:trainable", "--gradients")
    assert (status, err) == (0, "")
    assert "gradients, distance to float64" in out
    assert re.search(r"^  rec.weight +16,384 values ", out, re.MULTILINE)


def test_verify_finds_no_gradients_to_check(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Spikes of a comparison have none."""
    status, out, err = run(capsys, "verify", f"{file}:make", "--gradients")
    assert (status, out) == (1, "")
    assert err.startswith(
        "MismatchError: gradients are to be checked, and no result of the model has any"
    )


def test_verify_fails_when_too_little_was_compiled(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "verify", f"{file}:make", "--events", "3")
    assert (status, out) == (1, "")
    assert err.startswith("MismatchError: too little was compiled")
    status, out, err = run(capsys, "verify", f"{file}:dense", "--events", "1")
    assert (status, out) == (1, "")
    assert err.startswith("MismatchError: nothing was compiled: 0 of 1 sites run as events")
    assert "[no-event]" in err


def test_verify_says_that_nothing_is_replaced(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "verify", f"{file}:dense")
    assert (status, err) == (0, "")
    assert out.startswith("verified: 0 of 1 sites run as events: nothing is replaced\n  ")
    assert "[no-event]" in out


def test_strict_names_the_refused_site(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "bench", f"{file}:dense", "--strict")
    assert status == 1
    assert err.startswith("RefusedError: ") and "[no-event]" in err


def test_explain_says_what_is_done_and_why(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", f"{file}:make")
    assert status == 0
    assert "rec" in out and "event" in out
    status, out, _ = run(capsys, "explain", f"{file}:dense")
    assert status == 0
    assert "no-event" in out


def test_bench_prints_the_ratio_with_its_interval(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "bench", f"{file}:make", "--rounds", "3", "--batch", "4")
    assert status == (1 if "NOT VALID" in out else 0)
    assert re.search(r"sparsified +[\d.]+ ms +[\d.]+x \[[\d.]+, [\d.]+\]", out)
    assert "3 interleaved rounds" in out


def test_bench_times_training_steps(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "bench", f"{file}:trainable", "--gradients", "--rounds", "3")
    assert status == (1 if "NOT VALID" in out else 0)
    assert re.search(r"sparsified +[\d.]+ ms +[\d.]+x \[[\d.]+, [\d.]+\]", out)
    assert "calls with gradients: forward and backward" in out
    status, _, err = run(capsys, "bench", f"{file}:make", "--gradients", "--rounds", "3")
    assert status == 2
    assert "user_model.py:make returns nothing that requires grad, as --gradients needs" in err


def test_explain_and_show_of_training(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", f"{file}:trainable", "--gradients")
    assert status == 0
    assert "calls with gradients: forward and backward" in out
    assert "differentiate: " in out

    status, out, _ = run(capsys, "show", f"{file}:trainable", "--gradients")
    assert status == 0
    kernels = re.findall(r"^  (\S*backward\S*): .*float32, (\d+) lines$", out, re.MULTILINE)
    assert kernels, out
    for name, lines in kernels:
        _, source, _ = run(capsys, "show", f"{file}:trainable", "--gradients", "--kernel", name)
        assert len(source.splitlines()) == int(lines)


def test_show_prints_stages_and_kernels(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "show", f"{file}:make")
    assert status == 0
    for name in ("record: ", "roll_loops: ", "install: "):
        assert name in out
    kernel = re.search(r"^  (\w+): .*float32, (\d+) lines$", out, re.MULTILINE)
    assert kernel is not None

    status, source, _ = run(capsys, "show", f"{file}:make", "--kernel", kernel[1])
    assert status == 0
    assert len(source.splitlines()) == int(kernel[2])
    assert "user_model.py" in source

    status, graph, _ = run(capsys, "show", f"{file}:make", "--stage", "record")
    assert status == 0
    assert graph.count("aten.gt") == 6

    status, report, _ = run(capsys, "show", f"{file}:make", "--report")
    assert status == 0
    assert "rec" in report


@pytest.mark.parametrize(("option", "kind"), [("--stage", "stage"), ("--kernel", "kernel")])
def test_show_lists_what_there_is(
    file: str, option: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "show", f"{file}:make", option, "nonsense")
    assert (status, out) == (2, "")
    assert f"sparsify: there is no {kind} 'nonsense'; there is " in err


USAGE = {
    "model.py": "'model.py' is not FILE.py:factory, as in model.py:make",
    "model:make": "'model:make' is not FILE.py:factory",
    "{file}:": "is not FILE.py:factory",
    "absent.py:make": "there is no file absent.py",
    "{file}:absent": "has no absent; it defines make, trainable, fixed, as_tuple",
    "{file}:constant": "is a int; it has to be a function without arguments",
    "{file}:nothing": "returned None; it has to return (model, example_inputs)",
    "{file}:not_a_model": "returned a int for the model",
    "{file}:bad_inputs": "returned a int for the inputs; they have to be a tensor, a tuple",
}


@pytest.mark.parametrize("target", USAGE)
def test_wrong_targets_are_explained(
    target: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "verify", target.format(file=file))
    assert (status, out) == (2, "")
    assert err.startswith("sparsify: ")
    assert USAGE[target] in err


def test_a_factory_that_raises_shows_the_users_line(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "show", f"{file}:raises")
    assert status == 2
    assert "return make(), wrong_name" in err
    assert "NameError: name 'wrong_name' is not defined" in err
    assert "cli_target.py" not in err


def test_a_model_that_fails_on_its_example_shows_the_users_line(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "explain", f"{file}:wrong_input")
    assert status == 2
    assert "the model of user_model.py:wrong_input fails on the example" in err
    assert "self.inp(x_t)" in err
    assert "cli_" not in err


def test_a_file_that_cannot_be_imported_shows_the_users_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken_model.py"
    path.write_text("import torch\nraise RuntimeError('no data')\n")
    status, _, err = run(capsys, "show", f"{path}:make")
    assert status == 2
    assert f"{path} cannot be imported" in err
    assert "line 2" in err and "RuntimeError: no data" in err
    path.write_text("def make(:\n")
    status, _, err = run(capsys, "show", f"{path}:make")
    assert status == 2
    assert "SyntaxError" in err


def test_batch_is_passed_to_the_factory(file: str) -> None:
    assert load_target(f"{file}:make", batch=5).args[0].shape == (6, 5, 20)
    with pytest.raises(UsageError, match="--batch needs a factory that takes it: def fixed"):
        load_target(f"{file}:fixed", batch=5)


def test_files_next_to_the_model_can_be_imported(tmp_path: Path, file: str) -> None:
    (tmp_path / "beside.py").write_text("from user_model import make\n")
    path = tmp_path / "importing.py"
    path.write_text("from beside import make as imported\ndef make():\n    return imported()\n")
    assert load_target(f"{path}:make").name == "importing.py:make"


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["verify"], ["verify", "a.py:b", "--batch", "0"], ["bench", "--rounds"]],
)
def test_wrong_command_lines_have_status_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert "usage: sparsify" in err


def test_help_names_the_commands_and_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for word in ("demo", "explain", "verify", "bench", "show", "FILE.py:factory", "exit status"):
        assert word in out


def test_threads_are_set_for_the_command_and_put_back(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    assert "1 threads" in run(capsys, "bench", f"{file}:make", "--rounds", "1", "--threads", "1")[1]
    assert torch.get_num_threads() == before


def test_demo_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def run_demo(argv: list[str]) -> int:
        given.append(argv)
        return 5

    monkeypatch.setattr("sparsify.command_line.demo.main", run_demo)
    assert main(["demo", "--seed", "3"]) == 5
    assert given == [["--seed", "3"]]


def test_module_runs_as_a_command(file: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sparsify", "show", "absent.py:make"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "sparsify: there is no file absent.py\n"


def test_a_reader_that_has_enough_ends_the_command(file: str) -> None:
    shown = [sys.executable, "-m", "sparsify", "show", "--backend", "cuda", f"{file}:make"]
    process = subprocess.Popen(
        shown,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()  # before anything is printed: importing torch takes longer
    _, errors = process.communicate()
    assert errors == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_show_of_a_named_backend_compiles_nothing(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = run(capsys, "show", f"{file}:make")[1]

    def fail(*_: object) -> None:
        pytest.fail("show needs neither a compiler nor a device")

    for name in ("why_unavailable", "compile", "load"):
        monkeypatch.setattr(CppBackend, name, fail)
    status, out, _ = run(capsys, "show", f"{file}:make", "--backend", "cpp")
    assert status == 0
    assert out.split("\nkernels")[0] == compiled.split("\nkernels")[0]
    kernels = re.findall(r"^  (\w+): .*float32, (\d+) lines$", out, re.MULTILINE)
    assert kernels
    for name, lines in kernels:
        _, source, _ = run(capsys, "show", f"{file}:make", "--backend", "cpp", "--kernel", name)
        assert len(source.splitlines()) == int(lines)
    _, report, _ = run(capsys, "show", f"{file}:make", "--backend", "cpp", "--report")
    assert "kernels of the backend cpp (text only)" in report


def test_a_backend_that_cannot_run_here_says_what_to_install(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = Refusal("backend-unavailable", "No C++ compiler runs.", "Install one.")
    monkeypatch.setattr(CppBackend, "why_unavailable", lambda self: refusal)
    for command in ("verify", "bench", "explain"):
        status, out, err = run(capsys, command, f"{file}:make", "--backend", "cpp")
        assert (status, out) == (1, "")
        assert err == "BackendUnavailable: No C++ compiler runs. Install one.\n"


def test_backends_are_named_by_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "verify", "a.py:b", "--backend", "gpu")[0] == 2
    assert "{cpp,cuda,cuda-emulated}" in run(capsys, "verify", "--help")[1]


def test_show_renders_cuda_anywhere(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No device, driver, CuPy or compiler is asked; with gradients as well."""

    def fail(*_: object) -> None:
        pytest.fail("show needs neither a compiler nor a device")

    for name in ("compile", "load"):
        monkeypatch.setattr(Gpu, name, fail)
        monkeypatch.setattr(EmulatedDevice, name, fail)
    texts = []
    for backend in ("cuda", "cuda-emulated"):
        asked = ["show", f"{file}:trainable", "--gradients", "--backend", backend]
        status, out, _ = run(capsys, *asked)
        assert status == 0
        kernels = re.findall(r"^  (\S+): .*float32, \d+ lines$", out, re.MULTILINE)
        assert any("backward" in name for name in kernels), out
        sources = [run(capsys, *asked, "--kernel", name)[1] for name in kernels]
        assert all('extern "C" __global__' in source for source in sources)
        texts.append(sources)
    assert texts[0] == texts[1]


UNKNOWN_ORDER = (
    "sparsify: SPARSIFY_EMULATOR: unknown word 'sideways'; "
    "known: forward, reverse, random, random:SEED, unchecked\n"
)


def test_verify_on_the_emulator(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel of the model and of its gradients ran there; ``events`` are all by default."""
    asked = ["verify", f"{file}:trainable", "--gradients", "--backend", "cuda-emulated"]
    for setting in ("", "random:3"):
        monkeypatch.setenv("SPARSIFY_EMULATOR", setting)
        status, out, err = run(capsys, *asked)
        assert (status, err) == (0, "")
        assert re.search(r"^verified: [12] of 2 sites .* the backend cuda-emulated$", out, re.M)
        assert re.search(r"^  rec.weight +16,384 values ", out, re.MULTILINE)
    monkeypatch.setenv("SPARSIFY_EMULATOR", "sideways")
    assert run(capsys, *asked)[::2] == (2, UNKNOWN_ORDER)
    monkeypatch.delenv("SPARSIFY_EMULATOR")
    status, _, err = run(capsys, *asked, "--events", "3")
    assert status == 1
    assert "of 2 sites run as events, 3 are asked for" in err


def test_times_of_the_emulator_are_not_given(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "bench", f"{file}:make", "--backend", "cuda-emulated")
    assert (status, out) == (2, "")
    assert err.startswith("sparsify: times on cuda-emulated say nothing")
