"""Grow a checkpoint over MPI ranks: `bert2bert grow` with the same options, the target's shards dealt by bytes.

example:
  mpirun -n 4 python launch/grow.py runs/small runs/grown --config recipes/configs/bert_base.json \\
      --width aki --depth stack --lossy
  srun --mpi=pmix -n 4 python launch/grow.py ...      (see launch/grow.sbatch)

Refused: several processes that MPI does not join, for each would write the whole target.
"""

from __future__ import annotations

import sys
import time
import traceback

from bert2bert.errors import InvalidConfig, UserError
from bert2bert.ranks.comm import ALONE, Comm, Mpi, world
from bert2bert.ranks.launcher import GRACE_SECONDS, discover, first_speaks, started_as
from bert2bert.terminal import interrupts


def check(comm: Comm) -> None:
    """Raise UserError if ``comm`` does not hold all the processes that were started."""
    started = discover()
    if comm.size != started.world:
        raise InvalidConfig(
            f"{started.launcher} started {started.world} processes, but MPI joins {comm.size}; start them with the "
            "mpirun of the MPI that mpi4py loads (python -m mpi4py --mpi-library names it), or with srun --mpi=pmix"
        )


def main(argv: list[str], command_name: str = "grow") -> int:
    """Run one command of bert2bert on every rank that the launcher started."""
    from bert2bert.commands.cli import parse, run

    with first_speaks():
        args = parse([command_name, *argv])
    comm: Comm = ALONE
    try:
        comm = world()
        check(comm)
        with interrupts.at_once(command_name, comm.rank == 0):
            code = run(args, comm)
    except UserError as error:
        if started_as() > 0:
            time.sleep(GRACE_SECONDS)
        print(f"bert2bert {command_name}: {error}", file=sys.stderr)
        code = 2
    except Exception:  # a defect: say where, on the rank that has it
        traceback.print_exc()
        code = 1
    if code and isinstance(comm, Mpi):
        # MPI's own exit waits for every rank, and another may wait for this one: end them all, after rank 0 has spoken.
        sys.stderr.flush()
        if comm.rank > 0:
            time.sleep(GRACE_SECONDS)
        comm.abort(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
