"""Checkpoints: where elements lie, reading them from memory-mapped files, writing them, moving them between formats.

This package knows plans only as ranges of rows: it moves what a callable gives it and never looks inside a growth.
"""
