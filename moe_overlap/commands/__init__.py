"""The command `moe-overlap`, one module or package a subcommand."""
