"""The order of actions, as data, and the executor that walks it."""
