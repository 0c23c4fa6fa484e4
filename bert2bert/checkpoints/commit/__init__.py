"""How a checkpoint becomes visible, and how a write that was killed goes on."""
