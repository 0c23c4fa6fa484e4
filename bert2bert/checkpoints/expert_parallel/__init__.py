"""Native ZeRO checkpoints of engines that split their experts over ranks."""
