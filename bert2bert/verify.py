"""Check a grown checkpoint: every tensor and moment against the plan, logits and loss against the source.

The plan is rebuilt from the growth manifest and must have the stored digest; then every row of every state of every
tensor is compared bit for bit. Both models are run one layer at a time, in float64, on the same tokens (random, or
held-out text from token bins), so that no whole model is in memory.

Refuses a grown checkpoint that is not a model of its own config (`InvalidCheckpoint`). A check that fails is a result,
not an error: it is in the report and in the exit code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bert2bert.checkpoint_model import CheckpointModel, open_model
from bert2bert.errors import InvalidConfig
from bert2bert.model.batch import IGNORE, Batch
from bert2bert.model.config import BertConfig
from bert2bert.model.streaming import streamed_forward
from bert2bert.operators.growth import plan_growth
from bert2bert.plan import GrowthPlan
from bert2bert.realise import realise
from bert2bert.states import MOMENTS

if TYPE_CHECKING:
    from bert2bert.planning import Growth

# An exact growth in float32 differs by the rounding of its shares (1/3 is no float); 16-bit files by more.
TOLERANCE = {"float32": 1e-5, "float64": 1e-5, "float16": 2e-2, "bfloat16": 1.5e-1}
_ROWS = 1 << 22  # elements compared at a time
_SAMPLE_TOKENS, _SAMPLE_LENGTH = 2048, 64


@dataclass(frozen=True)
class Drift:
    """How far two models are apart on the same masked tokens. loss: nats a prediction, source and grown;
    logits_relative: |grown - source| / |source| in the Euclidean norm; agreement: share of equal best guesses."""

    tokens: int
    predictions: int
    text: str
    loss_source: float
    loss_grown: float
    logits_max: float
    logits_relative: float
    agreement: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)

    def render(self) -> str:
        """One line for a terminal."""
        return (
            f"drift    loss {self.loss_source:.6g} -> {self.loss_grown:.6g} nats on {self.predictions} predictions "
            f"({self.text}); logits differ by {self.logits_relative:.3g} relative, {self.logits_max:.3g} at most; "
            f"{100 * self.agreement:.4g} % equal best guesses"
        )


def drift(growth: Growth, bins: Path | None = None) -> Drift:
    """The change of function that a growth will make, before anything is written."""
    model, plan = growth.model, growth.plan

    def grown(name: str) -> Tensor:
        return realise(plan.tensors[name], "fp32", model.read)

    return _compare(model, grown, plan.config, bins)


def _compare(
    model: CheckpointModel, grown: Callable[[str], Tensor], config: dict[str, Any], bins: Path | None
) -> Drift:
    small = BertConfig.from_hf(model.config)
    batch, text = _sample(small, bins, _trained_length(model))

    def source(name: str) -> Tensor:
        return model.read(name, "fp32", 0, model.parameters[name].shape[0])

    runs = []
    for c, fetch in ((small, source), (BertConfig.from_hf(config), grown)):
        runs.append(streamed_forward(c, fetch, batch, torch.float64))
    a, b = runs
    keep = batch.labels != IGNORE
    x, y = (run.logits[keep] for run in runs if run.logits is not None)  # a streamed run always has them
    return Drift(
        tokens=batch.real_tokens,
        predictions=int(keep.sum()),
        text=text,
        loss_source=float(a.loss),
        loss_grown=float(b.loss),
        logits_max=float((x - y).abs().max()),
        logits_relative=float((x - y).norm() / x.norm()),
        agreement=float((x.argmax(1) == y.argmax(1)).double().mean()),
    )


def _trained_length(model: CheckpointModel) -> int:
    """The rows' length that the source was trained on, where its manifest tells: positions beyond it know nothing."""
    training = (model.source.manifest or {}).get("training") or {}
    return int(training.get("recipe", {}).get("data", {}).get("seq_len", _SAMPLE_LENGTH))


