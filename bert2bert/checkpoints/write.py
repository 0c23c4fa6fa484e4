"""Write a whole checkpoint, alone or over several ranks: the same bytes for any number of ranks.

Every file is written by one rank, files are dealt by bytes (the largest first, each to the rank with the least to
do), and digests are taken of what is written and summed on rank 0, which alone commits. Files that an earlier run of
the same job had finished are dealt out to be checked, and those that are as they were are not written again. A failure
on one rank is raised by every rank once all have stopped.

Refuses a source that cannot be read or changes meanwhile (InvalidCheckpoint), and all that `commit` refuses.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from bert2bert.checkpoints.commit import journal
from bert2bert.checkpoints.commit.journal import Entry, Finisher
from bert2bert.checkpoints.commit.pending import file_sizes
from bert2bert.checkpoints.commit.source_guard import Watch
from bert2bert.checkpoints.commit.threads import files_at_once, write_files
from bert2bert.checkpoints.facts import as_json, versions
from bert2bert.checkpoints.job import FilePlan, Job, Tally, TargetSpec, Values, pending, tensor_entries
from bert2bert.checkpoints.manifest import Digests, GroupEntry, Manifest, TensorEntry
from bert2bert.checkpoints.planned import planned
from bert2bert.checkpoints.target import Target
from bert2bert.checkpoints.zero.layout import SUB_GROUP_SIZE
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files.digest import FILE_DIGEST, TENSOR_DIGEST
from bert2bert.ranks.comm import ALONE, Comm, gather, on_first, together

POINTERS = {"zero": ("latest",), "universal": ("latest_universal", "latest"), "hub": ()}
"""What is made to name the tag, in order, for each format; `latest` last, for it means that all is done."""
_OVERHEAD = 1 << 16  # bytes allowed per file beyond its tensor data when looking for room


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the sizes for each rank: the largest first, each to the rank with the fewest bytes so far."""
    loads = [0] * ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += sizes[index] + 1  # files without data take time too
        hands[rank].append(index)
    return hands


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


def _filled(manifest: Manifest, spec: TargetSpec, target: Target, entries: Mapping[str, Entry]) -> Manifest:
    """The manifest with what was written."""
    return dataclasses.replace(
        manifest,
        tag=spec.tag,
        format=target.format,
        stage=target.stage,
        world_size=target.ranks,
        precision=spec.precision,
        group_layout=spec.group_layout,
        model=spec.config,
        aliases=spec.aliases,
        groups=[GroupEntry(g.part, g.decay, g.names, as_json(g.hyper), g.step) for g in spec.groups],
        buffers=sorted(spec.buffers),
        tensors=tensor_entries(spec, (entry.tensors for entry in entries.values())),
        files={name: entry.size for name, entry in entries.items()},
        digests=Digests(FILE_DIGEST, TENSOR_DIGEST, {name: entry.digest for name, entry in entries.items()}),
        counters=spec.counters,
        versions=versions("deepspeed"),
        expert_parallel=spec.expert_parallel.size if spec.expert_parallel else None,
    )


