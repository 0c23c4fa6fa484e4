"""The options of the commands, by subject; `commands.parser` puts them together. Nothing here imports torch."""
