"""Whether a source still is what it was when it was opened.

Its files are memory-mapped, so a change of one of them reaches what is being written. A growth asks before it commits.
Refuses, as InvalidCheckpoint, a source of which a file was replaced, resized, touched or removed meanwhile.
"""

from __future__ import annotations

from bert2bert.checkpoints.source import Source
from bert2bert.errors import InvalidCheckpoint


class Watch:
    """Made when sources are opened. ``identities``: theirs at that moment, and ``identity`` the first's; ``stamps``:
    size and time of change (ns) of all their files, by name, None for one that is gone."""

    def __init__(self, *sources: Source) -> None:
        self._sources = sources
        self.stamps = [_look(source) for source in sources]
        self.identities = [source.identity() for source in sources]
        self.identity = self.identities[0]

    def check(self) -> None:
        """Raise InvalidCheckpoint if a source is no longer what it was."""
        for source, stamps, identity in zip(self._sources, self.stamps, self.identities, strict=True):
            now = _look(source)
            changed = [name for name, stamp in stamps.items() if now[name] != stamp]
            if not changed and source.identity() != identity:
                changed = ["a file"]
            if changed:
                more = f" and {len(changed) - 1} more" * (len(changed) > 1)
                raise InvalidCheckpoint(
                    f"{source.folder}: {changed[0]}{more} changed while it was read, so what was made of it is neither "
                    "the old nor the new. Nothing was committed. Run again when nobody writes to the source."
                )


def _look(source: Source) -> dict[str, tuple[int, int] | None]:
    found: dict[str, tuple[int, int] | None] = {}
    for file in sorted(source.files):
        name = file.relative_to(source.folder).as_posix()
        try:
            status = file.stat()
            found[name] = status.st_size, status.st_mtime_ns
        except FileNotFoundError:
            found[name] = None
    return found