def write_checkpoint(
    folder: Path,
    spec: TargetSpec,
    values: Values,
    target: Target,
    *,
    manifest: Manifest,
    expected: Mapping[tuple[str, str], str] | None = None,
    comm: Comm = ALONE,
    progress: Callable[[int], None] | None = None,
    sub_group_size: int = SUB_GROUP_SIZE,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a checkpoint and return its folder: ``folder/<tag>``, or ``folder`` itself for format hub.

    ``values``: see `job.Values`. ``comm``: ranks of which each makes this same call on a file system that all see.
    ``progress(bytes)``: called on each rank as it writes, with the bytes of tensors that are new.
    ``sub_group_size``: DeepSpeed's option of stage 3. ``watch``: of the source, checked before the commit.
    ``say(text)``: called on rank 0 with what is resumed, discarded, kept.

    ``manifest``: how the checkpoint came about, the rest is filled in. ``expected``: (name, state) ->
    digest of what must have been written, where that is known; InvalidCheckpoint, before the commit, if it was not.

    What a killed or failed call has finished is used again if the manifest's ``reshard``, else its ``growth``,
    names plan and source (``plan_digest``, ``source``), and these, the spec and the layout are the same.
    """
    task = WriteJob(Path(folder), spec, values, target, comm, watch, progress, say or (lambda text: None))
    return task.run(manifest, expected or {}, sub_group_size)


class WriteJob:
    """One rank's part in writing a checkpoint: the steps of `write_checkpoint`, in order."""

    def __init__(
        self,
        folder: Path,
        spec: TargetSpec,
        values: Values,
        target: Target,
        comm: Comm,
        watch: Watch | None,
        progress: Callable[[int], None] | None,
        say: Callable[[str], None],
    ) -> None:
        self.spec, self.target, self.comm, self.watch, self.say = spec, target, comm, watch, say
        self.tally = Tally.new(progress)
        self.job = Job(spec, _reading(values), self.tally)
        self.folder = pending(folder, spec, target)
        self.plans: list[FilePlan] = []
        self.entries: dict[str, Entry] = {}
        """Of the files that are finished."""

    def run(
        self,
        manifest: Manifest,
        expected: Mapping[tuple[str, str], str],
        sub_group_size: int,
    ) -> Path:
        """Plan, resume, write, commit. A failure keeps what is finished, except on Ctrl-C without a message."""
        comm = self.comm
        try:
            self.plans = together(comm, lambda: planned(self.job, self.target, sub_group_size))
            # No rank writes before rank 0 holds the folder.
            done, known = on_first(comm, lambda: self._begin(manifest, sub_group_size))
            if not done:
                self.entries = _merged(gather(comm, lambda: self._check(known)))
                on_first(comm, lambda: self._clean(bool(known)))
                self.entries = _merged([self.entries, *gather(comm, self._write)])
                on_first(comm, lambda: self._commit(manifest, expected))
            return self.folder.final
        except BaseException as error:
            if comm.rank == 0:
                self.folder.abort((lambda text: None) if isinstance(error, KeyboardInterrupt) else self.say)
            raise
        finally:
            self.folder.close()

    def _begin(self, manifest: Manifest, sub_group_size: int) -> tuple[bool, dict[str, list[Entry]]]:
        """Take the folder: whether the checkpoint is there already, and what an earlier run noted as finished."""
        target, plans = self.target, self.plans
        files = [(plan.name, plan.payload) for plan in plans]
        layout = [target.format, target.stage, target.ranks, sub_group_size, files]
        origin = manifest.reshard or manifest.growth
        about = origin.to_json() if origin else None
        job = journal.job(about, None if self.watch is None else self.watch.stamps, vars(self.spec), layout)
        done = self.folder.begin(job, sum(plan.payload + _OVERHEAD for plan in plans), self.say)
        return done, {} if done else journal.read(self.folder.partial)

    def _check(self, known: Mapping[str, list[Entry]]) -> dict[str, Entry]:
        """Those of this rank's share of the noted files that are as they were."""
        if self.comm.rank != 0:
            self.folder.join()
        found = {}
        for plan in self._mine(known.keys() & {plan.name for plan in self.plans}):
            entry = journal.verified(self.folder.files / plan.name, known[plan.name])
            if entry is not None:
                found[plan.name] = entry
                self.tally.wrote(plan.payload)
        return found

    def _clean(self, resumed: bool) -> None:
        """Remove what is not finished, and report what is."""
        self.folder.keep_only(self.entries)
        if resumed:
            size = sum(entry.size for entry in self.entries.values())
            count = f"{len(self.entries)} of {len(self.plans)} files"
            self.say(f"resumed  {self.folder.partial}: {count} ({size:,} bytes) were finished")

    def _write(self) -> dict[str, Entry]:
        """Write this rank's share of the files that are missing."""
        finisher = Finisher(self.folder.files, self.folder.partial / f"finished.{self.comm.rank}.jsonl")
        try:
            missing = self._mine({plan.name for plan in self.plans} - self.entries.keys())
            row = max((4 * prod(shape[1:]) for shape in self.spec.shapes.values()), default=0)
            write_files(self.folder.files, missing, self.tally, finisher, files_at_once(row))
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to report
                finisher.close()
            raise
        return finisher.close()

    def _commit(self, manifest: Manifest, expected: Mapping[tuple[str, str], str]) -> None:
        """Make the checkpoint visible, if its files and digests are those expected."""
        if self.watch is not None:
            self.watch.check()
        files, found = self.folder.files, file_sizes(self.folder.files)
        if {name: entry.size for name, entry in self.entries.items()} != found:
            raise RuntimeError(f"{files} does not hold the files planned: {self.entries.keys() ^ found.keys()}")
        manifest = _filled(manifest, self.spec, self.target, self.entries)
        _check_digests(manifest.tensors, expected)
        self.folder.commit(manifest, POINTERS[self.target.format], self.spec.beside)

    def _mine(self, names: Iterable[str]) -> list[FilePlan]:
        """This rank's share, by bytes, of the files of these names."""
        wanted = set(names)
        plans = [plan for plan in self.plans if plan.name in wanted]
        return [plans[i] for i in deal([plan.payload for plan in plans], self.comm.size)[self.comm.rank]]


def _check_digests(tensors: Mapping[str, TensorEntry], expected: Mapping[tuple[str, str], str]) -> None:
    for (name, state), recorded in expected.items():
        found = tensors[name].digest.get(state)
        if found is not None and found != recorded:
            raise InvalidCheckpoint(
                f"the source's {state} of '{name}' has digest {found}, its manifest says {recorded}: it is damaged or "
                "was changed. Nothing was committed. Restore the file (bert2bert inspect --check names it)."
            )


def _merged(parts: Iterable[dict[str, Entry]]) -> dict[str, Entry]:
    """The entries of all, sorted by name."""
    return dict(sorted((name, entry) for part in parts for name, entry in part.items()))
