"""The result of comparing two checkpoints: what was checked, and whether it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert2bert.measure.drift import Drift

Check = Callable[[str, bool, str], None]
"""``check(what, whether it holds, what was found)`` receives one result."""


@dataclass(frozen=True)
class Checked:
    """One thing that was checked."""

    name: str
    ok: bool
    detail: str
    """What was found, for people."""


@dataclass(frozen=True)
class Verified:
    """Everything that was checked of one checkpoint."""

    checks: tuple[Checked, ...]
    drift: Drift | None
    """How far logits and loss are apart; None where no model was run."""

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """As ``verify --json`` prints it."""
        drift = self.drift.as_dict() if self.drift else None
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks], "drift": drift}

    def text(self) -> str:
        """A line for each check, for a terminal."""
        lines = [f"{'ok' if check.ok else 'FAILED':7} {check.name:11} {check.detail}" for check in self.checks]
        return "\n".join([*lines, "verified" if self.ok else "NOT verified"])


class Checks:
    """Collects checks: an object of it is a `Check`."""

    def __init__(self) -> None:
        self.done: list[Checked] = []

    def __call__(self, name: str, ok: bool, detail: str) -> None:
        self.done.append(Checked(name, bool(ok), detail))

    @property
    def ok(self) -> bool:
        """Whether every check so far holds."""
        return all(check.ok for check in self.done)

    def verified(self, drift: Drift | None = None) -> Verified:
        """The result."""
        return Verified(tuple(self.done), drift)
