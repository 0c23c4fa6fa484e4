"""What a growth costs and what it changed, on models that run."""
