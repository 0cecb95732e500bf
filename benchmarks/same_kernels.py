"""Whether an edit of the Triton sources left all machine code as it was, so that what a card has said still holds.

    python benchmarks/same_kernels.py EARLIER [--also 80,100] [--only TEXT] [--write]

EARLIER is a checkout of the commit before the edit (nothing in it has to be built). Every launch of
tests/ops/test_aot_triton.py and tests/ops/test_aot_expert_mlp_triton.py is compiled from both trees for the
architectures that verified.json has, without line numbers, and compared: grid, what is passed, options, and byte for
byte the PTX and the cubin. Where all are equal, --write gives the records that were made with the earlier sources the
digest of these; commit and date stay those of the run on the card. Else the kernels that differ are named, exit 1.

One of PTX and cubin has to be equal: ptxas may make one of several cubins of the same PTX (up_kernel on sm_100 by
Triton 3.6.0, from run to run); how often that was seen is said.

Run it under the release of Triton that the card ran. Not compared: what torch does between launches; read the edit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 3600.0
"""Of each process: compiling takes minutes."""
Listing = dict[str, dict[str, Any]]
"""Launch -> what is compared of it."""

OPTIONS = ("num_warps", "num_ctas", "shared", "tmem_size", "global_scratch_size", "launch_pdl", "enable_fp_fusion",
           "maxnreg", "ptx_options")  # fmt: skip
"""Of Triton's metadata: what a launch needs to know beside the machine code, and what ptxas is told beside the PTX."""


def listing(tree: Path, capability: int, only: str) -> Listing:
    """Compile the launches with the package of `tree`, in a process of its own."""
    words = [sys.executable, str(Path(__file__).resolve()), str(tree), f"--child={capability}", f"--only={only}"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "listing.json"
        how = {"TRITON_CACHE_DIR": f"{folder}/cache", "TRITON_DISABLE_LINE_INFO": "1", "TRITON_INTERPRET": "0"}
        how["MOE_OVERLAP_TILES"] = ""
        subprocess.run([*words, f"--out={out}"], check=True, env=os.environ | how, timeout=LIMIT_S)
        return json.loads(out.read_text())


def described(capability: int, only: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every launch for this compute capability, by a name of its own."""
    from tests.ops import aot, test_aot_expert_mlp_triton, test_aot_triton

    cases = [*test_aot_triton.launches(), *test_aot_expert_mlp_triton.everything(f"sm_{capability}")]
    for case, launches in cases:
        for number, launch in enumerate(launches):
            name = f"{launch.name} (sm_{capability}, {case}, launch {number})"
            if only not in name:
                continue
            kernel = aot.compiled(launch, capability)
            metadata = kernel.metadata._asdict()
            yield (
                name,
                {
                    "grid": list(launch.grid),
                    "passed": [passed(value) for value in launch.args if value is not None],
                    "options": {key: str(metadata[key]) for key in OPTIONS if key in metadata},
                    "ptx": digest(kernel.asm["ptx"].encode()),
                    "cubin": digest(kernel.asm["cubin"]),
                },
            )


def passed(value: Any) -> str:
    """An argument in words: of a tensor or a descriptor of one the dtype and the layout."""
    base = getattr(value, "base", value)
    block = getattr(value, "block_shape", "")
    layout = (str(base.dtype), *base.shape, "by", *base.stride()) if hasattr(base, "stride") else (base,)
    return " ".join(map(str, (*layout, block)))


def digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()


def sources(tree: Path) -> str:
    """The digest of the Triton sources of a tree, as its records have it."""
    words = "from moe_overlap.ops import triton_kernels; print(triton_kernels.sources())"
    from_tree = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", words]
    done = subprocess.run(command, check=True, env=from_tree, cwd=tree, stdout=subprocess.PIPE, timeout=LIMIT_S)
    return done.stdout.decode().split()[-1]


def differences(before: Listing, now: Listing) -> list[str]:
    """A line for each launch that is not the same in both. Of PTX and cubin one may differ."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        one, other = before.get(name), now.get(name)
        if one is None or other is None:
            lines.append(f"{name}: only {'now' if one is None else 'earlier'}")
        else:
            keys = [key for key in one if one[key] != other[key]]
            if keys not in ([], ["ptx"], ["cubin"]):
                lines.append(f"{name}: {', '.join(keys)}")
    return lines


def renewed(earlier: str, now: str) -> int:
    """Give the Triton records made with the sources `earlier` the digest `now`; how many there were."""
    from moe_overlap.ops import verified

    records = verified.read()
    old = [record for record in records if (record.implementation, record.sources) == ("triton", earlier)]
    verified.write([replace(record, sources=now) if record in old else record for record in records])
    return len(old)


def architectures(digest: str) -> list[int]:
    """Those of the Triton records that were made with these sources."""
    from moe_overlap.ops import verified

    found = {r.architecture for r in verified.read() if (r.implementation, r.sources) == ("triton", digest)}
    return sorted(int(name.removeprefix("sm_")) for name in found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path, help="checkout of the commit before the edit")
    parser.add_argument("--also", default="", help="more compute capabilities to compare: 80,100")
    parser.add_argument("--only", default="", help="launches whose name has this text (writes nothing)")
    parser.add_argument("--write", action="store_true", help="renew the digest in verified.json where all are equal")
    parser.add_argument("--child", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    found = parser.parse_args(argv)
    earlier = found.earlier.resolve()
    if found.child:
        found.out.write_text(json.dumps(dict(described(found.child, found.only))))
        return 0
    import torch
    import triton

    old, new = sources(earlier), sources(ROOT)
    print(f"torch {torch.__version__}, Triton {triton.__version__}; sources {old} earlier, {new} now", flush=True)
    capabilities = sorted({*architectures(old), *(int(word) for word in found.also.split(",") if word)})
    if not capabilities:
        print("no record of the earlier sources: nothing to compare (--also)")
        return 1
    wrong = []
    for capability in capabilities:
        before, now = (listing(tree, capability, found.only) for tree in (earlier, ROOT))
        differ = differences(before, now)
        codes = len({row["ptx"] for row in now.values()})
        print(f"sm_{capability}: {len(now)} launches of {codes} kernels, {len(differ)} differ", flush=True)
        for key in ("ptx", "cubin"):
            count = sum(before[name][key] != row[key] for name, row in now.items() if name in before)
            print(f"sm_{capability}: {count} of another {key}", flush=True)
        wrong += differ
    for line in wrong:
        print(f"differs: {line}")
    if wrong:
        print("nothing written: what a card has said of the earlier kernels says nothing of these (make gpu)")
        return 1
    if found.write and not found.only:
        print(f"{renewed(old, new)} Triton records have the digest {new} now")
    return 0


if __name__ == "__main__":
    if any(word.startswith("--child=") for word in sys.argv):
        # The package of the tree, and the tests of this one.
        sys.path[0] = sys.argv[1]
        import moe_overlap

        assert Path(moe_overlap.__file__).is_relative_to(sys.argv[1]), moe_overlap.__file__
    sys.path[0] = str(ROOT)
    sys.exit(main())
