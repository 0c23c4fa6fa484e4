"""Environment of the whole suite: CPU accelerator, one thread, nothing compiled, nothing fetched.

Without ``--full``, tests marked ``full`` are left out: what other tests show already, see tests/cover.py. Under xdist
(``--dist loadgroup``) tests go out one by one, except that a module with fixtures of its own stays in one process.
"""

import gc
import os
from itertools import count

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run also what other tests cover: all operators x variants")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: run with --full alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(found.scope == "module" for defined in fixtures for found in defined):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


_SETUPS = count()


def pytest_runtest_setup() -> None:
    if next(_SETUPS) % 10 == 0:  # else full collections look through all of torch, transformers and the tests, too
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
