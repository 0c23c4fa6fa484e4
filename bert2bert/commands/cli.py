"""The ``bert2bert`` command. Sub-commands import what they need when they run, so that ``--help`` imports no torch.

Exit status: 0 done; 1 a check failed (verify, inspect --check); 2 the input cannot be used (the message says why and
what would work); 130, 143 and 129 ended by Ctrl-C, SIGTERM or SIGHUP. With ``--json`` standard output holds the result
as one JSON object and nothing else; with ``--quiet`` it stays empty (with both, it holds the object).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert2bert.commands.by_recipe import OPERATORS, asks_recipe, recipe_of
from bert2bert.commands.options.growth import SIZES
from bert2bert.commands.parser import parser
from bert2bert.errors import InvalidConfig, UserError
from bert2bert.ranks.comm import ALONE, Comm
from bert2bert.terminal import interrupts

if TYPE_CHECKING:
    from bert2bert.checkpoints.target import Target


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, or print the help where none is named."""
    command = None
    try:
        with interrupts.raised() if argv is None else contextlib.nullcontext():
            args = parse(argv)
            if (command := args.command) is None:
                parser(_RUNS).print_help()
                return 0
            if argv is None and "workers" in args:
                return _watched(args)  # a growth typed at a prompt has a process that watches it, even if it is alone
            return run(args)
    except KeyboardInterrupt as error:
        return interrupts.end(command, error)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The words of a command line, checked; ends the program (status 2) where they are wrong."""
    return parser(_RUNS).parse_args(argv)


def run(args: argparse.Namespace, comm: Comm = ALONE) -> int:
    """Run the command that was parsed. comm: the ranks that a launcher started, where each calls this alike (``grow``,
    ``reshard``)."""
    return _run(args, comm) if comm is not ALONE or getattr(args, "workers", 1) == 1 else _watched(args)


def _watched(args: argparse.Namespace) -> int:
    from bert2bert.ranks import forked

    try:
        if args.workers > 1:
            importlib.import_module("bert2bert.commands.grow")
            importlib.import_module("torch")  # once, not in every process
        return forked.run(args.workers, lambda comm: _run(args, comm))
    except UserError as error:
        print(f"bert2bert {args.command}: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, comm: Comm) -> int:
    try:
        return int(args.run(args, comm) or 0)
    except UserError as error:
        if comm.rank == 0:
            print(f"bert2bert {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        sys.stderr.close()
        return 0


# ------------------------------------------------------------------------------------------------ what is printed

_WARNS = ("warning", "note")  # first words of the lines that --quiet lets through


def _say(args: argparse.Namespace) -> Callable[[str], None]:
    """The function that prints progress: to standard output, or to standard error if a program reads the output."""

    def say(text: str) -> None:
        if args.quiet:
            text = "\n".join(line for line in text.splitlines() if line.startswith(_WARNS))
        if text:
            print(text, file=sys.stderr if args.json or args.quiet else sys.stdout, flush=True)

    return say


def _show(args: argparse.Namespace, found: dict[str, Any], text: Callable[[], str] | None = None) -> None:
    """Print a result: its text, or with --json the object (NaN and infinities, which JSON does not have, as null)."""
    if args.json:
        plain = json.dumps(found, default=str)
        print(json.dumps(json.loads(plain, parse_constant=lambda _: None), indent=1))
    elif text is not None and not args.quiet:
        print(text())


# ------------------------------------------------------------------------------------------------ commands


def _prepare(args: argparse.Namespace, comm: Comm) -> None:
    from bert2bert.commands.prepare import run

    _show(args, run(args, _say(args)))


def _inspect(args: argparse.Namespace, comm: Comm) -> int:
    from bert2bert.checkpoints.inspect import check, inspect
    from bert2bert.checkpoints.inspect_text import render, render_check

    if args.check:
        checked = check(args.path, args.tag)
        _show(args, checked.to_json(), lambda: render_check(checked))
        return 1 if checked.bad else 0
    found = inspect(args.path, args.tag)
    _show(args, found.to_json(), lambda: render(found, tensors=args.tensors))
    return 0


def _operators(args: argparse.Namespace, comm: Comm) -> None:
    from bert2bert.commands.operators import describe, listing

    found = describe(args.name) if args.name else listing()
    _show(args, found, lambda: found["text"])


def _how(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `open_growth`."""
    same = {"source_config", "tag", "other", "alpha", *OPERATORS}
    return {**{key: getattr(args, key) for key in same}, "breaker": args.break_symmetry}


