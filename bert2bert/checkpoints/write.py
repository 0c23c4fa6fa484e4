"""Write a whole checkpoint, alone or over MPI ranks: the same bytes for any number of ranks.

Every file is written by one rank, files are dealt by bytes (the largest first, each to the rank with the least to
do), and digests are taken of what is written and summed on rank 0, which alone commits. Files that an earlier run of
the same job had finished are dealt out to be checked, and those that are as they were are not written again. A failure
on one rank is raised by every rank once all have stopped, so nobody waits for a message that never comes.

`mpi4py` is imported here only, and only under an MPI launcher. Refuses an unknown form and the sizes that a form
needs or cannot use (InvalidConfig), a source that cannot be read or changes meanwhile (InvalidCheckpoint), and all that
`commit` refuses.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from bert2bert import __version__
from bert2bert.checkpoints.commit import journal
from bert2bert.checkpoints.commit.journal import Entry, Finisher
from bert2bert.checkpoints.commit.pending import FORMAT_VERSION, file_sizes
from bert2bert.checkpoints.commit.source_guard import Watch
from bert2bert.checkpoints.commit.threads import files_at_once, write_files
from bert2bert.checkpoints.expert_parallel.writer import expert_zero_files
from bert2bert.checkpoints.hub.writer import MAX_FILE_BYTES, hub_config, hub_files, json_bytes
from bert2bert.checkpoints.job import FilePlan, Job, Tally, TargetSpec, Values, pending, tensor_entries, write_bytes
from bert2bert.checkpoints.universal.writer import universal_files
from bert2bert.checkpoints.zero.layout import SUB_GROUP_SIZE
from bert2bert.checkpoints.zero.stage0_writer import stage0_files
from bert2bert.checkpoints.zero.writer import zero_files
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError, did_you_mean
from bert2bert.files import torch_writer
from bert2bert.files.digest import FILE_DIGEST, TENSOR_DIGEST

POINTERS = {"zero": ("latest",), "universal": ("latest_universal", "latest"), "hub": ()}
"""What is made to name the tag, in order, for each format; `latest` last, for it means that all is done."""
_OVERHEAD = 1 << 16  # bytes allowed per file beyond its tensor data when looking for room
_LAUNCHED_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")


class _Alone:
    """The part of an mpi4py communicator that is used here, for one process."""

    rank, size = 0, 1

    def allgather(self, item: Any) -> list[Any]:
        return [item]


def world() -> Any:
    """The communicator of the MPI launcher that started this process (mpirun, or srun with PMI), else None."""
    if not any(name in os.environ for name in _LAUNCHED_BY_MPI):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: the wheel finds no MPI library
        raise UserError(
            f"started by an MPI launcher, but mpi4py does not load: {error}. Install mpi4py for the MPI that "
            "the launcher belongs to, or run without the launcher."
        ) from None
    return MPI.COMM_WORLD


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the sizes for each rank: the largest first, each to the rank with the fewest bytes so far."""
    loads = [0] * ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += sizes[index] + 1  # files without data take time too
        hands[rank].append(index)
    return hands


def together(comm: Any, do: Callable[[], Any]) -> Any:
    """Call ``do`` on every rank of ``comm`` (None: alone); if any rank failed, all fail: a UserError as it is, a defect
    with its rank. No collective may be inside."""
    comm = comm if comm is not None else _Alone()
    result, error = None, None
    try:
        result = do()
    except Exception as failure:
        error = failure
    shown = error if error is None or isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    failures = [(rank, found) for rank, found in enumerate(comm.allgather(shown)) if found is not None]
    if failures:
        rank, first = failures[0]
        if error is not None and not isinstance(error, UserError):
            raise error  # with its own traceback, on the rank that knows it
        raise first if isinstance(first, UserError) else RuntimeError(f"rank {rank} stopped: {first}")
    return result


