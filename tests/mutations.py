"""Forty single mistakes, each of which the short suite must catch: python -m tests.mutations [WORDS] [--jobs N].

Each is a small replacement in a copy of the package in a temporary folder, where the tests that should see it run until
the first failure; that test must pass without the mistake. Only mistakes whose name has one of WORDS run. The status is
1 if one is not caught, breaks the collection of tests, or no longer applies because its text is not in the file exactly
once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("bert2bert", "tests", "launch", "recipes", "ds_configs", "pyproject.toml")


@dataclass(frozen=True)
class Mistake:
    """file: inside the package; old, new: the text replaced, which must be there once; tests: arguments of pytest."""

    file: str
    old: str
    new: str
    tests: str

    @property
    def name(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())}"


FAMILIES, COPYING, DEPTH = "tests/laws/test_families.py", "tests/laws/test_copying.py", "tests/laws/test_depth.py"
VOCAB, PUBLISHED = "tests/laws/test_vocab.py", "tests/laws/test_published.py"
LEVELS, GROWTH = "tests/laws/test_levels.py", "tests/laws/test_growth.py"
TABLE, WRITERS = "tests/tables/test_coverage.py", "tests/checkpoints/test_writers.py"
LAYOUT, WRITTEN = "tests/checkpoints/test_layout.py", "tests/checkpoints/test_readers_written.py"
GOLDEN = "tests/train/test_golden.py"

MISTAKES = (
    # the algebra
    Mistake("algebra/maps.py", "self.index[:, None] * other.source + other.index[None, :]",
            "self.index[:, None] + self.source * other.index[None, :]", FAMILIES),
    Mistake("algebra/maps.py", "gain=self.share, share=self.gain", "gain=self.gain, share=self.share", FAMILIES),
    Mistake("algebra/maps.py", "share=1.0 / counts[idx]", "share=1.0 / counts[idx[:1]]", f"{FAMILIES} {COPYING}"),
    Mistake("algebra/maps.py", "share=w / total[idx]", "share=w / total.mean()", FAMILIES),
    Mistake("algebra/maps.py", "other.index + self.source", "other.index", FAMILIES),
    Mistake("algebra/maps.py", "np.array([1.0 / factor])", "np.array([factor])", COPYING),
    Mistake("algebra/realise.py", "factor**how.power", "factor", FAMILIES),
    Mistake("algebra/realise.py", "dim.grad if how.gradient else dim.param", "dim.param", FAMILIES),
    Mistake("algebra/realise.py", "_zero(out, plan.fresh)", "_zero(out, ())", f"{DEPTH} {LEVELS}"),
    Mistake("algebra/realise.py", "plan.noise is not None and not how.gradient", "plan.noise is not None",
            f"{GROWTH} {FAMILIES} {COPYING} {LEVELS}"),
    Mistake("algebra/states.py", "gradient=True, power=2", "gradient=True, power=1", FAMILIES),
    Mistake("algebra/axes.py", 'reads ^ flip ^ a.startswith("~")', "reads ^ flip", COPYING),
    # the tables
    Mistake("tables/bert.py", '"(heads ~qk) <- embed"', '"(heads qk) <- embed"', f"{COPYING} {TABLE}"),
    Mistake("tables/bert.py", '"(tau heads qk) <- embed"', '"(heads qk) <- embed"', f"{COPYING} {TABLE}"),
    Mistake("tables/bert.py", '"cls.predictions.transform.LayerNorm.weight", "(rho ~embed)"',
            '"cls.predictions.transform.LayerNorm.weight", "(rho embed)"', FAMILIES),
    Mistake("tables/bert.py", 'needs="pooler", untrained=True', 'needs="pooler"', "tests/tables/test_groups.py"),
    Mistake("tables/llama.py", '"(rho ~embed)", tied=True', '"(rho normed)", tied=True', FAMILIES),
    Mistake("tables/modernbert.py", '"(rho ~embed)"', '"(rho normed)"', f"{FAMILIES}::test_the_gradient_rule"),
    Mistake("tables/t5.py", '"(rho sigma ~embed)"', '"(rho ~embed)"', FAMILIES),
    Mistake("tables/t5.py", "only=(0, 1), decay=False", "only=(0, 1)", TABLE),
    Mistake("tables/modernbert.py", "(1, None)", "(0, None)", TABLE),
    # the operators
    Mistake("operators/width_copies.py", "gain=1.0 / qk.counts[qk.index], share=None", "gain=None", COPYING),
    Mistake("operators/depth.py", "range(source - rest, source)", "range(rest)", DEPTH),
    Mistake("operators/depth.py", "[layer * source // target for", "[-(-layer * source // target) % source for", DEPTH),
    Mistake("operators/vocab.py", "np.resize(np.array(ids, dtype=np.int64), new - old)",
            "np.sort(np.resize(np.array(ids, dtype=np.int64), new - old))", VOCAB),
    Mistake("operators/vocab.py", "1.0 / old", "1.0 / (old + 1)", VOCAB),
    Mistake("operators/width_scaled.py", "sqrt(np.square(gather.counts).mean())", "gather.counts.mean()", PUBLISHED),
    Mistake("operators/width_scaled.py", "(target - source) // 2", "(target - source)", PUBLISHED),
    Mistake("operators/width_bert2bert.py", 'borrow=1 if source == "above" else -1', "borrow=-1", FAMILIES),
    # the readers and writers
    Mistake("checkpoints/zero/layout.py", "quantum = nccl_start_alignment * world", "quantum = world", LAYOUT),
    Mistake("checkpoints/zero/layout.py", "min((r + 1) * c, numels[i])", "(r + 1) * c", LAYOUT),
    Mistake("checkpoints/zero/contents.py", "torch.tensor(float(step))", "torch.tensor(float(step + 1))",
            f"{WRITTEN} {WRITERS}"),
    Mistake("checkpoints/universal/reader.py", "self._steps[name] = int(step)", "self._steps[name] = 0",
            f"{WRITTEN} {WRITERS}"),
    Mistake("checkpoints/hub/reader.py", "slice(start, stop)", "slice(0, stop - start)",
            f"{WRITTEN} {WRITERS} tests/checkpoints/test_readers_hub.py"),
    Mistake("files/zip_writer.py", "zlib_ng.crc32(block, checksum)", "zlib_ng.crc32(block)",
            f"tests/checkpoints/test_torchfile.py {WRITERS}"),
    # what a training step computes
    Mistake("train/optimizer.py", "groups = self.param_groups",
            "groups = self.param_groups\n        for state in self.state.values():\n"
            "            state.get('step', torch.zeros(())).add_(1)  # the correction of the moments' bias", GOLDEN),
    Mistake("train/engine.py", "loss = loss * (1 + 0 * loss.detach())",
            "loss = loss * (self.world + 0 * loss.detach())", GOLDEN),
    Mistake("checkpoints/groups.py", 'layout == "single" or member.decay', "True", GOLDEN),
    Mistake("recipe/schedules.py", "return peak * (at + 1) / (warmup + 1)", "return peak", GOLDEN),
    Mistake("train/ds_config.py", 'clip = config.setdefault("gradient_clipping", recipe.gradient_clipping)',
            "clip = recipe.gradient_clipping", GOLDEN),
)  # fmt: skip


def run(mistake: Mistake) -> str:
    """'caught by' a test, or what went wrong."""
    with tempfile.TemporaryDirectory(prefix="mistake") as folder:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder, name))
        file = Path(folder, "bert2bert", mistake.file)
        text = file.read_text("utf-8") if file.exists() else ""
        if text.count(mistake.old) != 1:
            return f"DOES NOT APPLY: its text is in the file {text.count(mistake.old)} times; change the mistake's text"
        file.write_text(text.replace(mistake.old, mistake.new), "utf-8")
        status, found = pytest(folder, mistake.tests.split())
        if status != 1:
            return "NOT CAUGHT" if status == 0 else f"BREAKS THE TESTS: {found}"
        file.write_text(text, "utf-8")
        return f"caught by {found}" if pytest(folder, [found])[0] == 0 else f"FAILS WITHOUT IT, TOO: {found}"


def pytest(folder: str, arguments: Sequence[str]) -> tuple[int, str]:
    """The exit status, and the first test that failed, else the last line."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    lines = done.stdout.splitlines() or done.stderr.splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    test = failed[0].partition(" ")[2].partition(" - ")[0] if failed else lines[-1]
    return done.returncode, test


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mistakes whose file and text have one of these")
    parser.add_argument("--jobs", type=int, default=2, help="mistakes tried at a time (2)")
    args = parser.parse_args(arguments)
    chosen = [m for m in MISTAKES if not args.words or any(word in m.name for word in args.words)]
    missed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mistake, found in zip(chosen, pool.map(run, chosen), strict=True):
            missed += not found.startswith("caught")
            print(f"{mistake.name}\n    {found}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mistakes caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
