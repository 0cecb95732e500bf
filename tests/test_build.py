"""The build's decisions, native unit tests under sanitizers, the torch symbols of the binding, loading with reasons."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moe_overlap.commands import cli, info
from moe_overlap.errors import ConfigError
from moe_overlap.native import build_info, native

ROOT = Path(__file__).resolve().parents[1]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_py(monkeypatch) -> ModuleType:
    """setup.py as a module: its functions, without running the build."""
    for name in ("MOE_OVERLAP_BUILD", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return load("moe_overlap_setup", ROOT / "setup.py")


# ---- what gets built ----


def test_none_leaves_everything_out(setup_py):
    assert setup_py.reasons_against("none") == dict.fromkeys(("_planner", "_C", "cuda"), "MOE_OVERLAP_BUILD=none")


@pytest.mark.parametrize(
    "absent, reason",
    [("cmake", "cmake not found"), ("g++", "no C++ compiler found"), ("ninja", "neither ninja nor make found")],
)
def test_auto_without_a_tool_leaves_both_parts_out(setup_py, monkeypatch, absent, reason):
    have = {"cmake", "c++", "g++", "clang++", "ninja", "make"} - {absent}
    have -= {"c++", "clang++"} if absent == "g++" else {"make"} if absent == "ninja" else set()
    monkeypatch.setattr(setup_py, "find_tool", lambda *names: next((n for n in names if n in have), None))
    against = setup_py.reasons_against("auto")
    assert reason in against["_planner"] and reason in against["_C"] and against["cuda"]


def test_auto_without_a_package_leaves_only_its_part_out(setup_py, monkeypatch):
    pytest.importorskip("pybind11")
    monkeypatch.setattr(setup_py, "missing_toolchain", lambda: None)
    found = setup_py.package_root
    monkeypatch.setattr(setup_py, "package_root", lambda name: None if name == "torch" else found(name))
    against = setup_py.reasons_against("auto")
    assert "torch is not installed" in against["_C"] and "_planner" not in against
    monkeypatch.setattr(setup_py, "package_root", lambda name: None if name == "pybind11" else found(name))
    against = setup_py.reasons_against("auto")
    assert "pybind11 is not installed" in against["_planner"] and "_C" not in against


def test_an_old_torch_is_named(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "package_version", lambda name: "2.9.1")
    assert setup_py.missing_for_torch() == "torch 2.9.1 is too old: 2.10 or later is needed"


def test_architectures_in_the_words_of_cmake(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "nvcc_output", lambda option: "compute_80\ncompute_90\n")
    assert setup_py.cuda_architectures() == "80-real;90-real;90-virtual"
    monkeypatch.setattr(setup_py, "nvcc_output", lambda option: "compute_90\ncompute_100\n")
    assert setup_py.cuda_architectures() == "80-real;90-real;90-virtual;100-real"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a 10.0+PTX")
    assert setup_py.cuda_architectures() == "80-real;90a-real;100-real;100-virtual"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST = 'Hopper': expected"):
        setup_py.cuda_architectures()


def test_bad_build_variables_are_refused(setup_py, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "0")
    with pytest.raises(SystemExit, match="MAX_JOBS = '0': expected a whole number >= 1"):
        setup_py.max_jobs()
    monkeypatch.setenv("MOE_OVERLAP_BUILD", "gpu")
    with pytest.raises(SystemExit, match="MOE_OVERLAP_BUILD = 'gpu': expected one of auto, cpu, cuda, none"):
        setup_py.build_mode()


def build_in(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build` on a copy of the native sources and one Python file."""
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "moe_overlap/native").mkdir(parents=True)
    for name in ("moe_overlap/__init__.py", "moe_overlap/native/__init__.py"):
        (folder / name).write_text("")
    (folder / "moe_overlap/native/build_info.py").write_text('VERSION = "0"\n')
    (folder / "README.md").write_text("")
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "lib"]
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=400, check=False
    )