def _plan(
    job: Job, form: str, stage: int | None, world_size: int | None, sub_group_size: int, max_file_bytes: int
) -> list[FilePlan]:
    _check_nesting(job.spec)
    if form not in POINTERS:
        raise InvalidConfig(f"there is no checkpoint format {form!r}; {did_you_mean(form, POINTERS)}")
    if form == "zero":
        if stage is None or world_size is None:
            raise InvalidConfig(
                "format zero needs a ZeRO stage (0, 1, 2, 3) and, but for 0, a world size: --stage S --world-size N."
            )
        if job.spec.expert_parallel:
            plans = expert_zero_files(job, stage, world_size)
        else:
            plans = stage0_files(job, world_size) if stage == 0 else zero_files(job, stage, world_size, sub_group_size)
    elif stage is not None or world_size is not None:
        raise InvalidConfig(f"format {form} has no stage and no world size: leave out --stage and --world-size.")
    else:
        plans = universal_files(job) if form == "universal" else hub_files(job, max_file_bytes)
    config = hub_config(job.spec) if form == "hub" else job.spec.config
    extra = {**({"config.json": json_bytes(config)} if job.spec.config else {}), **job.spec.extra_files}
    return plans + [FilePlan(name, 0, partial(write_bytes, content)) for name, content in extra.items()]


def _check_nesting(spec: TargetSpec) -> None:
    """Refuse (InvalidCheckpoint) what a pickle cannot hold: values inside each other without end, or nearly so."""
    for name in ("client_state", "extras", "buffers", "lr_scheduler"):
        try:
            torch_writer.structure(getattr(spec, name))
        except RecursionError:
            raise InvalidCheckpoint(
                f"the source's {name.replace('_', ' ')} holds values nested hundreds deep, which cannot be written. "
                "Save the checkpoint without them."
            ) from None


def _reading(values: Values) -> Values:
    """The same values; what goes wrong with reading is not taken for what goes wrong with writing."""

    def read(name: str, state: str, start: int, stop: int) -> torch.Tensor:
        try:
            return values(name, state, start, stop)
        except OSError as error:
            raise InvalidCheckpoint(
                f"the source's '{name}' ({state}) cannot be read: {error.strerror or error}"
                + (f" ({error.filename})" if error.filename else "")
                + ". Check the disk it lies on, or copy it again."
            ) from error

    return read


