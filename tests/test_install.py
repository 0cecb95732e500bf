"""The ways to install, each in a fresh environment outside the clone, with the path of every loaded part checked.

A fresh environment is an empty venv and a .pth line that names the site-packages of the running one: torch is found
there, but an editable install of this package is not (a .pth inside such a directory is not followed).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = (
    ".git",
    ".venv",
    "build",
    "dist",
    "out",
    "*.egg-info",
    "*.so",
    "_build_info.json",
    "_kernels.json",
    ".*_cache",
    "__pycache__",
)

PROBE = """
import json, sys, torch
import moe_overlap
from moe_overlap.native import native
from moe_overlap.native import build_info
from moe_overlap.ops import registry
from moe_overlap.schedule.simulate import implementation, simulate
torch.manual_seed(0)
layer = moe_overlap.MoELayer(16, 32, 4, 2)
x = torch.randn(24, 16, requires_grad=True)
y = layer(x)
y.square().sum().backward()
record = build_info.read()
print(json.dumps({
    "package": moe_overlap.__file__,
    "parts": {part.name: [part.loaded, part.path, part.reason] for part in native.parts()},
    "simulator": implementation(),
    "times": simulate([1, 0, 0], [2.0, 1.5, 1.0], [[], [], [0]]),
    "explain": registry.explain(),
    "numbers": [y.double().sum().item().hex(), x.grad.double().sum().item().hex()],
    "mode": record.mode, "built": record.built, "left_out": record.left_out,
}))
"""


@dataclass(frozen=True)
class Installed:
    """One finished install: where it is and what the probe found, run from outside the clone."""

    folder: Path
    log: str
    found: dict[str, Any]

    def assert_inside(self, path: str) -> None:
        assert Path(path).resolve().is_relative_to(self.folder.resolve()), path


def environment(**extra: str) -> dict[str, str]:
    """The caller's environment without what would let the clone in, and with the tools of the running venv."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MOE_OVERLAP_")) and k != "VIRTUAL_ENV"}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1"} | extra


def run(command: list[str], folder: Path, **extra: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment(**extra), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def fresh_venv(folder: Path) -> Path:
    """An empty environment that sees the running one's packages; returns its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    visible = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (site_packages / "outer.pth").write_text("".join(f"{entry}\n" for entry in visible))
    return folder / "bin/python"


def install(source: Path, folder: Path, mode: str) -> Installed:
    """`pip install` into a fresh venv without isolation or index, then the probe."""
    python = fresh_venv(folder)
    command = [str(python), "-m", "pip", "install", "-v", "--no-build-isolation", "--no-index", str(source)]
    log = run(command, folder, MOE_OVERLAP_BUILD=mode)
    found = json.loads(run([str(python), "-W", "ignore", "-c", PROBE], folder).splitlines()[-1])
    return Installed(folder, log, found)


@pytest.fixture(scope="module")
def installs(tmp_path_factory) -> dict[str, Future[Installed]]:
    """All variants, two at a time: each is mostly one compiler run."""
    folder = tmp_path_factory.mktemp("install")
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("this environment has no pip")

    def source(name: str) -> Path:
        # A copy for each: builds of one tree at the same time would share its build folder.
        return Path(shutil.copytree(ROOT, folder / f"source-{name}", ignore=shutil.ignore_patterns(*NOT_SOURCE)))

    def from_sdist() -> Installed:
        tree = source("sdist")
        run([sys.executable, "-m", "build", "--sdist", "--no-isolation", str(tree)], folder)
        (archive,) = (tree / "dist").glob("*.tar.gz")
        return install(archive, folder / "sdist", "cpu")

    with ThreadPoolExecutor(2) as pool:
        yield {
            "tree": pool.submit(lambda: install(source("tree"), folder / "tree", "cpu")),
            "sdist": pool.submit(from_sdist),
            "none": pool.submit(lambda: install(source("none"), folder / "none", "none")),
        }


def can_compile() -> str | None:
    """Why the compiled parts cannot be built here, or None."""
    code = "import runpy; print(*runpy.run_path('setup.py')['reasons_against']('cpu').items(), sep='; ')"
    missing = run([sys.executable, "-c", code], ROOT).strip()
    return missing if "_planner" in missing or "_C" in missing else None


@pytest.fixture(scope="module")
def compiled() -> None:
    if reason := can_compile():
        pytest.skip(reason)


@pytest.mark.parametrize("variant", ["tree", "sdist"])
def test_compiled_install_loads_its_own_parts(installs, compiled, variant):
    installed = installs[variant].result()
    found = installed.found
    installed.assert_inside(found["package"])
    for name in ("planner", "ops"):
        loaded, path, reason = found["parts"][name]
        assert loaded, reason
        installed.assert_inside(path)
    assert found["simulator"][0] == "cpp"
    assert any(line.startswith("row_map: cpp") for line in found["explain"])
    assert found["mode"] == "cpu"  # the CUDA kernels take a minute, and are the same file
    assert set(found["built"]) == {"_planner", "_C"} and found["left_out"] == {"cuda": "MOE_OVERLAP_BUILD=cpu"}


def test_pure_python_install_has_every_op_and_says_why(installs):
    installed = installs["none"].result()
    found = installed.found
    installed.assert_inside(found["package"])
    for name in ("planner", "ops"):
        loaded, path, reason = found["parts"][name]
        assert not loaded and path is None
        assert "MOE_OVERLAP_BUILD=none" in reason
    assert found["simulator"][0] == "reference" and "MOE_OVERLAP_BUILD=none" in found["simulator"][1]
    assert any(line.startswith("row_map: reference") for line in found["explain"])
    assert found["built"] == {} and set(found["left_out"]) == {"_planner", "_C", "cuda"}
    assert not list(installed.folder.rglob("moe_overlap/native/*.so"))


def test_every_install_gives_the_same_numbers(installs, compiled):
    """To the last bit where the same implementations run; without compiled ones, silu is PyTorch's."""
    answers = [installs[name].result().found for name in ("tree", "sdist", "none")]
    assert answers[0]["numbers"] == answers[1]["numbers"]
    compiled_numbers, pure = ([float.fromhex(number) for number in answers[i]["numbers"]] for i in (0, 2))
    assert pure == pytest.approx(compiled_numbers, rel=1e-6)
    assert answers[0]["times"] == answers[2]["times"] == [[0.0, 2.0], [0.0, 1.5], [2.0, 3.0]]


def test_sdist_has_all_sources_and_nothing_built(installs, compiled):
    folder = installs["sdist"].result().folder.parent
    (archive,) = (folder / "source-sdist/dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = [path for suffix in ("*.h", "*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(suffix)]
    sources += list((ROOT / "moe_overlap").rglob("*.py*")) + [ROOT / "CMakeLists.txt", ROOT / "constraints.txt"]
    wanted = {str(path.relative_to(ROOT)) for path in sources if "__pycache__" not in path.parts}
    assert wanted - names == set()
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]
