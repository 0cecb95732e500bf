"""What a model calls: the layer, its experts, the shortcut block, and what they say about themselves."""
