"""Faults on clusters, with real processes, networks and daemons: `make test-cluster`, not part of `make test`."""
