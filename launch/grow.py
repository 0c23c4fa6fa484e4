"""Grow a checkpoint over MPI ranks: `bert2bert grow` with the same options, the target's shards dealt by bytes.

example:
  mpirun -n 4 python launch/grow.py runs/small grown/base --config recipes/configs/bert_base.json \\
      --width aki --depth stack --lossy
  srun --ntasks 4 python launch/grow.py ...           (see launch/grow.sbatch)
"""

from __future__ import annotations

import sys
import traceback


def main(argv: list[str]) -> int:
    from bert2bert.cli import main as command

    if {"-h", "--help"} & set(argv):
        return command(["grow", *argv])
    from bert2bert.shards.transfer import world

    comm = world()
    try:
        return command(["grow", *argv], comm=comm)
    except Exception:
        # The other ranks wait in a collective that this one will never enter: end them too.
        traceback.print_exc()
        sys.stderr.flush()
        comm.Abort(1)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
