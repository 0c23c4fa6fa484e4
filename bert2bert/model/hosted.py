"""Models whose forward pass is transformers' own: T5, the mixtures of experts, and any other class with a table.

The parts of transformers' model are this model's parts, so parameters have its names in its order, and DeepSpeed sees
nothing else. Flat tokens are padded to one row a sequence, with a mask, filler left out, and what the head reads is
gathered back. The head answers with the loss in place of all logits, in chunks of tokens where it has no bias
(`causal.LinearCrossEntropy`). Slower than the other cores by the padding, and their reference.

Experts are computed by grouped matrix products where their widths allow it, else one after the other. Blocks are not
compiled: which tokens go to which expert, and how long a row is, change from batch to batch.

A step changes the list of layers that transformers' forward pass goes through, and what the config says of it. A
mixture whose config says so (output_router_logits) gets its router's auxiliary loss while gradients are computed;
without, as in an evaluation, the loss is the head's alone.

Refuses (`InvalidConfig`): next-sentence labels; steps of models with two stacks, of which only the first layer has
position biases, that do not run all layers once, in order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.initialization import no_init_weights

from bert2bert.errors import InvalidConfig
from bert2bert.model.batch import IGNORE, Batch
from bert2bert.model.causal import CHUNK, LinearCrossEntropy
from bert2bert.model.core import LanguageModel, Output
from bert2bert.model.masked import label_loss
from bert2bert.model.program import Step, full
from bert2bert.model.settings import settings_of


class Answers(nn.Linear):
    """transformers' head, which answers (loss, right guesses, predictions) while it is asked, with the logits behind
    them if they are wanted. asked: places int64 [M] among the rows that come, labels int64 [M] (None: for the logits
    alone), wanted."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.asked: tuple[Tensor, Tensor | None, bool] | None = None

    def forward(self, x: Tensor) -> Any:
        if self.asked is None:
            return super().forward(x)
        places, labels, wanted = self.asked
        x = x.flatten(0, -2).index_select(0, places)
        if labels is None:
            return super().forward(x)
        if self.bias is not None:
            logits = super().forward(x)
            return *label_loss(logits, labels), logits
        found = LinearCrossEntropy.apply(x, self.weight, labels, CHUNK)
        return (*found, super().forward(x)) if wanted else found


class Place(nn.Module):
    """A layer where a step runs it. wanted: whether gradients are computed in it; cut: whether they end in front of it;
    recompute: whether it keeps only its input for the backward pass."""

    def __init__(self, layer: nn.Module, wanted: bool, cut: bool, recompute: bool) -> None:
        super().__init__()
        self.layer, self.wanted, self.cut, self.recompute = layer, wanted, cut, recompute
        self.attention_type = getattr(layer, "attention_type", None)  # ModernBERT asks its layers

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Any:
        x = x.detach() if self.cut else x
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.wanted):
            if self.recompute and torch.is_grad_enabled():
                return checkpoint(self.layer, x, *others, use_reentrant=False, **named)
            return self.layer(x, *others, **named)


class Rows:
    """Flat tokens as padded rows, one a sequence. mask: bool [rows, length], where tokens are; places: int64 [T], of
    every flat token among the padded ones (0 of those left out). kept: bool [T]."""

    def __init__(self, cu_seqlens: Tensor, kept: Tensor | None = None) -> None:
        lengths = cu_seqlens.long().diff()
        lengths = lengths[lengths > 0]
        kept = torch.ones_like(lengths, dtype=torch.bool) if kept is None else kept
        self.kept = kept.repeat_interleave(lengths)
        lengths = lengths[kept]
        self.mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        self.places = torch.zeros(len(self.kept), dtype=torch.int64, device=lengths.device)
        self.places[self.kept] = self.mask.flatten().nonzero()[:, 0]

    def spread(self, values: Tensor) -> Tensor:
        """Values [T] as rows; 0 where no token is."""
        rows = values.new_zeros(self.mask.shape)
        rows[self.mask] = values[self.kept]
        return rows


