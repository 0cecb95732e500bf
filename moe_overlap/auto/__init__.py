"""schedule="auto": measure real steps, keep the cost model, choose for every step."""
