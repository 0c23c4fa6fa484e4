"""Llama, Mistral, Qwen2 and Qwen3: pre-RMSNorm decoders with rotary positions, grouped heads and SwiGLU.

What differs between them the table says: which biases there are, whether queries and keys are normed by head. Mistral's
sliding window is that of every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bert2bert.model.attention import CAUSAL, attend
from bert2bert.model.batch import Batch
from bert2bert.model.causal import Decoder, Head
from bert2bert.model.core import Core, Shared
from bert2bert.model.modules import activation
from bert2bert.model.rotary import Frequencies, rotate
from bert2bert.model.settings import settings_of


class Attention(nn.Module):
    """Grouped-query attention with its projections."""

    def __init__(self, core: Core, path: str, size: int) -> None:
        super().__init__()
        self.size, self.span, self.dropout_p = size, core.span, float(core.config.attention_dropout)
        self.q_proj = core.linear(f"{path}.q_proj")
        self.k_proj = core.linear(f"{path}.k_proj")
        self.v_proj = core.linear(f"{path}.v_proj")
        self.o_proj = core.linear(f"{path}.o_proj")
        normed = f"{path}.q_norm.weight" in core.known
        self.q_norm = core.norm(f"{path}.q_norm") if normed else None
        self.k_norm = core.norm(f"{path}.k_norm") if normed else None

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        q, k, v = (proj(x).view(len(x), -1, self.size) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if shared.rotary is not None:
            q, k = rotate(q, shared.rotary), rotate(k, shared.rotary)
        out = attend(
            q, k, v, shared.cu_seqlens, shared.max_seqlen, self.dropout_p, self.training, shared.plan, self.span
        )  # fmt: skip
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, core: Core, path: str) -> None:
        super().__init__()
        self.gate_proj = core.linear(f"{path}.gate_proj")
        self.up_proj = core.linear(f"{path}.up_proj")
        self.down_proj = core.linear(f"{path}.down_proj")
        self.act = activation(core.config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One Transformer block: [T, hidden] -> [T, hidden]."""

    def __init__(self, core: Core, path: str, size: int) -> None:
        super().__init__()
        self.self_attn = Attention(core, f"{path}.self_attn", size)
        self.mlp = MLP(core, f"{path}.mlp")
        self.input_layernorm = core.norm(f"{path}.input_layernorm")
        self.post_attention_layernorm = core.norm(f"{path}.post_attention_layernorm")

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), shared)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything below the head: what transformers calls LlamaModel."""

    def __init__(self, core: Core, size: int) -> None:
        super().__init__()
        count = core.sizes["layers"]
        self.embed_tokens = nn.Embedding(core.sizes["vocab"], core.width, padding_idx=core.config.pad_token_id)
        self.layers = nn.ModuleList(Layer(core, f"model.layers.{i}", size) for i in range(count))
        self.norm = core.norm("model.norm")


class Llama(Decoder):
    """The whole model."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        super().__init__(hf_config)
        self.config = settings_of(self.hf_config)
        window = getattr(self.config, "sliding_window", None)
        self.span = CAUSAL if window is None else (window - 1, 0)
        self.size = self.sizes["qk"]
        self.model = Backbone(self, self.size)
        self.lm_head = Head((self.sizes["vocab"], self.width))
        if self.aliases:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.frequencies = Frequencies(self.config)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def embed(self, batch: Batch) -> Tensor:
        return self.model.embed_tokens(batch.tokens)

    def shared(self, x: Tensor, batch: Batch) -> Shared:
        plan = self.attention(x, batch, self.size, float(self.config.attention_dropout))
        rotary = self.frequencies.table(batch.positions, batch.max_seqlen, x.dtype)
        return Shared(batch.cu_seqlens, batch.max_seqlen, plan, rotary=rotary)

    def last_norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)