def test_auto_survives_a_compiler_that_fails(tmp_path):
    pytest.importorskip("pybind11")
    done = build_in(tmp_path, MOE_OVERLAP_BUILD="auto", CXX="false")
    assert done.returncode == 0, done.stderr
    record = build_info.read(tmp_path / "lib/moe_overlap/native/_build_info.json")
    assert record.mode == "auto" and record.built == {}
    assert "cmake failed" in record.left_out["_planner"] and "cmake failed" in record.left_out["_C"]
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_a_mode_that_cannot_be_had_fails(tmp_path):
    done = build_in(tmp_path, MOE_OVERLAP_BUILD="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "MOE_OVERLAP_BUILD=cpu" in done.stderr and "no C++ compiler" in done.stderr


def test_without_nvcc_the_rest_is_built(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: None)
    assert setup_py.reasons_against("auto").get("cuda") in ("nvcc not found", setup_py.missing_toolchain())
    assert setup_py.nvcc_version() == "unknown" and setup_py.cuda_architectures() == "80-real;90-real;90-virtual"


def test_auto_survives_an_nvcc_that_fails(setup_py, tmp_path):
    if reason := setup_py.missing_toolchain() or setup_py.missing_for_planner() or setup_py.missing_for_torch():
        pytest.skip(reason)
    done = build_in(tmp_path, MOE_OVERLAP_BUILD="auto", CUDACXX=shutil.which("false") or "false")
    assert done.returncode == 0, done.stderr
    record = build_info.read(tmp_path / "lib/moe_overlap/native/_build_info.json")
    expected = "cmake failed" if torch.version.cuda else "this torch has no CUDA"
    assert set(record.built) == {"_planner", "_C"} and expected in record.left_out["cuda"]
    assert not (tmp_path / "lib/moe_overlap/native/_kernels.json").exists()


def test_digest_of_the_kernels_changes_with_them(setup_py, monkeypatch, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(setup_py, "ROOT", tmp_path)
    before = setup_py.kernel_sources()
    assert before == setup_py.kernel_sources()
    with (tmp_path / "csrc/kernels/pack.cu").open("a") as file:
        file.write("// changed\n")
    assert setup_py.kernel_sources() != before


# ---- native code ----


@pytest.mark.time_limit(1800)  # compiles the core, the harness and every kernel: a minute where nothing else runs
@pytest.mark.parametrize("kind", ["sanitized", "release"])
def test_native_unit_tests(setup_py, tmp_path, kind):
    """All of them under sanitizers; the core's again as it is built for use, where they see every window. On one core:
    other tests, which start ranks, run at the same time."""
    cmake, ctest, ninja = (setup_py.find_tool(name) for name in ("cmake", "ctest", "ninja"))
    if missing := setup_py.missing_toolchain():
        pytest.skip(missing)
    if not ctest:
        pytest.skip("ctest not found")
    sanitized = kind == "sanitized"
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path)]
    configure += ["-DMOE_OVERLAP_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"] if sanitized else []
    configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    for command in (
        configure,
        [cmake, "--build", str(tmp_path), "-j", "1", *([] if sanitized else ["-t", "test_core"])],
        [ctest, "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error",
         *([] if sanitized else ["-R", "^core$"])],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_binding_asks_for_nothing_that_torch_2_10_lacks():
    symbols = load("stable_symbols", ROOT / "tests/native/stable_symbols.py")
    path = native.part("ops").path
    if path is None or not shutil.which("nm"):
        pytest.skip(native.reason("ops") if path is None else "nm is not on PATH")
    allowed = set(symbols.LIST.read_text(encoding="utf-8").split())
    asked = symbols.undefined(Path(path))
    assert "torch_library_impl" in asked
    assert set(asked) - allowed == set()


def test_symbol_list_is_what_the_headers_say():
    symbols = load("stable_symbols", ROOT / "tests/native/stable_symbols.py")
    if not torch.__version__.startswith("2.13.") or not symbols.compiler():
        pytest.skip(f"needs the headers of torch 2.13 and a compiler; this is torch {torch.__version__}")
    include = Path(torch.__file__).parent / "include"
    listed = symbols.LIST.read_text(encoding="utf-8").split()
    assert symbols.derive(include) == listed
    newest = symbols.derive(include, target="0x020d000000000000ULL")
    assert "torch_exception_get_what" in newest and "torch_exception_get_what" not in listed


# ---- loading and telling ----


def test_a_broken_part_keeps_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "PACKAGE_DIR", tmp_path)
    native._load_ops.cache_clear()
    try:
        (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
        assert not native.load_ops()
        assert "_C.abi3.so failed to load: OSError" in native.reason("ops")
    finally:
        native._load_ops.cache_clear()


def test_an_absent_part_says_what_the_build_said(tmp_path, monkeypatch):
    record = {"mode": "auto", "built": {}, "left_out": {"_C": "cmake not found"}, "versions": {}}
    (tmp_path / "_build_info.json").write_text(json.dumps(record))
    monkeypatch.setattr(native, "PACKAGE_DIR", tmp_path)
    monkeypatch.setattr(build_info, "FILE", tmp_path / "_build_info.json")
    native._load_ops.cache_clear()
    try:
        assert native.reason("ops") == "left out by the build (MOE_OVERLAP_BUILD=auto): cmake not found"
    finally:
        native._load_ops.cache_clear()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"mode": 1}', '{"mode": "cpu", "built": 3}'])
