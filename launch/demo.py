"""The whole path at a size for two CPU cores: prepare, pre-train small, grow, pre-train in two stages, compare.

Twice: a BERT, one command at a time, and a GPT-2 that grows between two phases of a run. Runs the README's commands as
processes of their own, each shown before it starts and timed, and stops at the first that fails, with its exit status.
Everything lands in one folder (demo_out). Refuses a folder that holds anything already; --clean deletes an earlier demo
first, and only a folder that a demo made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bert2bert.terminal.arguments import Parser

ROOT = Path(__file__).resolve().parent.parent
MARK = "demo.json"  # written first: what makes a folder a demo's own
HELD_OUT = "persuasion"
RANKS = 2
STEP_SECONDS = 1800  # far above any step; ends a hang


@dataclass(frozen=True)
class Step:
    title: str
    command: list[str]


def steps(out: Path, port: int) -> list[Step]:
    """The demo's commands, as a user would type them in the project's folder."""
    bins, small, grown, base, scratch = (str(out / name) for name in ("bins", "small", "grown", "bert2bert", "scratch"))
    tokenizer, causal_bins = str(out / "gpt2_tokenizer"), str(out / "gpt2_bins")
    causal, causal_scratch = str(out / "gpt2"), str(out / "gpt2_scratch")
    target = "recipes/configs/demo_base.json"

    def pretrain(recipe: str, bins: str, output: str, *more: str) -> list[str]:
        launcher = ["deepspeed", "--num_accelerators", str(RANKS), "--master_port", str(port), "launch/pretrain.py"]
        files = ["--ds_config", "ds_configs/zero2_cpu.json", "--recipe", f"recipes/{recipe}.py"]
        return [*launcher, *files, "--bins", bins, "--output", output, *more]

    # aki leaves the top layer's copies alike, and this small model has no dropout to tell them apart
    growth = ["--config", target, "--width", "aki", "--depth", "stack", "--break-symmetry", "noise"]
    return [
        Step(
            "Seven novels to token bins, one of them held out",
            ["bert2bert", "prepare", "--corpus", HELD_OUT, "--vocab-size", "1024", "--output", bins],
        ),
        Step("A small BERT from random weights", pretrain("demo_small", bins, small)),
        Step("What is in its checkpoint", ["bert2bert", "inspect", small]),
        Step("What growing it would do", ["bert2bert", "plan", small, *growth]),
        Step("Grow it, optimizer state included", ["bert2bert", "grow", small, grown, *growth, "--bins", bins]),
        Step("Compare the grown checkpoint with its source", ["bert2bert", "verify", small, grown, "--bins", bins]),
        Step("Pre-train the grown model in two stages", pretrain("demo_bert2bert", bins, base, "--resume", grown)),
        Step("The same target from random weights", pretrain("demo_scratch", bins, scratch)),
        Step("What growing saved", ["bert2bert", "report", scratch, base, "--output", str(out / "report")]),
        Step(
            "A tokenizer of GPT-2's kind",
            ["python", "launch/demo_tokenizer.py", "--corpus", HELD_OUT, "--output", tokenizer],
        ),
        Step(
            "The novels for a model that predicts the next token",
            ["bert2bert", "prepare", "--corpus", HELD_OUT, "--tokenizer", tokenizer, "--output", causal_bins],
        ),
        Step("A GPT-2 of two layers that grows in its run", pretrain("demo_gpt2", causal_bins, causal)),
        Step("The grown GPT-2 from random weights", pretrain("demo_gpt2_scratch", causal_bins, causal_scratch)),
        Step(
            "What growing in the run saved",
            ["bert2bert", "report", causal_scratch, causal, "--output", str(out / "gpt2_report")],
        ),
    ]


def run(step: Step, limit: float = STEP_SECONDS) -> tuple[int, float]:
    """Run one command to its end: its exit status (124 after `limit` seconds) and its wall-clock seconds.

    The command gets a process group of its own, so that a time-out or Ctrl-C ends launchers with all their ranks.
    """
    began = time.monotonic()
    try:
        process = subprocess.Popen(step.command, cwd=ROOT, env=_environment(), start_new_session=True)
    except FileNotFoundError:
        print(f"error: there is no command {step.command[0]!r}; run the demo with `make demo`.", file=sys.stderr)
        return 127, 0.0
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"error: {step.command[0]} still ran after {limit:g} s and was stopped.", file=sys.stderr)
        _end(process)
        status = 124
    except BaseException:
        _end(process)
        raise
    return 128 - status if status < 0 else status, time.monotonic() - began


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "PATH": path}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all it started: kindly at first, after ten seconds for good."""
    os.killpg(process.pid, signal.SIGTERM)  # the group exists: its leader has not been waited for
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # ranks that outlived their launcher
    process.wait()


def make_folder(out: Path, clean: bool) -> str | None:
    """Make the demo's folder; a message when it may not be used."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARK).is_file():
            return f"{out} holds something that is not a demo's. Expected no such folder; name another with --output."
        if not clean:
            return f"{out} holds an earlier demo. Run `make demo ARGS=--clean` to delete it and start again."
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="launch/demo.py",
        description="Run the whole path on the embedded corpus: some minutes on two CPU cores.",
        epilog="example:\n  make demo\n  python launch/demo.py --output /tmp/demo --clean",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=ROOT / "demo_out", metavar="DIR", help="default: demo_out")
    parser.add_argument("--clean", action="store_true", help="delete an earlier demo in that folder first")
    options = parser.parse_args(argv)
    out = options.output.resolve()
    try:
        refusal = make_folder(out, options.clean)
    except OSError as error:
        refusal = f"{out} cannot be used: {error.strerror}. Name another folder with --output."
    if refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    shown = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    spent: list[dict[str, object]] = []
    plan = steps(shown, _free_port())
    total = 0.0
    for number, step in enumerate(plan, 1):
        (out / MARK).write_text(json.dumps({"steps": spent}, indent=1) + "\n", encoding="utf-8")
        print(f"\n=== {number}/{len(plan)}  {step.title}\n$ {shlex.join(step.command)}", flush=True)
        try:
            status, seconds = run(step)
        except KeyboardInterrupt:
            print("\nstopped.", file=sys.stderr)
            return 130
        total += seconds
        spent.append({"title": step.title, "command": step.command, "seconds": round(seconds, 1), "status": status})
        if status:
            print(f"\nerror: step {number} ({step.title}) failed with exit status {status}.", file=sys.stderr)
            return status
        print(f"--- {seconds:.1f} s", flush=True)
    (out / MARK).write_text(json.dumps({"steps": spent, "seconds": round(total, 1)}, indent=1) + "\n", encoding="utf-8")
    print("\nTime:")
    for entry in spent:
        print(f"  {entry['seconds']:>7} s  {entry['title']}")
    print(
        f"  {total:7.1f} s  in all\n\nTables and plots: report.md and report.png in {shown}/report, {shown}/gpt2_report"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
