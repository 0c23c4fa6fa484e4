"""GPT-2: a pre-LayerNorm decoder with learned positions; linear maps in the layout [inputs, outputs]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bert2bert.model.attention import attend
from bert2bert.model.batch import Batch
from bert2bert.model.causal import Decoder, Head
from bert2bert.model.core import Core, Shared
from bert2bert.model.modules import Conv1D, activation
from bert2bert.model.settings import settings_of


class Attention(nn.Module):
    """Multi-head attention; queries, keys and values come from one map."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.size, self.span, self.dropout_p = core.sizes["qk"], core.span, float(core.config.attn_pdrop)
        inner = core.sizes["heads"] * self.size
        self.c_attn = Conv1D(core.width, 3 * inner)
        self.c_proj = Conv1D(inner, core.width)
        self.dropout = nn.Dropout(core.config.resid_pdrop)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        q, k, v = (part.view(len(x), -1, self.size) for part in self.c_attn(x).chunk(3, dim=-1))
        out = attend(
            q, k, v, shared.cu_seqlens, shared.max_seqlen, self.dropout_p, self.training, shared.plan, self.span
        )  # fmt: skip
        return self.dropout(self.c_proj(out.flatten(1)))


class MLP(nn.Module):
    """The feed-forward network."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.c_fc = Conv1D(core.width, core.sizes["ffn"])
        self.c_proj = Conv1D(core.sizes["ffn"], core.width)
        self.act = activation(core.config.activation_function)
        self.dropout = nn.Dropout(core.config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """One Transformer block: [T, hidden] -> [T, hidden]."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(core.width, eps=core.config.layer_norm_epsilon)
        self.attn = Attention(core)
        self.ln_2 = nn.LayerNorm(core.width, eps=core.config.layer_norm_epsilon)
        self.mlp = MLP(core)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        x = x + self.attn(self.ln_1(x), shared)
        return x + self.mlp(self.ln_2(x))


class Backbone(nn.Module):
    """Everything below the head: what transformers calls GPT2Model."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.wte = nn.Embedding(core.sizes["vocab"], core.width)
        self.wpe = nn.Embedding(core.sizes["pos"], core.width)
        self.h = nn.ModuleList(Block(core) for _ in range(core.sizes["layers"]))
        self.ln_f = nn.LayerNorm(core.width, eps=core.config.layer_norm_epsilon)


class GPT2(Decoder):
    """The whole model."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        super().__init__(hf_config)
        self.config = settings_of(self.hf_config)
        self.transformer = Backbone(self)
        self.lm_head = Head((self.sizes["vocab"], self.width))
        if self.aliases:
            self.lm_head.weight = self.transformer.wte.weight
        self.drop = nn.Dropout(self.config.embd_pdrop)

    @property
    def layers(self) -> nn.ModuleList:
        return self.transformer.h

    def embed(self, batch: Batch) -> Tensor:
        return self.drop(self.transformer.wte(batch.tokens) + self.transformer.wpe(batch.positions))

    def shared(self, x: Tensor, batch: Batch) -> Shared:
        plan = self.attention(x, batch, self.sizes["qk"], float(self.config.attn_pdrop))
        return Shared(batch.cu_seqlens, batch.max_seqlen, plan)

    def last_norm(self, x: Tensor) -> Tensor:
        return self.transformer.ln_f(x)