def test_a_damaged_record_is_not_built(tmp_path, text):
    path = tmp_path / "_build_info.json"
    assert build_info.read(path) == build_info.NOT_BUILT
    path.write_text(text)
    assert build_info.read(path) == build_info.NOT_BUILT


def test_info_tells_versions_parts_choices_and_environment(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in (torch.__version__, "planner:", "ops:", "simulator:", "row_map", "MOE_OVERLAP_TIMEOUT_S"):
        assert expected in text
    assert "WARNING: CUDA_DEVICE_MAX_CONNECTIONS=1" in text
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    assert not any("WARNING" in line for line in info.lines())


def test_bad_input_is_one_line_and_exit_status_2(monkeypatch, capsys):
    def refuse(argv):
        raise ConfigError("--steps", argv[0], "a whole number\n>= 1")

    monkeypatch.setattr(info, "main", refuse)
    assert cli.main(["info", "-3"]) == 2
    assert capsys.readouterr().err == "moe-overlap info: error: --steps = '-3': expected a whole number >= 1\n"
    with pytest.raises(SystemExit) as caught:
        cli.main(["no-such-command"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- make ----


def make(*words: str) -> subprocess.CompletedProcess[str]:
    if not shutil.which("make"):
        pytest.skip("make is not on PATH")
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_set_up_takes_torch_first_then_the_pins_then_this_package(tmp_path):
    plan = make("-n", "setup", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv").stdout
    steps = [
        "-m venv",
        "^torch==",
        "grep -vE '^(triton|torchtitan)==')",
        "install --no-deps $(grep -E '^(triton|torchtitan)==",
        "--no-deps -e .",
    ]
    places = [plan.index(step) for step in steps]
    assert places == sorted(places)
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins and all(line.count("==") == 1 for line in pins)


def test_set_up_in_the_current_environment_downloads_nothing(tmp_path):
    plan = make("-n", "-B", "setup", f"PYTHON={sys.executable}", "VENV=").stdout
    installs = [line for line in plan.splitlines() if "pip install" in line]
    assert installs == [f"{sys.executable} -m pip install --no-build-isolation --no-deps -e ."]


def test_make_gpu_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: make gpu would run for minutes")
    done = make("gpu", f"PYTHON={sys.executable}")
    assert done.returncode != 0 and "make gpu: no CUDA device" in done.stderr


def test_info_answers_first_and_has_reasons_only_when_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_OVERLAP_CACHE_DIR", str(tmp_path))
    short, long = "\n".join(info.lines()), "\n".join(info.lines(verbose=True))
    assert short.startswith("moe-overlap works here on CPU")
    assert "on cpu: reference for " in short and "runs everywhere" not in short
    assert "row_map: " in long and "runs everywhere" in long
    assert f"cost models in {tmp_path}: 0, " in short
