"""What every model core has in common: flat packed tokens in, a loss out, and weights by transformers' names.

A core is the language model of one or more architectures. It gives four things: its list of blocks (`layers`), `embed`,
`shared` (what all blocks read beside the hidden states) and `predict`. Everything else is here once: the forward
over the layers that a step runs (`Core`), fresh weights, weights by name, compiling and recomputation
(`LanguageModel`, which `hosted.Hosted` is, too). Hidden states stay [tokens, hidden] from the embeddings to the loss;
what lies below the lowest learning layer runs without autograd.

`named_parameters()` is that of transformers' class with the language-model head, in its order, and so are the results,
gradients included. Every parameter is read inside the module that owns it, which is what ZeRO-3 gathers by.

Refuses weights whose names or shapes are not the model's (`InvalidCheckpoint`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert2bert.errors import InvalidCheckpoint, did_you_mean
from bert2bert.model.attention import FULL, Plan, Span, plan_for
from bert2bert.model.batch import Batch
from bert2bert.model.modules import RMSNorm
from bert2bert.model.program import Step, full
from bert2bert.tables import Parameter, table_for

Opened = Callable[[Sequence[Tensor]], AbstractContextManager[object]]
"""Makes some parameters whole while they are written to (under ZeRO-3 every rank holds a piece of each)."""


class Output(NamedTuple):
    """loss: scalar, the mean over predicted positions in nats (plus what the architecture adds: a next-sentence loss
    where the batch has labels for it, a router's auxiliary loss). correct, predicted: int64 scalars, positions whose
    best guess is right, and all with a label. logits: [M, vocabulary], nsp_logits: [S, 2], in the model's dtype, when
    asked for."""

    loss: Tensor
    correct: Tensor
    predicted: Tensor
    logits: Tensor | None = None
    nsp_logits: Tensor | None = None


Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary positions, [T, rotated features] each."""


class Shared(NamedTuple):
    """What all blocks of one forward read. plan, rotary: of full (or causal) attention; local_plan, local_rotary: of
    the layers that see a window only."""

    cu_seqlens: Tensor
    max_seqlen: int
    plan: Plan | None
    local_plan: Plan | None = None
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None


class LanguageModel(nn.Module):
    """What a run trains: flat packed tokens in, a loss out. Built by `registry.build`.

    config: the core's own settings. hf_config: the Hugging Face config, plain data, that rebuilds the model and that
    transformers reads; its ``architectures`` names one class. known: what the architecture's table says of every
    parameter, by name. sizes: of the table's axes. aliases: absent tied names and those that are kept. recompute:
    whether blocks keep only their input for the backward pass and compute the rest again (activation checkpointing).
    zero_padding: whether the padding token's row is 0 among fresh weights. hosted: whether the forward pass is
    transformers' own, with its casts to float32.
    """

    config: Any
    zero_padding: ClassVar[bool] = True
    hosted: ClassVar[bool] = False

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.hf_config = dict(hf_config)
        self.table = table_for(hf_config)
        self.heads = self.table.names.classes[self.hf_config["architectures"][0]]
        self.known: dict[str, Parameter] = self.table.parameters(self.hf_config, self.heads)
        self.aliases = self.table.aliases(self.hf_config, self.heads)
        self.sizes = self.table.axis_sizes(self.hf_config)
        self.recompute = self.compiled = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LanguageModel:
        """The model of a Hugging Face config that names its class, not initialised. Raises InvalidConfig."""
        return cls(config)

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The blocks, in the order of the forward pass."""

    @property
    def name(self) -> str:
        """transformers' class."""
        return str(self.hf_config["architectures"][0])

    @property
    def width(self) -> int:
        """Features of a hidden state."""
        return self.sizes["embed"]

    @property
    def parts(self) -> tuple[str, ...]:
        """The table's part of every block of `layers`."""
        return self.table.layer_parts(self.hf_config)

    @abstractmethod
    def forward(self, batch: Batch, step: Step | None = None, *, return_logits: bool = False) -> Output:
        """Loss and counts of a batch; return_logits adds the logits. step: which layers run (default: all), and what
        learns; a layer that rests above one that learns must be among what requires no gradient, as `Engine.apply`
        sees to. Raises InvalidConfig for a step that names what the model lacks."""

    @abstractmethod
    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits at a batch's targets, [M, vocabulary], and next-sentence logits, [S, 2], where that head is."""

    @property
    def head_path(self) -> str:
        """The module that holds the decoder, the map onto the vocabulary."""
        return "lm_head"

    @torch.no_grad()
    def initialise(self, opened: Opened | None = None) -> None:
        """Draw fresh weights as transformers does: with the table's deviation (`draw`), biases 0, norm gains 1, the
        padding token's row 0 (``zero_padding``). The draws follow from torch's random state alone, whatever ``opened``
        does: it is asked for every parameter once, for one module's at a time."""
        owners = [(path, dict(module.named_parameters(recurse=False))) for path, module in self.named_modules()]
        last = {id(parameter): path for path, own in owners for parameter in own.values()}
        paddings = {
            id(module.weight): module.padding_idx
            for module in self.modules()
            if self.zero_padding and isinstance(module, nn.Embedding) and module.padding_idx is not None
        }
        for path, own in owners:
            kept = [parameter for parameter in own.values() if last[id(parameter)] == path]
            with nullcontext() if opened is None or not kept else opened(kept):
                for name, parameter in own.items():
                    at = f"{path}.{name}" if path else name
                    if last[id(parameter)] != path:  # tied: what counts is the draw of its last owner
                        self._draw(at, torch.empty(self._about(at).shape, dtype=parameter.dtype))
                        continue
                    self._draw(at, parameter)
                    if (row := paddings.get(id(parameter))) is not None:
                        parameter[row] = 0

    def _about(self, path: str) -> Parameter:
        """What the table says of a parameter, tied or not."""
        return self.known[self.aliases.get(path, path)]

    def _draw(self, path: str, parameter: Tensor) -> None:
        about = self._about(path)
        if len(about.shape) > 1:
            self.draw(parameter, self.table.std(about.pattern, self.hf_config))
        elif path.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)

    def draw(self, weight: Tensor, std: float) -> None:
        """Fill a fresh weight of more than one dimension."""
        nn.init.normal_(weight, std=std)

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """Compile the Transformer block (once: all layers of one kind share its code). Parameter names stay.

        The block is compiled again for each autograd setting (frozen, lowest learning, learning), for evaluation and
        for shapes that begin to vary. That can exceed torch's default limit of 8, after which it silently stops
        compiling.
        """
        import torch._dynamo.config as dynamo  # not at the top: it takes a second and only compiling needs it

        dynamo.recompile_limit = max(dynamo.recompile_limit, 32)
        self.compiled = True
        for layer in self.layers:
            layer.compile(backend=backend)

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights into the model: every parameter by its Hugging Face name, cast to the model's dtype.

        Tied copies and transformers' position_ids buffers may be there too. Raises InvalidCheckpoint, before anything
        is copied, for a missing or unknown name, another shape, or a tied copy that differs from what it is tied to.
        """
        wanted = dict(self.named_parameters())
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
            if (kept := self.aliases.get(name)) is not None:
                if not torch.equal(tensor, state[kept]):
                    raise InvalidCheckpoint(
                        f"weights for the model: {name} differs from {kept}, but the config ties them; "
                        "set tie_word_embeddings to false to keep both"
                    )
            elif name not in wanted and not name.endswith("embeddings.position_ids"):
                raise InvalidCheckpoint(f"weights for the model: unexpected {name}; " + did_you_mean(name, wanted))
        for name, parameter in wanted.items():
            parameter.copy_(state[name])


class Core(LanguageModel):
    """A language model whose blocks are this project's own and run over flat tokens.

    span: which tokens of its sequence a token sees in full attention.
    """

    span: Span = FULL

    def linear(self, path: str) -> nn.Linear:
        """A linear map of the sizes that the table says, with a bias where it says one."""
        outputs, inputs = self.known[f"{path}.weight"].shape
        return nn.Linear(inputs, outputs, bias=f"{path}.bias" in self.known)

    def norm(self, path: str) -> nn.Module:
        """A norm of the kind, size and epsilon that the table says, with a bias where it says one."""
        (size,), eps = self.known[f"{path}.weight"].shape, float(self.hf_config.get(*self.table.norms.eps))
        return (
            RMSNorm(size, eps)
            if self.table.norms.kind == "rms"
            else nn.LayerNorm(size, eps, bias=f"{path}.bias" in self.known)
        )

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """What enters the first block: [T, hidden]."""

    @abstractmethod
    def shared(self, x: Tensor, batch: Batch) -> Shared:
        """What all blocks read. Computed once a forward, outside of the blocks, so that compiled ones hold no
        data-dependent shape. x: what `embed` gives."""

    @abstractmethod
    def predict(self, x: Tensor, batch: Batch, return_logits: bool) -> Output:
        """The loss and the counts of a batch from the hidden states above the last block."""

    def encode(self, batch: Batch, step: Step | None = None) -> Tensor:
        """Hidden states [T, hidden] above the last layer that runs; as `forward`."""
        layers, parts = self.layers, self.parts
        step = full(parts) if step is None else step.check(parts)
        grad, lowest = torch.is_grad_enabled(), step.lowest(parts)
        with torch.set_grad_enabled(grad and "embeddings" in step.learn):
            x = self.embed(batch)
        shared = self.shared(x, batch)
        for place, number in enumerate(step.run):
            wanted = grad and place >= lowest
            with torch.set_grad_enabled(wanted):
                if self.recompute and wanted and self.training:
                    x = checkpoint(layers[number], x, shared, use_reentrant=False)
                else:
                    x = layers[number](x, shared)
        return x

    def forward(self, batch: Batch, step: Step | None = None, *, return_logits: bool = False) -> Output:
        """As `LanguageModel.forward`."""
        return self.predict(self.encode(batch, step), batch, return_logits)

    def attention(self, x: Tensor, batch: Batch, head_size: int, dropout_p: float, span: Span | None = None) -> Plan:
        """How layers of one span compute attention."""
        span = self.span if span is None else span
        return plan_for(
            x, batch.cu_seqlens, batch.max_seqlen, head_size, dropout_p, self.training, span, one_group=self.compiled
        )  # fmt: skip
