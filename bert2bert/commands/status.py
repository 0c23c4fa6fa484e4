"""The command ``status``: how training runs stand, once or again and again."""

from __future__ import annotations

import argparse
import json
import time

from bert2bert.errors import InvalidConfig
from bert2bert.report.status import render, statuses

WRONG = ("failed", "silent")
"""States for which the exit status is 1."""


def run(args: argparse.Namespace) -> int:
    """Print the runs' states; with --watch until Ctrl-C, or until no run can change any more."""
    if args.watch is not None and args.watch <= 0:
        raise InvalidConfig(f"--watch is {args.watch:g}; expected a number of seconds above 0")
    while True:
        found = statuses(args.runs)
        print(json.dumps([one.as_json() for one in found], indent=1) if args.json else render(found), flush=True)
        if args.watch is None or not any(one.state in ("starting", "running") for one in found):
            return 1 if any(one.state in WRONG for one in found) else 0
        time.sleep(args.watch)
