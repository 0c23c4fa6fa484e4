"""BERT (post-LN) over flat, packed tokens, with Hugging Face's parameter names in Hugging Face's order.

`named_parameters()` is that of transformers' BertForPreTraining (heads "mlm" and "nsp") or BertForMaskedLM ("mlm"),
and so are the results, gradients included; hidden states stay [tokens, hidden] from the embeddings to the loss. The
masked-LM head sees the masked positions only. A layer program chooses the layers that run and those that learn; what
lies below the lowest learning layer runs without autograd. Refused: next-sentence labels for a model without that head,
weights whose names or shapes are not the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert2bert.errors import InvalidCheckpoint, InvalidConfig, did_you_mean
from bert2bert.model.attention import padding_for
from bert2bert.model.batch import IGNORE, Batch
from bert2bert.model.blocks import Backbone, Heads
from bert2bert.model.config import BertConfig
from bert2bert.model.program import LayerProgram, full


class Output(NamedTuple):
    """loss: scalar, the mean over predicted positions (plus the next-sentence loss when the batch has labels for it).
    correct, predicted: int64 scalars, masked positions whose best guess is right, and all with a label.
    logits: [M, vocabulary], nsp_logits: [S, 2], in the model's dtype, when asked for."""

    loss: Tensor
    correct: Tensor
    predicted: Tensor
    logits: Tensor | None = None
    nsp_logits: Tensor | None = None


def label_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy in nats over labels != -100 (0 when there is none), right guesses, labels: three scalars.

    logits: [N, classes], taken to float32 when they are 16-bit. labels: int64 [N].
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    predicted = (labels != IGNORE).sum()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / predicted.clamp(min=1)
    return loss, (logits.argmax(-1) == labels).sum(), predicted


def outcome(
    batch: Batch,
    logits: Tensor,
    nsp_logits: Tensor | None,
    keep: bool,
    loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = label_loss,
) -> Output:
    """What a forward returns, from its logits (shapes: Output). keep: whether the logits are part of it."""
    loss, correct, predicted = loss_of(logits, batch.labels)
    if batch.nsp_labels is not None and nsp_logits is not None:
        loss = loss + label_loss(nsp_logits, batch.nsp_labels)[0]
    return Output(loss, correct, predicted, logits if keep else None, nsp_logits if keep else None)


class Bert(nn.Module):
    """The whole model. heads: ("mlm",) or ("mlm", "nsp"), default the config's.

    compile_layers: compile one Transformer block with torch.compile and reuse it for all layers and for every layer
    program, and the loss; meant for a GPU.
    """

    def __init__(
        self, config: BertConfig, heads: tuple[str, ...] | None = None, *, compile_layers: bool = False
    ) -> None:
        super().__init__()
        self.config = config = config if heads is None else config.with_heads(heads)
        self.bert = Backbone(config)
        self.cls = Heads(config)
        if config.tie_word_embeddings:
            self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
            self.cls.predictions.decoder.bias = self.cls.predictions.bias
        self._label_loss = label_loss
        self.initialise()
        if compile_layers:
            self.compile_layers()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw fresh weights as Hugging Face does: normal(0, initializer_range), biases 0, norms 1, padding row 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if (pad := self.config.pad_token_id) is not None:
            self.bert.embeddings.word_embeddings.weight[pad] = 0

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """Compile the Transformer block (once: all layers share its code) and the loss. Parameter names stay.

        The block is compiled again for each autograd setting (frozen, lowest learning, learning), for evaluation and
        for shapes that begin to vary. That can exceed torch's default limit of 8, after which it silently stops
        compiling.
        """
        import torch._dynamo.config as dynamo  # not at the top: it takes a second and only compiling needs it

        dynamo.recompile_limit = max(dynamo.recompile_limit, 32)
        for layer in self.bert.encoder.layer:
            layer.compile(backend=backend)
        self._label_loss = torch.compile(label_loss, backend=backend)

    def encode(self, batch: Batch, program: LayerProgram | None = None) -> Tensor:
        """Hidden states [T, hidden] above the last layer that the program runs (default: all layers run and learn)."""
        layers = self.bert.encoder.layer
        program = full(len(layers)) if program is None else program.check(len(layers))
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and program.embeddings_learn):
            x = self.bert.embeddings(batch.tokens, batch.types, batch.positions)
        padding = padding_for(x, batch.cu_seqlens, batch.max_seqlen, self.config, self.training)
        for place, number in enumerate(program.run):
            with torch.set_grad_enabled(grad and place >= len(program.frozen)):
                x = layers[number](x, batch.cu_seqlens, batch.max_seqlen, padding)
        return x

    def forward(self, batch: Batch, program: LayerProgram | None = None, *, return_logits: bool = False) -> Output:
        """Loss and counts of a batch; return_logits adds the masked-LM logits and, with an nsp head, that head's.

        Raises InvalidConfig for a program that names layers the model lacks, or next-sentence labels without the head.
        """
        if batch.nsp_labels is not None and "nsp" not in self.config.heads:
            raise InvalidConfig(
                "the batch has next-sentence labels, but the model has no next-sentence head; "
                "expected architectures ['BertForPreTraining'] in the model config"
            )
        x = self.encode(batch, program)
        logits = self.cls.predictions(x.index_select(0, batch.masked))
        nsp_logits = None
        if "nsp" in self.config.heads and (return_logits or batch.nsp_labels is not None):
            nsp_logits = self.cls.seq_relationship(self.bert.pooler(first_tokens(x, batch)))
        return outcome(batch, logits, nsp_logits, return_logits, self._label_loss)


