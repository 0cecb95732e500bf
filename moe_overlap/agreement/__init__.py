"""What the ranks agree on before a row moves, and the integers that follow from it."""
