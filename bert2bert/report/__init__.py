"""Run folders compared: what growing saved."""
