"""The command `moe-overlap`: one module or package for each subcommand."""
