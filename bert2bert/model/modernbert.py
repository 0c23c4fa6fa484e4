"""ModernBERT (Warner et al. 2024): pre-norm, rotary positions, GeGLU, and attention that is full in some layers.

The others see a window: `local_attention` // 2 tokens before and as many after. The two kinds of layer have rotary
frequencies of their own. Layer 0 has no norm before its attention, as the embeddings end in one. Refuses other kinds of
layer (`InvalidConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bert2bert.errors import InvalidConfig
from bert2bert.model.attention import FULL, attend
from bert2bert.model.batch import Batch
from bert2bert.model.core import Shared
from bert2bert.model.masked import Encoder
from bert2bert.model.modules import activation, chain
from bert2bert.model.rotary import Frequencies, rotate
from bert2bert.model.settings import settings_of

_FULL, _LOCAL = "full_attention", "sliding_attention"


class Attention(nn.Module):
    """Multi-head attention, full or local; queries, keys and values come from one map."""

    def __init__(self, core: ModernBert, path: str, kind: str) -> None:
        super().__init__()
        self.size, self.local, self.span = core.sizes["qk"], kind == _LOCAL, core.spans[kind]
        self.dropout_p = float(core.config.attention_dropout)
        self.Wqkv = core.linear(f"{path}.Wqkv")
        self.Wo = core.linear(f"{path}.Wo")
        self.out_drop = nn.Dropout(self.dropout_p)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        plan, rotary = shared.plan, shared.rotary
        if self.local:
            plan, rotary = shared.local_plan, shared.local_rotary
        q, k, v = self.Wqkv(x).view(len(x), 3, -1, self.size).unbind(1)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        out = attend(
            q, k, v, shared.cu_seqlens, shared.max_seqlen, self.dropout_p, self.training, plan, self.span
        )  # fmt: skip
        return self.out_drop(self.Wo(out.flatten(1)))


class MLP(nn.Module):
    """The gated feed-forward network; gate and value come from one map."""

    def __init__(self, core: ModernBert, path: str) -> None:
        super().__init__()
        self.Wi = core.linear(f"{path}.Wi")
        self.act = activation(core.config.hidden_activation)
        self.drop = nn.Dropout(core.config.mlp_dropout)
        self.Wo = core.linear(f"{path}.Wo")

    def forward(self, x: Tensor) -> Tensor:
        gated, gate = self.Wi(x).chunk(2, dim=-1)
        return self.Wo(self.drop(self.act(gated) * gate))


class Layer(nn.Module):
    """One Transformer block: [T, hidden] -> [T, hidden]."""

    def __init__(self, core: ModernBert, path: str, kind: str) -> None:
        super().__init__()
        self.attn_norm = core.norm(f"{path}.attn_norm") if f"{path}.attn_norm.weight" in core.known else nn.Identity()
        self.attn = Attention(core, f"{path}.attn", kind)
        self.mlp_norm = core.norm(f"{path}.mlp_norm")
        self.mlp = MLP(core, f"{path}.mlp")

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        x = x + self.attn(self.attn_norm(x), shared)
        return x + self.mlp(self.mlp_norm(x))


class Backbone(nn.Module):
    """Everything below the head: what transformers calls ModernBertModel."""

    def __init__(self, core: ModernBert) -> None:
        super().__init__()
        self.embeddings = chain(
            tok_embeddings=nn.Embedding(core.sizes["vocab"], core.width, padding_idx=core.config.pad_token_id),
            norm=core.norm("model.embeddings.norm"),
            drop=nn.Dropout(core.config.embedding_dropout),
        )
        kinds = enumerate(core.config.layer_types)
        self.layers = nn.ModuleList(Layer(core, f"model.layers.{i}", kind) for i, kind in kinds)
        self.final_norm = core.norm("model.final_norm")


class ModernBert(Encoder):
    """The whole model. spans: which tokens of its sequence a token sees, by kind of layer."""

    zero_padding = False

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        super().__init__(hf_config)
        self.config = settings_of(self.hf_config)
        kinds, window = set(self.config.layer_types), self.config.local_attention // 2
        self.spans = {_FULL: FULL, _LOCAL: (window, window)}
        if window < 0 or not kinds <= self.spans.keys():
            raise InvalidConfig(
                f"model config: local_attention is {self.config.local_attention} and the kinds of layer_types are "
                f"{', '.join(sorted(kinds))}; expected a count of tokens, and {' or '.join(self.spans)}"
            )
        self.frequencies = {kind: Frequencies(self.config, kind) for kind in kinds}
        self.model = Backbone(self)
        act = activation(self.config.classifier_activation)
        self.head = chain(dense=self.linear("head.dense"), act=act, norm=self.norm("head.norm"))
        self.decoder = nn.Linear(self.width, self.sizes["vocab"], bias=self.config.decoder_bias)
        if self.aliases:
            self.decoder.weight = self.model.embeddings.get_parameter("tok_embeddings.weight")

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def embed(self, batch: Batch) -> Tensor:
        return self.model.embeddings(batch.tokens)

    def shared(self, x: Tensor, batch: Batch) -> Shared:
        size, dropout_p = self.sizes["qk"], float(self.config.attention_dropout)
        plan = {kind: self.attention(x, batch, size, dropout_p, self.spans[kind]) for kind in self.frequencies}
        rotary = {kind: f.table(batch.positions, batch.max_seqlen, x.dtype) for kind, f in self.frequencies.items()}
        found: Any = (of.get(kind) for of in (plan, rotary) for kind in self.spans)
        return Shared(batch.cu_seqlens, batch.max_seqlen, *found)

    @property
    def head_path(self) -> str:
        return "decoder"

    def decode(self, x: Tensor) -> Tensor:
        return self.decoder(self.head(self.model.final_norm(x)))

    def draw(self, weight: Tensor, std: float) -> None:
        """Truncated, as transformers draws."""
        cutoff = self.config.initializer_cutoff_factor * std
        nn.init.trunc_normal_(weight, std=std, a=-cutoff, b=cutoff)
