"""BERT's forward pass with one layer's weights in memory at a time, fetched by name from wherever they lie.

For checking a checkpoint of any size against another. The same modules and the same arithmetic as `bert.Bert` in eval
mode, so the results are equal bit for bit. Holds no more than the largest of embeddings, one layer and head (in the
dtype asked for), plus the activations of the batch. Computes no gradients and runs every layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bert2bert.errors import InvalidCheckpoint
from bert2bert.model.attention import padding_for
from bert2bert.model.batch import Batch
from bert2bert.model.bert import Output, first_tokens, outcome
from bert2bert.model.blocks import Embeddings, Layer, Pooler, Predictions
from bert2bert.model.config import BertConfig

Fetch = Callable[[str], Tensor]


@torch.no_grad()
def streamed_forward(config: BertConfig, fetch: Fetch, batch: Batch, dtype: torch.dtype = torch.float32) -> Output:
    """The output, logits included, of the model whose weights `fetch` gives.

    fetch(name) -> the parameter of that Hugging Face name; tied copies are never asked for, the word embedding is asked
    for once for the embeddings and once for a tied head. Tensors go to `dtype` and the batch's device, and are dropped
    before the next module's are fetched. Raises InvalidCheckpoint for a shape that the config does not have; whatever
    fetch raises goes through.
    """

    def run(module: nn.Module, prefix: str, *inputs: object) -> Tensor:
        weights = {}
        for name, parameter in module.named_parameters():
            source = config.aliases.get(prefix + name, prefix + name)
            tensor = fetch(source)
            if tensor.shape != parameter.shape:
                raise InvalidCheckpoint(
                    f"weights for the model: {source} has shape {tuple(tensor.shape)}, expected "
                    f"{tuple(parameter.shape)}; does the config describe these weights?"
                )
            weights[name] = tensor.to(batch.tokens.device, dtype)
        return functional_call(module, weights, inputs)

    with torch.device("meta"):
        embeddings, layer, predictions = (kind(config).eval() for kind in (Embeddings, Layer, Predictions))
        pooler, pair = Pooler(config), nn.Linear(config.hidden_size, 2)
    x = run(embeddings, "bert.embeddings.", batch.tokens, batch.types, batch.positions)
    padding = padding_for(x, batch.cu_seqlens, batch.max_seqlen, config, training=False)
    for number in range(config.num_hidden_layers):
        x = run(layer, f"bert.encoder.layer.{number}.", x, batch.cu_seqlens, batch.max_seqlen, padding)
    nsp_logits = None
    if "nsp" in config.heads:
        nsp_logits = run(pair, "cls.seq_relationship.", run(pooler, "bert.pooler.", first_tokens(x, batch)))
    logits = run(predictions, "cls.predictions.", x.index_select(0, batch.masked))
    return outcome(batch, logits, nsp_logits, keep=True)
