"""`python -m moe_overlap`: the same as the command `moe-overlap` (what torchrun -m needs)."""

from moe_overlap.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
