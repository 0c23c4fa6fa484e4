"""Processes that work together: how they are started, meet, agree and stop."""
