"""Ranks: this process alone, new processes of this machine, or those of torchrun."""
