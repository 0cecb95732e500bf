"""This library inside of others: they import it by name, and nothing here is imported before that."""
