"""What a step costs: the matrix-product FLOPs that the mathematics needs, and what a GPU could do. Torch-free.

One multiply-add is two FLOPs. Counted: the linear maps of the layers, q kᵀ and its product with v inside each
sequence, the masked-LM head at the predicted positions. Not counted: padding, recomputation, norms, activations,
softmax, embedding look-ups, the next-sentence head (one token a sequence), the optimizer. With F features between the
feed-forward maps, a layer's forward is 8 H² + 4 H F per token and 4 H per attended pair; the head's is 2 H² + 2 V H per
prediction.

Backward: one product for the gradient of each factor, so twice the forward of all that learns, less the products that
nobody asks for: where the gradient stops, the input of the lowest thing that learns needs none. That is 6 H² per token
(query, key and value) for a layer program that stops above the embeddings, and 2 H² per prediction when only the head
learns. Checked against torch's FlopCounterMode in tests/model/test_flops.py.
"""

from __future__ import annotations

from bert2bert.model.config import BertConfig
from bert2bert.model.program import LayerProgram, full


def layer_flops(config: BertConfig, tokens: int, attended: int) -> int:
    """Forward FLOPs of one layer over `tokens` tokens; attended: the sum of squared sequence lengths."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return tokens * (8 * hidden * hidden + 4 * hidden * inner) + attended * 4 * hidden


def head_flops(config: BertConfig, predicted: int) -> int:
    """Forward FLOPs of the masked-LM head at `predicted` positions."""
    return predicted * 2 * config.hidden_size * (config.hidden_size + config.vocab_size)


def forward_flops(
    config: BertConfig, real_tokens: int, attended: int, predicted: int, program: LayerProgram | None = None
) -> int:
    """Forward FLOPs of a batch: real tokens, Σ length², positions predicted. program: default all layers."""
    layers = config.num_hidden_layers if program is None else len(program.run)
    return layers * layer_flops(config, real_tokens, attended) + head_flops(config, predicted)


def step_flops(
    config: BertConfig, real_tokens: int, attended: int, predicted: int, program: LayerProgram | None = None
) -> int:
    """Forward and backward FLOPs of a batch (a whole model: three times its forward). Arguments as forward_flops."""
    program = full(config.num_hidden_layers) if program is None else program
    learning = len(program.learn) * layer_flops(config, real_tokens, attended) + head_flops(config, predicted)
    unasked = 0
    if not program.learn:
        unasked = 2 * config.hidden_size**2 * predicted
    elif not program.embeddings_learn:
        unasked = 6 * config.hidden_size**2 * real_tokens
    return forward_flops(config, real_tokens, attended, predicted, program) + 2 * learning - unasked


# Dense 16-bit tensor-core peaks (no sparsity), TFLOP/s, from NVIDIA's data sheets, and whether the GPU has bf16. The
# first name found in the device's name counts, so the more special one comes first.
_PEAKS: tuple[tuple[str, float, bool], ...] = (
    ("B200", 2250, True),
    ("H200 NVL", 835, True),
    ("GH200", 989, True),
    ("H200", 989, True),
    ("H100 PCIe", 756, True),
    ("H100 NVL", 835, True),
    ("H100", 989, True),
    ("A100", 312, True),
    ("A30", 165, True),
    ("L40S", 362, True),
    ("V100-PCIE", 112, False),
    ("V100", 125, False),
    ("T4", 65, False),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Nominal dense peak in FLOP/s of a GPU (torch.cuda.get_device_name) in "bf16" or "fp16"; None where not known.

    "fp32" is not known (it depends on whether TF32 is on), nor is a slice of a GPU (MIG).
    """
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None
    for name, tera, has_bf16 in _PEAKS:
        key = name.replace("-", " ").split()
        if any(words[i : i + len(key)] == key for i in range(len(words))):
            return tera * 1e12 if dtype == "fp16" or (dtype == "bf16" and has_bf16) else None
    return None
