"""The commands and their command line. Only here are imports delayed, so that `--help` imports no torch."""
