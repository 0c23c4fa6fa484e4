"""DeepSpeed's own (native) ZeRO checkpoints, stages 0 to 3."""
