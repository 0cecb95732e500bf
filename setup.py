"""Builds the package: runs CMakeLists.txt (which owns every native source) and links the one torch binding.

Environment:
    MOE_OVERLAP_BUILD     auto (default): build what can be built and torch can use, never fail. cpu: the
                          compiled CPU parts or an error. cuda: the CUDA kernels as well or an error. none: pure
                          Python.
    TORCH_CUDA_ARCH_LIST  architectures of the CUDA kernels, as for torch extensions (default "8.0;9.0+PTX", and "10.0"
                          where nvcc knows it)
    MAX_JOBS              parallel compiler jobs (default: the cores this process may use)

What was built, and what was left out for which reason, is written beside the parts, into `moe_overlap/native/`, as
`_build_info.json`, because pip hides the output of a build that succeeds. `_kernels.json` there has the registers,
spills and shared memory of each CUDA kernel. torch is located but never imported, and no GPU is ever asked for.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CompileError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
PARTS = ("_planner", "_C", "cuda")
PARTS_FOLDER = "moe_overlap/native"  # where the compiled parts and the record of the build go
KERNEL_REPORT = "_kernels.json"
TORCH_FLOOR = (2, 10)
# Only symbols that torch 2.10 already exports may be used; tests/test_build.py checks what the binding asks for.
TORCH_TARGET_VERSION = "0x020a000000000000ULL"


def build_mode() -> str:
    mode = os.environ.get("MOE_OVERLAP_BUILD", "") or "auto"
    if mode not in MODES:
        raise SystemExit(f"MOE_OVERLAP_BUILD = {mode!r}: expected one of {', '.join(MODES)}")
    return mode


def max_jobs() -> int:
    text = os.environ.get("MAX_JOBS", "")
    if not text:
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) < 1:
        raise SystemExit(f"MAX_JOBS = {text!r}: expected a whole number >= 1")
    return int(text)


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST in CMake's words: "8.0;9.0+PTX" -> "80-real;90-real;90-virtual"."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "") or default_architectures(nvcc_output("--list-gpu-arch"))
    result = []
    for item in text.replace(" ", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST = {text!r}: expected items such as 8.0, 9.0a or 9.0+PTX")
        number = match[1] + match[2]
        result += [f"{number}-real"] + ([f"{number}-virtual"] if match[3] else [])
    return ";".join(result)


def default_architectures(known: str) -> str:
    """known: what `nvcc --list-gpu-arch` prints. 10.0 came with nvcc 12.8."""
    return "8.0;9.0+PTX;10.0" if "compute_100" in known.split() else "8.0;9.0+PTX"


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or find_tool("nvcc")


def nvcc_output(option: str) -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        return ""
    return subprocess.run([nvcc, option], stdout=subprocess.PIPE, text=True, check=False).stdout


def nvcc_version() -> str:
    """As in `nvcc --version`: "13.0.88"."""
    found = re.search(r"\bV(\d+(?:\.\d+)+)", nvcc_output("--version"))
    return found[1] if found else "unknown"


def kernel_sources() -> str:
    """A digest of what the kernels are made from: a check on a GPU holds for these sources only."""
    digest = hashlib.sha256()
    for path in sorted(
        [*(ROOT / "csrc/kernels").iterdir(), *(ROOT / "csrc/core").glob("*.h"), *(ROOT / "csrc/bindings").iterdir()]
    ):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_tool(*names: str) -> str | None:
    """A program of the running Python's environment (which need not be activated), else one on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def find_compiler() -> str | None:
    return find_tool(os.environ["CXX"].split()[0]) if os.environ.get("CXX") else find_tool("c++", "g++", "clang++")


def package_root(name: str) -> Path | None:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_toolchain() -> str | None:
    if sys.platform != "linux":
        return f"compiled parts are for Linux, this is {sys.platform}"
    if not find_compiler():
        return "no C++ compiler found (CXX, c++, g++ or clang++)"
    if not find_tool("cmake"):
        return "cmake not found"
    if not find_tool("ninja", "make"):
        return "neither ninja nor make found"
    return None


def missing_for_planner() -> str | None:
    if package_root("pybind11") is None:
        return "pybind11 is not installed in the environment that builds (use pip install --no-build-isolation)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the headers of this Python (Python.h) are not installed"
    return None


