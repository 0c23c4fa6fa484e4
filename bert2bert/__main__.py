"""`python -m bert2bert` is the command `bert2bert`."""

import sys

from bert2bert.commands.cli import main

if __name__ == "__main__":  # a process that multiprocessing starts imports this file too
    sys.exit(main())
