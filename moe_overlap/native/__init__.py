"""The compiled parts, loaded when asked for, and the record of their build."""