def _plan(args: argparse.Namespace, comm: Comm) -> None:
    if asks_recipe(args, parse):
        from bert2bert.commands.plan_recipe import plan_recipe

        phases = plan_recipe(recipe_of(args), args.ds_config, args.ranks)
        _show(args, phases.as_json(), phases.text)
        return
    from bert2bert.commands.plan import plan

    planned = plan(args.source, args.config, ranks=args.ranks, disk=args.disk_bandwidth, **_how(args))
    _show(args, planned.as_json(), planned.text)


def _config(args: argparse.Namespace, comm: Comm) -> None:
    from bert2bert.commands.config import configure

    sizes = {key: getattr(args, key) for key in SIZES}
    given = {key: getattr(args, key) for key in ("source_config", "tag", "embeddings")}
    made = configure(args.source, args.output, **given, **sizes)
    _show(args, made.as_json(), made.text)


def _target(args: argparse.Namespace) -> Target:
    from bert2bert.checkpoints.target import Target, file_bytes

    return Target(
        format=args.format,
        stage=args.stage,
        world_size=args.world_size,
        expert_parallel=args.expert_parallel,
        precision=args.precision,
        groups=args.groups,
        shard_size=None if args.shard_size is None else file_bytes(args.shard_size),
        tag=args.target_tag,
    )


def _grow(args: argparse.Namespace, comm: Comm) -> None:
    from bert2bert.commands.grow import write_growth
    from bert2bert.growth.opened import open_growth

    _check_workers(args, comm)
    lossy = args.lossy
    if asks_recipe(args, parse):
        from bert2bert.commands import phase_growth

        recipe = recipe_of(args)
        index = phase_growth.named(recipe, args.phase)
        lossy = lossy or phase_growth.lossy(recipe, index)
        opened = partial(
            phase_growth.opened, recipe, index, args.source, args.other, source_config=args.source_config, tag=args.tag
        )
    else:
        opened = partial(open_growth, args.source, args.config, **_how(args))
    folder = write_growth(
        opened,
        args.target,
        _target(args),
        lossy=lossy,
        measure=not args.no_measure,
        bins=args.bins,
        comm=comm,
        say=_say(args),
        bar=not args.quiet,
    )
    _wrote(args, comm, folder, "growth")


def _reshard(args: argparse.Namespace, comm: Comm) -> None:
    from bert2bert.commands.reshard import reshard

    _check_workers(args, comm)
    folder = reshard(
        args.source,
        args.target,
        _target(args),
        source_config=args.source_config,
        tag=args.tag,
        comm=comm,
        say=_say(args),
        bar=not args.quiet,
    )
    _wrote(args, comm, folder, "reshard")


def _wrote(args: argparse.Namespace, comm: Comm, folder: Path, how: str) -> None:
    if args.json and comm.rank == 0:
        from bert2bert.commands.writing import written

        _show(args, written(folder, how))


def _check_workers(args: argparse.Namespace, comm: Comm) -> None:
    if args.workers not in (1, comm.size):
        raise InvalidConfig(f"--workers {args.workers}: the launcher has started {comm.size} ranks; leave it out")


def _learn(args: argparse.Namespace, comm: Comm) -> None:
    from bert2bert.commands.learn import learn

    how = ("source_config", "tag", "steps", "lr", "noise", "rows", "length", "seed", "device")
    given = {key: getattr(args, key) for key in how}
    fitted = learn(args.source, args.config, args.data, args.output, **given, say=_say(args))
    _show(args, {"output": args.output, "losses": fitted.losses, **fitted.about})


def _verify(args: argparse.Namespace, comm: Comm) -> int:
    from bert2bert.commands.verify import verify

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
        say=_say(args),
    )
    if args.output:
        try:
            args.output.write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidConfig(f"--output {args.output}: cannot be written ({error.strerror}); name another") from None
    _show(args, found.as_json(), found.text)
    return 0 if found.ok else 1


def _report(args: argparse.Namespace, comm: Comm) -> None:
    from bert2bert.report.compare import render, report

    found = report(args.runs, args.output)
    _show(args, found.as_json(), lambda: render(found))


_RUNS = {
    "prepare": _prepare,
    "inspect": _inspect,
    "operators": _operators,
    "config": _config,
    "plan": _plan,
    "grow": _grow,
    "reshard": _reshard,
    "learn": _learn,
    "verify": _verify,
    "report": _report,
    "submit": lambda args, comm: _show(args, *importlib.import_module("bert2bert.commands.submit").run(args)),
    "status": lambda args, comm: importlib.import_module("bert2bert.commands.status").run(args),
}


if __name__ == "__main__":
    sys.exit(main())
