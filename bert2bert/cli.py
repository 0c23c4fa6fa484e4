"""The ``bert2bert`` command. Sub-commands import what they need when they run, so that ``--help`` imports no torch.

Exit status: 0 done, 1 a check failed (verify, inspect --check), 2 the input cannot be used (the message says why and
what would work).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from bert2bert.errors import InvalidConfig, UserError
from bert2bert.options import parser


def main(argv: Sequence[str] | None = None, comm: Any = None) -> int:
    """Run one command. comm: an MPI communicator when every rank calls this alike (``grow``, ``reshard``)."""
    args = parser(_RUNS).parse_args(argv)
    workers = getattr(args, "workers", None)
    if comm is None and workers is not None and (workers != 1 or argv is None):
        return _watched(args)  # a growth typed at a prompt has a process that watches it, even if it is one process
    return _run(args, comm)


def _watched(args: argparse.Namespace) -> int:
    from bert2bert.shards import workers

    try:
        if args.workers > 1:
            importlib.import_module("bert2bert.growth")
            importlib.import_module("torch")  # once, not in every process
        return workers.run(args.workers, lambda comm: _run(args, comm))
    except UserError as error:
        print(f"bert2bert {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace, comm: Any) -> int:
    try:
        return int(args.run(args, comm) or 0)
    except UserError as error:
        if comm is None or comm.Get_rank() == 0:
            print(f"bert2bert {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        if comm is None or comm.Get_rank() == 0:
            print(f"bert2bert {args.command}: interrupted; nothing was committed", file=sys.stderr)
        return 130


# ------------------------------------------------------------------------------------------------ commands


def _prepare(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.data.prepare import prepare

    text, heldout, fraction = args.text, args.heldout_text, args.heldout_fraction
    if args.corpus:
        from bert2bert.data.corpus import books

        shelf = books()
        if args.corpus not in shelf:
            from bert2bert.errors import InvalidData, did_you_mean

            raise InvalidData(
                f"--corpus {args.corpus!r} is no book of the embedded corpus; {did_you_mean(args.corpus, shelf)}"
            )
        text = [path for name, path in shelf.items() if name != args.corpus]
        heldout = [shelf[args.corpus]]
    if fraction is None:
        fraction = 0.0 if heldout else 0.01
    meta = prepare(
        text=text,
        dataset=args.dataset,
        dataset_config=args.dataset_config,
        dataset_split=args.dataset_split,
        text_column=args.text_column,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        heldout_text=heldout,
        heldout_fraction=fraction,
        document=args.document,
        output=args.output,
        seed=args.seed,
    )
    for name, split in meta["splits"].items():
        print(f"{name:8} {split['tokens']:,} tokens in {split['documents']:,} documents")
    held = meta["splits"].get("heldout", {})
    if "unigram_entropy" in held:
        print(
            f"held out: unigram entropy {held['unigram_entropy']:.4f} nats a token; a model below it has learnt context"
        )
    print(f"written  {args.output}")


def _inspect(args: argparse.Namespace, comm: Any) -> int:
    from bert2bert.shards.inspect import check, inspect, render, render_check

    if args.check:
        checked = check(args.path, args.tag)
        print(json.dumps(checked, indent=1) if args.json else render_check(checked))
        return 1 if checked["bad"] else 0
    found = inspect(args.path, args.tag)
    print(json.dumps(found, indent=1, default=str) if args.json else render(found, tensors=args.tensors))
    return 0


def _operators(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.catalogue import describe, listing

    found = describe(args.name) if args.name else listing()
    print(json.dumps(found, indent=1) if args.json else found["text"])


def _how(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "source_config": args.source_config,
        "tag": args.tag,
        "other": args.other,
        "alpha": args.alpha,
        "width": args.width,
        "depth": args.depth,
        "seed": args.seed,
        "vocab": args.vocab,
        "positions": args.positions,
        "experts": args.experts,
        "breaker": args.break_symmetry,
        "moments": args.moments,
    }


def _plan(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.costs import bandwidth, cost, cost_line
    from bert2bert.planning import describe, open_growth, summary

    disk = bandwidth(args.disk_bandwidth)
    growth = open_growth(args.source, args.config, **_how(args))
    found = describe(growth) | {"cost": cost(growth, args.ranks, disk)}
    if args.json:
        print(json.dumps(found, indent=1, default=str))
        return
    print(summary(growth, found))
    print(cost_line(found["cost"]))
    tensors = found["tensors"]
    wide = max(len(name) for name in tensors)
    print(f"\n{'target tensor':{wide}}  {'shape':14} {'bytes':>14}  {'from':{wide}}  how")
    for name, t in tensors.items():
        shape = " x ".join(map(str, t["shape"]))
        print(f"{name:{wide}}  {shape:14} {t['bytes']:14,}  {', '.join(t['from']) or '-':{wide}}  {t['how']}")


def _target(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "form": args.format,
        "stage": args.stage,
        "world_size": args.world_size,
        "expert_parallel": args.expert_parallel,
        "precision": args.precision,
        "layout": args.groups,
        "shard_size": args.shard_size,
    }


def _grow(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.growth import grow

    _check_workers(args, comm)
    grow(
        args.source,
        args.target,
        args.config,
        lossy=args.lossy,
        measure=not args.no_measure,
        bins=args.bins,
        **_target(args),
        comm=comm,
        **_how(args),
    )


def _reshard(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.reshard import reshard

    _check_workers(args, comm)
    reshard(
        args.source,
        args.target,
        **_target(args),
        source_config=args.source_config,
        tag=args.tag,
        comm=comm,
    )


def _check_workers(args: argparse.Namespace, comm: Any) -> None:
    if comm is not None and args.workers not in (1, comm.Get_size()):
        raise InvalidConfig(f"--workers {args.workers}: the launcher has started {comm.Get_size()} ranks; leave it out")


def _learn(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.learned import learn

    fitted = ("source_config", "tag", "steps", "lr", "noise", "rows", "length", "seed", "device")
    learn(args.source, args.config, args.data, args.output, **{key: getattr(args, key) for key in fitted})


def _verify(args: argparse.Namespace, comm: Any) -> int:
    from bert2bert.verify import render, verify

    found = verify(
        args.source,
        args.grown,
        source_config=args.source_config,
        tag=args.tag,
        grown_tag=args.grown_tag,
        other=args.other,
        bins=args.bins,
        tokens=args.tokens,
        logits=not args.no_logits,
    )
    text = json.dumps(found, indent=1)
    if args.output:
        try:
            args.output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidConfig(f"--output {args.output}: cannot be written ({error.strerror}); name another") from None
    print(text if args.json else render(found))
    return 0 if found["ok"] else 1


def _report(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.report import render, report

    found = report(args.runs, args.output)
    print(json.dumps(found, indent=1, default=str) if args.json else render(found))


_RUNS = {
    "prepare": _prepare,
    "inspect": _inspect,
    "operators": _operators,
    "plan": _plan,
    "grow": _grow,
    "reshard": _reshard,
    "learn": _learn,
    "verify": _verify,
    "report": _report,
}


if __name__ == "__main__":
    sys.exit(main())
