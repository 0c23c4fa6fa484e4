"""bert2bert: grow a small transformer's checkpoint into a large one, then pre-train it with DeepSpeed.

``from bert2bert import grow, open_checkpoint, plan``: see `api`, which is imported when it is first asked for, for it
imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert2bert.api import grow, open_checkpoint, plan

__version__ = "0.1.0"
__all__ = ["grow", "open_checkpoint", "plan"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("bert2bert.api"), name)
    raise AttributeError(f"module 'bert2bert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
