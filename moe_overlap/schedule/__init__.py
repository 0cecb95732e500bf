"""The order of actions, as data."""
