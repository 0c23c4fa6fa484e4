"""Reshard a checkpoint over MPI ranks: `bert2bert reshard` with the same options, the target's files dealt by bytes.

example:
  mpirun -n 4 python launch/reshard.py runs/small runs/small8 --format zero --stage 3 --world-size 8

Refused: what launch/grow.py refuses.
"""

from __future__ import annotations

import sys

from grow import main  # beside this file

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "reshard"))
