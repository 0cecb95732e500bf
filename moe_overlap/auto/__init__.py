"""What schedule="auto" does: measure real steps, keep the cost model, choose for every step."""