def _manifest(
    spec: TargetSpec, form: str, stage: int | None, world_size: int | None, growth: dict[str, Any] | None,
    entries: Mapping[str, Entry],
) -> dict[str, Any]:  # fmt: skip
    groups = [
        {"part": g.part, "decay": g.decay, "names": list(g.names), "hyper": _plain(g.hyper), "step": g.step}
        for g in spec.groups
    ]
    return {
        "format_version": FORMAT_VERSION, "kind": "growth", "tag": spec.tag, "form": form, "stage": stage,
        "world_size": world_size, "precision": spec.precision, "group_layout": spec.group_layout, "model": spec.config,
        "aliases": spec.aliases, "groups": groups, "buffers": sorted(spec.buffers),
        "tensors": tensor_entries(spec, (entry.tensors for entry in entries.values())),
        "files": {name: entry.size for name, entry in entries.items()},
        "digests": {
            "kind": FILE_DIGEST, "tensors": TENSOR_DIGEST,
            "files": {name: entry.digest for name, entry in entries.items()},
        },
        "counters": spec.counters,
        "versions": {
            "bert2bert": __version__, "torch": str(torch.__version__), "deepspeed": _version("deepspeed"),
        },
        "growth": growth, "training": None,
        **({"expert_parallel": spec.expert_parallel.size} if spec.expert_parallel else {}),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """Hyper-parameters as JSON can hold them: tensors become numbers, tuples lists, others their text."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and not value.is_complex() else repr(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else repr(value)


def write_checkpoint(
    target: Path,
    spec: TargetSpec,
    values: Values,
    *,
    form: str,
    stage: int | None = None,
    world_size: int | None = None,
    manifest_growth: dict[str, Any] | None,
    manifest_more: dict[str, Any] | None = None,
    expected: Mapping[tuple[str, str], str] | None = None,
    comm: Any = None,
    progress: Callable[[int], None] | None = None,
    sub_group_size: int = SUB_GROUP_SIZE,
    max_file_bytes: int = MAX_FILE_BYTES,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a checkpoint and return its folder: ``target/<tag>``, or ``target`` itself for format hub.

    ``values``: see writing.Values. ``stage``, ``world_size``: of the engine that will resume (format zero only).
    ``comm``: an mpi4py communicator of which every rank makes this same call on a file system that all see, or None.
    ``progress(bytes)``: called on each rank as it writes, with the bytes of tensors that are new.
    ``sub_group_size``: DeepSpeed's option of stage 3. ``max_file_bytes``: where format hub starts another file.
    ``watch``: of the source, asked before the commit. ``say(text)``: told by rank 0 what is resumed, discarded, kept.

    ``manifest_more``: entries of the manifest in place of, or beside, those of a growth. ``expected``: (name, state) ->
    digest of what must have been written, where that is known; InvalidCheckpoint, before the commit, if it was not.

    What a killed or failed call has finished is used again if ``manifest_growth`` names plan and source
    (``plan_digest``, ``source``), and these, the spec and the layout are the same.
    """
    comm = comm if comm is not None else _Alone()
    say = say or (lambda text: None)
    if stage == 0 and world_size is None:
        world_size = 1  # any number of ranks loads it
    tally = Tally.new(progress)
    task = Job(spec, _reading(values), tally)
    folder = pending(Path(target), spec, form)

    def begin() -> tuple[bool, dict[str, list[Entry]]]:
        if comm.rank != 0:
            return False, {}
        layout = [form, stage, world_size, sub_group_size, [(plan.name, plan.payload) for plan in plans]]
        job = journal.job(manifest_growth, None if watch is None else watch.stamps, vars(spec), layout)
        done = folder.begin(job, sum(plan.payload + _OVERHEAD for plan in plans), say)
        return done, {} if done else journal.read(folder.partial)

    def check() -> dict[str, Entry]:
        if comm.rank != 0:
            folder.join()
        mine = _dealt([plan for plan in plans if plan.name in known], comm)
        found = {plan: journal.verified(folder.files / plan.name, known[plan.name]) for plan in mine}
        for plan in (plan for plan, entry in found.items() if entry is not None):
            tally.wrote(plan.payload)
        return {plan.name: entry for plan, entry in found.items() if entry is not None}

    def clean() -> None:
        if comm.rank == 0:
            folder.keep_only(entries)
            if known:
                size = sum(entry.size for entry in entries.values())
                say(f"resumed  {folder.partial}: {len(entries)} of {len(plans)} files ({size:,} bytes) were finished")

    def write() -> dict[str, Entry]:
        finisher = Finisher(folder.files, folder.partial / f"finished.{comm.rank}.jsonl")
        try:
            missing = _dealt([plan for plan in plans if plan.name not in entries], comm)
            row = max((4 * prod(shape[1:]) for shape in spec.shapes.values()), default=0)
            write_files(folder.files, missing, tally, finisher, files_at_once(row))
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                finisher.close()
            raise
        return finisher.close()

    def commit() -> Path:
        if comm.rank != 0:
            return folder.final
        if watch is not None:
            watch.check()
        if {name: entry.size for name, entry in entries.items()} != (found := file_sizes(folder.files)):
            raise RuntimeError(f"{folder.files} does not hold the files planned: {entries.keys() ^ found.keys()}")
        manifest = _manifest(spec, form, stage, world_size, manifest_growth, entries)
        _check_digests(manifest["tensors"], expected or {})
        return folder.commit({**manifest, **(manifest_more or {})}, POINTERS[form], spec.beside)

    try:
        plans: list[FilePlan] = together(
            comm, lambda: _plan(task, form, stage, world_size, sub_group_size, max_file_bytes)
        )
        done, known = comm.allgather(together(comm, begin))[0]  # no rank writes before rank 0 holds the folder
        if not done:
            entries = _merged(comm.allgather(together(comm, check)))
            together(comm, clean)
            entries = _merged([entries, *comm.allgather(together(comm, write))])
            together(comm, commit)
        return folder.final
    except BaseException as error:
        if comm.rank == 0:
            folder.abort((lambda text: None) if isinstance(error, KeyboardInterrupt) else say)
        raise
    finally:
        folder.close()


def _check_digests(tensors: Mapping[str, Any], expected: Mapping[tuple[str, str], str]) -> None:
    for (name, state), told in expected.items():
        found = tensors[name]["digest"].get(state)
        if found is not None and found != told:
            raise InvalidCheckpoint(
                f"the source's {state} of '{name}' has digest {found}, its manifest says {told}: it is damaged or was "
                "changed. Nothing was committed. Restore the file (bert2bert inspect --check names it)."
            )


def _dealt(plans: Sequence[FilePlan], comm: Any) -> list[FilePlan]:
    """This rank's share of the files, by bytes."""
    return [plans[i] for i in deal([plan.payload for plan in plans], comm.size)[comm.rank]]


def _merged(parts: Iterable[dict[str, Entry]]) -> dict[str, Entry]:
    """The entries of all, sorted by name."""
    return dict(sorted((name, entry) for part in parts for name, entry in part.items()))
