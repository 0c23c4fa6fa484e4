"""Environment of the whole suite: CPU accelerator, one thread, nothing compiled, nothing fetched."""

import os

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def no_compiled_ops() -> None:
    """Import DeepSpeed once, before any fork, and keep it from compiling its shared-memory collective (needs g++)."""
    # Every forked rank would import these again, ten seconds each under load: an optimizer imports torch._dynamo, and
    # DeepSpeed's Muon module compiles, which imports inductor.
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.original_muon
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