def _real(batch: Batch) -> Tensor | None:
    """bool [sequences]: which are no filler, found by their labels; None where all are. A filler of one token counts as
    a sequence: it predicts as little."""
    lengths = batch.cu_seqlens.long().diff()
    lengths = lengths[lengths > 0]
    if len(batch.lengths) == len(lengths) or batch.targets is not None or batch.decoder is not None:
        return None
    labelled = [bool((part != IGNORE).any()) for part in batch.labels.split(lengths.tolist())]
    real = torch.tensor(labelled, device=lengths.device) | (lengths == 1)
    real[0] |= not real.any()
    return real


class Hosted(LanguageModel):
    """Any language model of transformers that has a table."""

    hosted = True

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        super().__init__(hf_config)
        self.config = settings_of(self.hf_config)
        self.config.use_cache = False
        self.coefficient = float(getattr(self.config, "router_aux_loss_coef", 0.0) or 0.0)
        self.routed = self.coefficient > 0 and bool(getattr(self.config, "output_router_logits", False))
        with no_init_weights():
            model = getattr(transformers, self.name)._from_config(self.config, experts_implementation="eager")
        model.tie_weights()
        head = model.get_output_embeddings()
        path = next(name for name, module in model.named_modules() if module is head)
        if f"{path}.weight" not in self.aliases:
            head.weight = nn.Parameter(torch.empty_like(head.weight))  # a T5 is tied whatever its config says
        model.set_submodule(path, Answers(head))
        for module in model.modules():  # router logits are recorded here; DeepSpeed's AutoEP would stop at these
            if isinstance(outputs := getattr(module, "_can_record_outputs", None), dict) and "router_logits" in outputs:
                module._can_record_outputs = {}
            if "act_fn" in module._modules and any(p.dim() == 3 for p in module.parameters(recurse=False)):
                # Called once for each expert that gets tokens, as a plain function: under ZeRO-3 every rank has to run
                # the same modules
                module.act_fn = module._modules.pop("act_fn").forward
        self._hosted, self._path = [model], path  # in a list: not a part of this model, whose parts are its parts
        for name, part in model.named_children():
            self.add_module(name, part)

    @property
    def stacks(self) -> dict[str, nn.ModuleList]:
        """The lists of layers, by the depth axis of the table that numbers each."""
        paths = {row.depth: row.name.split(".{")[0] for row in self.table.rows if row.depth}
        found = {axis: self.get_submodule(paths[axis]) for axis in self.table.sizes.depth}
        return {axis: stack for axis, stack in found.items() if isinstance(stack, nn.ModuleList)}

    @property
    def layers(self) -> nn.ModuleList:
        return nn.ModuleList(chain.from_iterable(self.stacks.values()))

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """Nothing: the blocks stay as transformers has them."""

    def forward(self, batch: Batch, step: Step | None = None, *, return_logits: bool = False) -> Output:
        """As `LanguageModel.forward`; without gradients the loss is the head's alone. Raises InvalidConfig for
        next-sentence labels."""
        if batch.nsp_labels is not None:
            raise InvalidConfig(
                f"the batch has next-sentence labels, which a {self.name} run by transformers does not learn from; "
                "prepare the text without pairs of segments"
            )
        asked, inputs = self._inputs(batch, return_logits)
        if "experts" in self.sizes:
            self.config._experts_implementation = self._experts()
        with self._recording() as routed, self._running(step):
            (loss, correct, predicted, *logits), _ = self._ask(asked, inputs)
        if routed:
            balance = sys.modules[type(self._hosted[0]).__module__].load_balancing_loss_func
            chosen, mask = self.config.num_experts_per_tok, inputs["attention_mask"]
            loss = loss + self.coefficient * balance(tuple(routed), self.sizes["experts"], chosen, mask)
        return Output(loss, correct, predicted, logits[0] if return_logits else None)

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        (places, _, _), inputs = self._inputs(batch, False)
        self.config._experts_implementation = "eager"  # an expert after the other, so that each can be read alone
        return self._ask((places, None, True), inputs)

    def _ask(self, asked: tuple[Tensor, Tensor | None, bool], inputs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        """What the head answers in transformers' forward pass, and the next-sentence logits where that head is."""
        (model,), head = self._hosted, cast(Answers, self.get_submodule(self._path))
        head.asked = asked
        try:
            found = model(**inputs)
        finally:
            head.asked = None
        return found["logits" if "logits" in found else "prediction_logits"], found.get("seq_relationship_logits")

    @property
    def head_path(self) -> str:
        return self._path

    def _inputs(self, batch: Batch, wanted: bool) -> tuple[tuple[Tensor, Tensor, bool], dict[str, Any]]:
        """What the head is asked, and what transformers' forward pass is called with."""
        rows = Rows(batch.cu_seqlens, _real(batch))
        given: dict[str, Any] = {"input_ids": rows.spread(batch.tokens), "attention_mask": rows.mask.long()}
        if batch.decoder is not None:
            rows = Rows(batch.decoder.cu_seqlens)
            tokens = rows.spread(batch.decoder.tokens)
            given |= {"decoder_input_ids": tokens, "decoder_attention_mask": rows.mask.long()}
        else:
            given["position_ids"] = rows.spread(batch.positions)
        if hasattr(self.config, "type_vocab_size"):
            given["token_type_ids"] = rows.spread(batch.types)
        if self.routed:
            given["output_router_logits"] = False  # `_recording` does
        places = rows.places if batch.targets is None else rows.places[batch.targets]
        return (places, batch.labels, wanted), given

    @contextmanager
    def _recording(self) -> Iterator[list[Tensor]]:
        """The logits of every router that runs, [padded tokens, experts], if the model learns from them."""
        found: list[Tensor] = []

        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        blocks: list[Any] = [layer.mlp for layer in self.layers] if self.routed and torch.is_grad_enabled() else []
        # expert-parallel engines have a router in the block's place of the gate
        hooks = [getattr(block, "router", block).gate.register_forward_hook(record) for block in blocks]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _experts(self) -> str:
        """transformers' name of how experts are computed. Grouped products read rows of whole 16 bytes, and know no
        float64."""
        dtype = next(self.parameters()).dtype
        whole = all(self.sizes[axis] * dtype.itemsize % 16 == 0 for axis in ("embed", "ffn"))
        return "grouped_mm" if whole and dtype != torch.float64 else "eager"

    @contextmanager
    def _running(self, step: Step | None) -> Iterator[None]:
        """Let transformers' forward pass go through the layers of a step."""
        parts, stacks = self.parts, self.stacks
        step = full(parts) if step is None else step.check(parts)
        recompute = self.recompute and self.training
        whole = step.run == full(parts).run
        if not whole and len(stacks) > 1:
            raise InvalidConfig(
                f"the layers {step.run} of a {self.table.model_type} run; the first layer of each of its stacks has "
                "the position biases of all, so that only all of its layers can run, once and in order"
            )
        if whole and "embeddings" in step.learn and not recompute:
            yield
            return
        # Two stacks: the encoder's last norm learns with the head, by way of the whole decoder
        lowest = step.lowest(parts) if len(stacks) == 1 else 0
        kept = {stack: list(stack) for stack in stacks.values()}
        numbered = list(chain.from_iterable(kept.values()))
        try:
            below = 0
            for stack, layers in kept.items():
                run = [(place, n) for place, n in enumerate(step.run) if below <= n < below + len(layers)]
                cut = run[0][0] if "embeddings" not in step.learn else -1
                _fill(stack, [Place(numbered[n], place >= lowest, place == cut, recompute) for place, n in run])
                below += len(layers)
            with self._described(step) if len(stacks) == 1 else nullcontext():
                yield
        finally:
            for stack, layers in kept.items():
                _fill(stack, layers)

    @contextmanager
    def _described(self, step: Step) -> Iterator[None]:
        """Let the config, by which transformers' forward pass goes, describe the layers that run."""
        changes: dict[str, Any] = {"num_hidden_layers": len(step.run)}
        if kinds := getattr(self.config, "layer_types", None):
            changes["layer_types"] = [kinds[n] for n in step.run]
        before = {key: getattr(self.config, key) for key in changes}
        try:
            for key, value in changes.items():
                setattr(self.config, key, value)
            yield
        finally:
            for key, value in before.items():
                setattr(self.config, key, value)


def _fill(stack: nn.ModuleList, layers: list[nn.Module]) -> None:
    """Change what a list of layers holds."""
    stack._modules = {str(i): layer for i, layer in enumerate(layers)}