def missing_for_torch() -> str | None:
    root, version = package_root("torch"), package_version("torch")
    if root is None or version is None:
        return "torch is not installed in the environment that builds (use pip install --no-build-isolation)"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or (int(numbers[1]), int(numbers[2])) < TORCH_FLOOR:
        return f"torch {version} is too old: 2.10 or later is needed"
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        return f"torch {version} comes without its C++ headers"
    return None


def missing_for_cuda(mode: str) -> str | None:
    if not find_nvcc():
        return "nvcc not found"
    version = (package_root("torch") or Path("torch")) / "version.py"
    if mode == "auto" and version.is_file() and runpy.run_path(str(version)).get("cuda") is None:
        return "this torch has no CUDA (MOE_OVERLAP_BUILD=cuda builds the kernels all the same)"
    return None


def reasons_against(mode: str) -> dict[str, str]:
    """part -> why it is not going to be built; a part that is missing here is going to be built."""
    if mode == "none":
        return dict.fromkeys(PARTS, "MOE_OVERLAP_BUILD=none")
    toolchain = missing_toolchain()
    found = {
        "_planner": toolchain or missing_for_planner(),
        "_C": toolchain or missing_for_torch(),
        "cuda": "MOE_OVERLAP_BUILD=cpu"
        if mode == "cpu"
        else toolchain or missing_for_cuda(mode) or missing_for_torch(),
    }
    return {part: reason for part, reason in found.items() if reason}


def extensions(parts: list[str]) -> list[Extension]:
    result = []
    if "_planner" in parts:
        result.append(Extension("moe_overlap.native._planner", []))  # made by CMake
    if "_C" in parts:
        torch = package_root("torch") or Path("torch")
        binding = Extension(
            "moe_overlap.native._C",
            [f"csrc/bindings/torch_{part}.cpp" for part in ("ops", "gate_ops", "row_ops")],
            include_dirs=[str(ROOT / "csrc"), str(torch / "include")],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            language="c++",
            py_limited_api=True,  # it uses nothing of Python: one file serves every version
        )
        result.append(binding)
    return result


def remove_compiled(folder: Path) -> None:
    """A part that an earlier build left behind would be loaded although this build leaves it out."""
    for pattern in ("_planner.*so", "_C.*so", KERNEL_REPORT):
        for path in folder.glob(pattern):
            path.unlink()


def write_info(folder: Path, built: dict[str, str], left_out: dict[str, str]) -> None:
    versions = {name: version for name in ("torch", "pybind11", "setuptools") if (version := package_version(name))}
    versions |= {"python": platform.python_version(), "compiler": compiler_version()}
    if "cuda" in built:
        versions |= {"nvcc": nvcc_version(), "kernels": kernel_sources()}
    info = {"mode": MODE, "built": built, "left_out": left_out, "versions": versions}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    for part, reason in left_out.items():
        print(f"moe_overlap: {part} left out: {reason}", file=sys.stderr)


def compiler_version() -> str:
    compiler = find_compiler()
    if compiler is None:
        return "none"
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0]


class BuildPython(build_py):
    """Copies the Python files. The record written here is the final one when nothing is compiled."""

    def run(self) -> None:
        super().run()
        folder = ROOT / PARTS_FOLDER if self.editable_mode else Path(self.build_lib, PARTS_FOLDER)
        remove_compiled(folder)
        write_info(folder, {}, AGAINST)


