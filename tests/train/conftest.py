"""Engines are imported before the first test: what these tests fork finds them there."""

from __future__ import annotations

import pytest

from tests.distributed import import_engines


@pytest.fixture(scope="session", autouse=True)
def engines() -> None:
    import_engines()
