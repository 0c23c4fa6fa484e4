"""How each optimizer state follows a growth of its parameter.

A parameter is carried by E on the axes it writes and by L^T on those it reads. Its gradient goes the other way,
G' = L_out^T G E_in^T (methods: Net2Net's function preservation read backwards), so Adam's first moment, an average of
gradients, uses the same plan with written and read swapped, and the second moment, an average of squared gradients,
the squares of those coefficients. The step count is kept. DeepSpeed states the same rule for a scale s of a whole block
(``SCALE_POWER_BY_STATE`` in its ``checkpoint/affine.py``: fp32 s, exp_avg 1/s, exp_avg_sq 1/s^2).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class State:
    """``gradient``: transforms as a gradient does, not as a parameter. ``power``: of the coefficients."""

    name: str
    gradient: bool
    power: int


STATES = {
    "fp32": State("fp32", gradient=False, power=1),
    "exp_avg": State("exp_avg", gradient=True, power=1),
    "exp_avg_sq": State("exp_avg_sq", gradient=True, power=2),
}
MOMENTS = tuple(name for name, state in STATES.items() if state.gradient)
