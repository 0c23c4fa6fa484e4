"""bert2bert: grow a small transformer's checkpoint into a large one, then pre-train it with DeepSpeed."""

__version__ = "0.1.0"