def _sample(config: BertConfig, bins: Path | None, longest: int) -> tuple[Batch, str]:
    """Held-out text from token bins, or random tokens from a fixed seed; 15 % of the places are predicted."""
    length = min(_SAMPLE_LENGTH, longest, config.max_position_embeddings)
    rows = max(1, _SAMPLE_TOKENS // length)
    if bins is not None:
        from bert2bert.data.bins import TokenBins
        from bert2bert.data.loader import eval_batches

        opened = TokenBins.open(bins)
        if opened.vocab_size > config.vocab_size:
            raise InvalidConfig(
                f"{bins}: a vocabulary of {opened.vocab_size} tokens, the model's has {config.vocab_size}; "
                f"give the bins that this model was trained on"
            )
        return eval_batches(opened, "heldout", length, rows, rows, 0, 1, 0)[0], "held-out text"
    rng = np.random.default_rng(0)
    count = rows * length
    tokens = torch.from_numpy(rng.integers(0, config.vocab_size, count))
    masked = torch.from_numpy(np.sort(rng.permutation(count)[: max(1, round(0.15 * count))]))
    batch = Batch(
        tokens=tokens,
        positions=torch.arange(length).repeat(rows),
        types=torch.zeros(count, dtype=torch.int64),
        cu_seqlens=torch.arange(0, count + 1, length, dtype=torch.int32),
        max_seqlen=length,
        masked=masked,
        labels=tokens[masked],
        real_tokens=count,
        attended=rows * length**2,
    )
    return batch, "random tokens"


# -------------------------------------------------------------------------------------------------- verify


def verify(
    source: Path,
    grown: Path,
    *,
    source_config: Path | None = None,
    tag: str | None = None,
    grown_tag: str | None = None,
    bins: Path | None = None,
) -> dict[str, Any]:
    """Compare a grown checkpoint with its source. Returns {"ok", "checks": [{"name", "ok", "detail"}], "drift"}."""
    model = open_model(source, source_config, tag)
    target = open_model(grown, tag=grown_tag)
    manifest = (target.source.manifest or {}).get("growth")
    checks: list[dict[str, Any]] = []

    def check(name: str, ok: bool, detail: str) -> None:
        checks.append({"name": name, "ok": bool(ok), "detail": detail})

    exact = True
    if manifest is None:
        detail = "no growth manifest: only the function is compared, and it is expected to be equal"
        check("manifest", True, detail)
    else:
        mine, theirs = model.source.identity(), manifest["source"]
        keys = [k for k in theirs if k != "path" and mine.get(k) != theirs[k]]
        was = f"grown from tag {theirs.get('tag')}, this is {mine.get('tag')} (differs in {', '.join(keys)})"
        check("source", not keys, f"{was}; choose it with --tag" if keys else "the checkpoint that was grown")
        plan = _replan(model, target, manifest["operators"])
        same = plan.digest() == manifest["plan_digest"]
        check("plan", same, plan.digest()[:16] if same else "rebuilt from the manifest, it has another digest")
        _check_tensors(model, target, plan, check)
        exact = not plan.exactness.function
    found = None
    if "mlm" in model.heads and "mlm" in target.heads:
        found = _compare(model, lambda n: _whole(target, n, "fp32"), target.config, bins)
        dtype = next(iter(target.source.tensors.values())).dtype if target.source.form == "hub" else "float32"
        limit = TOLERANCE[dtype.removeprefix("torch.")]
        if exact:
            check("logits", found.logits_relative <= limit, f"{found.logits_relative:.3g} relative, at most {limit:g}")
            gap = abs(found.loss_grown - found.loss_source)
            check(
                "loss", gap <= limit * max(1.0, found.loss_source), f"{found.loss_source:.6g} -> {found.loss_grown:.6g}"
            )
        else:
            detail = f"not promised: {found.logits_relative:.3g} relative, loss {found.loss_source:.6g} -> "
            check("logits", True, detail + f"{found.loss_grown:.6g}")
    else:
        check("logits", True, "no masked-LM head in this checkpoint, so there are no logits to compare")
    return {"ok": all(c["ok"] for c in checks), "checks": checks, "drift": found.as_dict() if found else None}


def _replan(model: CheckpointModel, target: CheckpointModel, how: dict[str, Any]) -> GrowthPlan:
    return plan_growth(
        model.config,
        target.config,
        width=how["width"],
        depth=how["depth"],
        seed=how["seed"],
        breaker=how["break_symmetry"],
        heads=model.heads,
    )


def _check_tensors(
    model: CheckpointModel, target: CheckpointModel, plan: GrowthPlan, check: Callable[[str, bool, str], None]
) -> None:
    """Every state of every tensor against the plan, and the step counts against the source's."""
    for state in target.source.states:
        wrong = [name for name in plan.tensors if not _equal(model, target, plan, name, state)]
        what = "weights" if state == "fp32" else state
        detail = f"{len(wrong)} differ, first {wrong[0]}" if wrong else f"{len(plan.tensors)} tensors, bit for bit"
        check(what, not wrong, detail)
    if all(m in target.source.states and m in model.source.states for m in MOMENTS):
        steps = _steps(model, target, plan)
        off = [f"{n}: {a} in the source, {b} grown" for n, (a, b) in steps.items() if a != b]
        check("step", not off, off[0] if off else f"kept ({', '.join(sorted({str(a) for a, _ in steps.values()}))})")


def _steps(model: CheckpointModel, target: CheckpointModel, plan: GrowthPlan) -> dict[str, tuple[int, int]]:
    """Adam steps of every target tensor, expected and found. A group has one count, the largest of its origins."""
    origin = {
        target.stored(n): model.source.step(model.stored(t.sources[0])) if t.sources else 0
        for n, t in plan.tensors.items()
    }
    expected = dict(origin)
    for group in target.source.groups:
        for name in group["names"]:
            expected[name] = max(origin[member] for member in group["names"])
    return {name: (expected[name], target.source.step(name)) for name in origin}


def _equal(model: CheckpointModel, target: CheckpointModel, plan: GrowthPlan, name: str, state: str) -> bool:
    tensor = plan.tensors[name]
    rows = tensor.shape[0]
    block = max(1, _ROWS // max(1, int(np.prod(tensor.shape[1:]))))
    for start in range(0, rows, block):
        stop = min(rows, start + block)
        found = target.read(name, state, start, stop)
        if state in model.source.states:
            expected = realise(tensor.narrow(start, stop), state, model.read)
        else:  # a source of weights only gives an optimizer that has not stepped
            expected = torch.zeros_like(found)
        if not torch.equal(found, expected.to(found.dtype)):
            return False
    return True


def _whole(model: CheckpointModel, name: str, state: str) -> Tensor:
    return model.read(name, state, 0, model.parameters[name].shape[0])


def render(report: dict[str, Any]) -> str:
    """The report as a table for a terminal."""
    lines = [f"{'ok' if c['ok'] else 'FAILED':7} {c['name']:11} {c['detail']}" for c in report["checks"]]
    return "\n".join([*lines, "verified" if report["ok"] else "NOT verified"])