def first_tokens(x: Tensor, batch: Batch) -> Tensor:
    """The rows [S, hidden] of x that begin a sequence; an empty sequence (it begins behind the end) gets the last."""
    return x.index_select(0, batch.cu_seqlens[:-1].long().clamp(max=x.shape[0] - 1))


def build(config: Mapping[str, Any], dtype: torch.dtype | None = None, *, compile_layers: bool = False) -> Bert:
    """A freshly initialised model from a Hugging Face config dict, in `dtype` (default float32).

    Heads by `architectures` (BertForPreTraining: mlm and nsp; BertForMaskedLM or none: mlm). Raises InvalidConfig.
    """
    return Bert(BertConfig.from_hf(config), compile_layers=compile_layers).to(dtype or torch.float32)


def hf_config(model: Bert) -> dict[str, Any]:
    """The Hugging Face config dict that rebuilds the model and that transformers reads."""
    return model.config.to_hf()


@torch.no_grad()
def load_state(model: Bert, state: Mapping[str, Tensor]) -> None:
    """Copy weights into the model: every parameter by its Hugging Face name, cast to the model's dtype.

    Tied copies and transformers' position_ids buffers may be there too. Raises InvalidCheckpoint, before anything is
    copied, for a missing or unknown name, another shape, or a tied copy that differs from what it is tied to.
    """
    wanted = dict(model.named_parameters())
    aliases = model.config.aliases
    for name, parameter in wanted.items():
        if name not in state:
            raise InvalidCheckpoint(
                f"weights for the model: {name} is missing; expected shape {tuple(parameter.shape)}"
            )
        if state[name].shape != parameter.shape:
            raise InvalidCheckpoint(
                f"weights for the model: {name} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(parameter.shape)}; does the config describe these weights?"
            )
    for name, tensor in state.items():
        if (kept := aliases.get(name)) is not None:
            if not torch.equal(tensor, state[kept]):
                raise InvalidCheckpoint(
                    f"weights for the model: {name} differs from {kept}, but the config ties them; "
                    "set tie_word_embeddings to false to keep both"
                )
        elif name not in wanted and not name.endswith("embeddings.position_ids"):
            raise InvalidCheckpoint(f"weights for the model: unexpected {name}; " + did_you_mean(name, wanted))
    for name, parameter in wanted.items():
        parameter.copy_(state[name])
