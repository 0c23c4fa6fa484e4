"""Run under mpirun: every rank writes its share of one checkpoint. Usage: -m tests.checkpoints.mpi_write TARGET FORM"""

import sys
from pathlib import Path

from bert2bert.ranks.comm import world
from tests.checkpoints.targets import make_tensors, plain_spec, reader
from tests.doors import write_checkpoint

if __name__ == "__main__":
    target, form = Path(sys.argv[1]), sys.argv[2]
    comm, spec = world(), plain_spec()
    write_checkpoint(target, spec, reader(make_tensors(spec)), format=form, manifest_growth=None, comm=comm)
    if comm.rank == 0:
        print("ranks", comm.size)
