"""What a person at a terminal sees and does: options, progress, signals that end a command."""
