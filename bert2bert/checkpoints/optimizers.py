"""Which optimizer's state can be carried: what each keeps beside the weights, under which names, and how it transforms.

Two states have a map: a running mean of the gradient ("exp_avg"), which transforms as the gradient does, and a running
mean of its square ("exp_avg_sq"). Adam and AdamW (DeepSpeed's FusedAdam and CPUAdam too) and LAMB keep both; Lion keeps
the first alone; Muon and SGD with momentum keep the first and call it "momentum_buffer". All else (Adafactor's rows and
columns, amsgrad's maximum, the error terms of 1-bit optimizers) is unknown: it is named and not carried.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ADAM: dict[str, str] = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
KNOWN: tuple[dict[str, str], ...] = (ADAM, {"exp_avg": "exp_avg"}, {"exp_avg": "momentum_buffer"}, {})


def held(state: dict[str, Any]) -> set[str]:
    """Names of what an optimizer keeps of one parameter (or flat group), its step count aside."""
    return {key for key, value in state.items() if key != "step" and value is not None}


def moment_keys(found: set[str]) -> dict[str, str] | None:
    """State -> its name in the files, for the names that a group's parameters have; None for an optimizer unknown."""
    return next((dict(keys) for keys in KNOWN if set(keys.values()) == found), None)


def unknown(groups: Iterable[set[str]]) -> tuple[str, ...]:
    """All names in the groups' states when any group's are of an unknown optimizer, else none."""
    groups = list(groups)
    if all(moment_keys(found) is not None for found in groups):
        return ()
    return tuple(sorted(set().union(*groups)))
