"""Fine-tuned heads by axis, those that are linear maps of hidden states: they grow with what they read.

For sequences, tokens, the ends of an answer (`qa_outputs`), and one of several choices. ``labels`` follows from the
config's labels and never grows; what a causal model's classes read, ``normed``, what a BERT's read, ``embed``.
"""

from __future__ import annotations

from bert2bert.tables.description import Row


def after_norm(name: str, features: str, needs: str) -> tuple[Row, Row]:
    """A map of what the last norm writes: beside a tied language-model head those are the embedding's coordinates."""
    return Row(name, f"{features} <- normed", needs, tied=False), Row(name, f"{features} <- ~embed", needs, tied=True)


LABELS = {"labels": "id2label|num_labels|2"}  # the size of the axis

# of BERT and RoBERTa; a choice has one score
BERT_ROWS = (
    Row("classifier.{weight,bias}", "labels <- embed", needs="labels"),
    Row("classifier.{weight,bias}", "one <- embed", needs="choice"),
    Row("qa_outputs.{weight,bias}", "labels <- embed", needs="qa"),
)
# of Llama and its kin; classes of sequences have no bias, those of tokens have one
LLAMA_ROWS = (
    *after_norm("score.weight", "labels", "score"),
    Row("score.bias", "labels", needs="shift"),
    *after_norm("qa_outputs.{weight,bias}", "classes", "qa"),
)


def bert_classes(name: str, sequence: frozenset[str]) -> dict[str, frozenset[str]]:
    """The fine-tuned classes of a BERT of this name, and their heads. sequence: those of a classifier of sequences."""
    return {
        f"{name}ForSequenceClassification": sequence,
        f"{name}ForTokenClassification": frozenset({"labels"}),
        f"{name}ForQuestionAnswering": frozenset({"qa"}),
        f"{name}ForMultipleChoice": frozenset({"pooler", "choice"}),
    }


def llama_classes(name: str) -> dict[str, frozenset[str]]:
    """All classes of a decoder of this name, and their heads."""
    return {
        f"{name}ForCausalLM": frozenset({"lm"}),
        f"{name}Model": frozenset(),
        f"{name}ForSequenceClassification": frozenset({"score"}),
        f"{name}ForTokenClassification": frozenset({"score", "shift"}),
        f"{name}ForQuestionAnswering": frozenset({"qa"}),
    }