class BuildNative(build_ext):
    """Runs CMake once, takes `_planner` and the static core from it, and links `_C` against the core."""

    extensions: list[Extension]

    def run(self) -> None:
        self.left_out = dict(AGAINST)
        super().run()
        folder = ROOT / PARTS_FOLDER if self.inplace else Path(self.build_lib, PARTS_FOLDER)
        built = {ext.name.rpartition(".")[2]: Path(self.get_ext_filename(ext.name)).name for ext in self.extensions}
        if "_C" in built and "cuda" not in self.left_out:
            built["cuda"] = built["_C"]  # the kernels are in the same file
            self.write_kernel_report(folder)
        write_info(folder, built, self.left_out)

    def build_extensions(self) -> None:
        required = {"cpu": ("_planner", "_C"), "cuda": PARTS}.get(MODE, ())
        for part in required:
            if part in self.left_out:
                raise CompileError(f"MOE_OVERLAP_BUILD={MODE}: cannot build {part}: {self.left_out[part]}")
        try:
            self.run_cmake_with_or_without_cuda()
        except CompileError as error:
            self.give_up(list(self.extensions), error)
        for ext in list(self.extensions):
            try:
                self.build_extension(ext)
            except BaseError as error:
                self.give_up([ext], error)

    def give_up(self, failed: list[Extension], error: Exception) -> None:
        """In auto mode a part that does not compile is left out, with the reason; else the build fails."""
        if MODE != "auto":
            raise error
        for ext in failed:
            self.left_out[ext.name.rpartition(".")[2]] = one_line(error)
            if ext.name == "moe_overlap.native._C":
                self.left_out.setdefault("cuda", "it is part of _C, which was left out")
        self.extensions = [ext for ext in self.extensions if ext not in failed]

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if ext.name == "moe_overlap.native._planner":
            target.parent.mkdir(parents=True, exist_ok=True)
            (made,) = self.cmake_dir.glob("_planner.*so")
            shutil.copy2(made, target)
            return
        if "cuda" not in self.left_out:
            ext.sources.append("csrc/bindings/torch_cuda_ops.cpp")
            runtime = (self.cmake_dir / "cudart_static.path").read_text(encoding="utf-8")
            ext.extra_objects += [str(self.cmake_dir / "libmoe_overlap_kernels.a"), runtime]
            ext.libraries += ["dl", "pthread", "rt"]  # what the CUDA runtime needs
        ext.extra_objects.append(str(self.cmake_dir / "libmoe_overlap_core.a"))
        ext.depends = [*ext.extra_objects, *map(str, (ROOT / "csrc").rglob("*.h"))]
        super().build_extension(ext)

    @property
    def cmake_dir(self) -> Path:
        return Path(self.build_temp).resolve() / "cmake"

    def write_kernel_report(self, folder: Path) -> None:
        collect = runpy.run_path(str(ROOT / "csrc/ptxas_report.py"))["collect"]
        rows = collect(self.cmake_dir / "CMakeFiles/moe_overlap_kernels.dir")
        text = json.dumps({"nvcc": nvcc_version(), "kernels": rows}, indent=1)
        (folder / KERNEL_REPORT).write_text(text + "\n", encoding="utf-8")

    def run_cmake_with_or_without_cuda(self) -> None:
        """In auto mode kernels that do not compile are left out, and the rest is built without them."""
        if "cuda" not in self.left_out:
            try:
                return self.run_cmake()
            except CompileError as error:
                if MODE != "auto":
                    raise
                self.left_out["cuda"] = one_line(error)
        self.run_cmake()

    def run_cmake(self) -> None:
        cmake = find_tool("cmake") or "cmake"
        # --fresh: the cache of an earlier build may name tools of an environment that is gone. Objects are kept.
        configure = [cmake, "--fresh", "-S", str(ROOT), "-B", str(self.cmake_dir), "-DMOE_OVERLAP_TESTS=OFF"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        if ninja := find_tool("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if any(ext.name == "moe_overlap.native._planner" for ext in self.extensions):
            pybind11 = package_root("pybind11") or Path("pybind11")
            configure += [
                "-DMOE_OVERLAP_PLANNER=ON",
                f"-Dpybind11_DIR={pybind11 / 'share/cmake/pybind11'}",
            ]
        if "cuda" not in self.left_out:
            configure += ["-DMOE_OVERLAP_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures()}"]
            configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        run_logged(configure)
        run_logged([cmake, "--build", str(self.cmake_dir), "-j", str(max_jobs())])


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def run_logged(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()[-1:]
        raise CompileError(f"{Path(command[0]).name} failed: {' '.join(errors[:2])}")


MODE = build_mode()
AGAINST = reasons_against(MODE)

if __name__ == "__main__":
    wanted = [part for part in ("_planner", "_C") if MODE in ("cpu", "cuda") or part not in AGAINST]
    setup(ext_modules=extensions(wanted), cmdclass={"build_py": BuildPython, "build_ext": BuildNative})
