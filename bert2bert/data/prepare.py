"""Text → token bins (`bins.py` describes the folder).

Reads text files and `datasets` datasets as streams, trains a tokenizer on the training documents or takes one, and
writes tokens with document boundaries in bounded memory (a tokenizer whose tokens may reach over a line end gets each
document whole). What is held out: `split.py`. The folder appears only when it is complete.

Refuses: an output that exists, text that cannot be used (`text.py`, `records.py`), a tokenizer that cannot
(`tokenizer_files.py`), no held-out text.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bert2bert import __version__
from bert2bert.data.bins import FORMAT_VERSION, SPLITS, SplitWriter, blake, token_dtype
from bert2bert.data.objective import uses
from bert2bert.data.records import open_dataset
from bert2bert.data.split import Source, Stream, too_few
from bert2bert.data.text import DOCUMENTS, TextFile
from bert2bert.data.tokenizer import TextTokenizer, failed, train_tokenizer
from bert2bert.data.tokenizer_files import load_tokenizer
from bert2bert.errors import InvalidConfig, InvalidData, UserError, did_you_mean

_BATCH_CHARACTERS, _BATCH_PIECES = 1 << 20, 1 << 13  # tokenised in one call


def prepare(
    text: list[Path],
    dataset: str | None,
    dataset_config: str | None,
    dataset_split: str | None,
    text_column: str | None,
    tokenizer: str | Path | None,
    vocab_size: int,
    heldout_text: list[Path],
    heldout_fraction: float,
    document: str,
    output: Path,
    seed: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the bins folder `output` and return its meta.json.

    text, dataset: what to train on, at least one of them; a dataset is a hub name or a local path (`open_dataset`).
    tokenizer: path of one to take; None trains one of `vocab_size` tokens on the training documents.
    heldout_text, heldout_fraction: evaluation files, or the expected share of the documents; one of the two, the other
    empty or 0.
    document: what is one document, 'file' (or dataset record), 'blank-line' (block between blank lines) or 'line'.
    """
    output = Path(output).expanduser()
    _check_options(text, dataset, heldout_text, heldout_fraction, document, output)
    train: list[Source] = [TextFile(Path(path).expanduser()) for path in text]
    heldout: list[Source] = [TextFile(Path(path).expanduser()) for path in heldout_text]
    _check_files([source for source in train + heldout if isinstance(source, TextFile)])
    taken = None if tokenizer is None else load_tokenizer(Path(tokenizer))
    notes = () if taken is None else (*taken.notes, f"tokenizer {tokenizer} can train {uses(taken.vocabulary)}")
    if dataset is not None:
        records = open_dataset(dataset, dataset_config, dataset_split, text_column)
        notes += records.notes
        train.append(records)
    stream = Stream(train, heldout, heldout_fraction, document, seed, progress)
    if note := stream.hold_out_one():
        notes = (*notes, note)
    print("".join(f"note     {note}\n" for note in notes), end="", file=sys.stderr)
    if taken is None:
        taken = train_tokenizer(
            lambda purpose: (piece for piece, split, _ in stream.read(purpose) if split == "train"), vocab_size
        )
    partial = output.with_name(output.name + ".partial")
    try:
        _clear(partial)
        partial.mkdir(parents=True)
        meta = _write(partial, stream, taken)
        os.replace(partial, output)
        _sync(output.parent)
    except OSError as error:
        raise InvalidData(
            f"bins {output} cannot be written: {error}.\n  Nothing was kept; give an --output with room and access."
        ) from error
    finally:
        with contextlib.suppress(OSError, UserError):
            _clear(partial)
    return meta


def _write(folder: Path, stream: Stream, tokenizer: TextTokenizer) -> dict[str, Any]:
    vocab_size = tokenizer.table_size
    dtype = token_dtype(vocab_size)
    text = tokenizer.backend.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, "utf-8")
    config = json.dumps(tokenizer.config, indent=1, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(config, "utf-8")
    encoder = tokenizer.for_text()
    with contextlib.ExitStack() as stack:
        writers = {split: SplitWriter(folder, split, dtype, vocab_size) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.bin.close)
            stack.callback(writer.ends.close)
        read = stream.read("tokens")
        for batch in _batches(read if tokenizer.ends_at_lines else _whole(read)):
            for (_, split, ends), encoding in zip(batch, _encoded(encoder, batch), strict=True):
                writers[split].add(encoding.ids, ends)
        for writer in writers.values():
            writer.close()
    for split, writer in writers.items():
        if not writer.documents:
            raise InvalidData(_empty(split, writers, stream.fraction))
    splits: dict[str, dict[str, Any]] = {}
    for split, writer in writers.items():
        entropy = unigram_cross_entropy(writer.counts, writer.counts, smoothing=0)
        splits[split] = {"tokens": writer.tokens, "documents": writer.documents, "unigram_entropy": entropy}
    splits["heldout"]["unigram_cross_entropy"] = unigram_cross_entropy(
        writers["heldout"].counts, writers["train"].counts, smoothing=1
    )
    meta = {
        "format_version": FORMAT_VERSION,
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        **tokenizer.vocabulary.to_json(),
        "tokenizer_digest": blake([text.encode()]),
        "digest": blake(f"{split} {writer.digest.hexdigest()}\n".encode() for split, writer in writers.items()),
        "splits": splits,
        "document": stream.document,
        "notes": list(tokenizer.notes),
        "sources": stream.describe(),
        "versions": {"bert2bert": __version__},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)
    return meta


def _encoded(encoder: Any, batch: list[tuple[str, str, bool]]) -> list[Any]:
    try:
        return encoder.encode_batch_fast([piece for piece, _, _ in batch], add_special_tokens=False)
    except BaseException as error:
        if not failed(error):
            raise
        raise InvalidData(
            f"the tokenizer fails between {batch[0][0][:40]!r} and {batch[-1][0][-40:]!r} of the text: {error}.\n"
            "  Give another --tokenizer, or leave it out to train one."
        ) from error


def _whole(stream: Iterable[tuple[str, str, bool]]) -> Iterator[tuple[str, str, bool]]:
    """Each document as one piece."""
    held: list[str] = []
    for piece, split, ends in stream:
        held.append(piece)
        if ends:
            yield "".join(held), split, True
            held = []


def _batches(stream: Iterable[tuple[str, str, bool]]) -> Iterator[list[tuple[str, str, bool]]]:
    batch: list[tuple[str, str, bool]] = []
    size = 0
    for item in stream:
        batch.append(item)
        size += len(item[0])
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def unigram_cross_entropy(counts: np.ndarray, model: np.ndarray, smoothing: float) -> float:
    """Nats per token of text with token `counts` under the unigram model (model + smoothing) / its sum.

    With `model` = `counts` and no smoothing: the text's own unigram entropy.
    """
    seen = counts > 0
    share = counts[seen] / counts.sum()
    logs = np.log(model[seen] + smoothing) - np.log(model.sum() + smoothing * len(model))
    return float(-(share * logs).sum())


def _empty(split: str, writers: dict[str, SplitWriter], fraction: float) -> str:
    total = sum(writer.documents for writer in writers.values())
    if fraction and total:
        return too_few(split, total, fraction)
    return f"split '{split}': the tokenizer made no token of its text.\n  Give text in the tokenizer's language."


def _check_options(
    text: list[Path], dataset: str | None, heldout: list[Path], fraction: float, document: str, output: Path
) -> None:
    if not text and dataset is None:
        raise InvalidConfig("there is no text to prepare.\n  Give --text FILE… or --dataset NAME.")
    if document not in DOCUMENTS:
        raise InvalidConfig(f"--document is {document!r}; {did_you_mean(document, DOCUMENTS)}")
    if heldout and fraction:
        raise InvalidConfig(f"--heldout-text and --heldout-fraction {fraction:g} are both given.\n  Give one of them.")
    if not heldout and not 0 < fraction < 1:
        raise InvalidConfig(
            f"--heldout-fraction is {fraction:g}, expected more than 0 and less than 1 without --heldout-text.\n"
            "  Evaluation needs text that is not trained on."
        )
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        what = "already holds token bins" if (output / "meta.json").exists() else "exists already"
        raise InvalidData(f"output {output} {what}.\n  Give a new --output, or remove it first; nothing was changed.")


def _check_files(files: list[TextFile]) -> None:
    for file in files:
        file.check()
    for path, times in Counter(file.path.resolve() for file in files).items():
        if times > 1:
            raise InvalidConfig(
                f"text file {path} is given {times} times.\n"
                "  Give each file once, and what is held out only as --heldout-text."
            )


def _clear(partial: Path) -> None:
    """Remove what a killed run left; never anything else."""
    if not partial.exists():
        return
    ours = {"tokenizer.json", "tokenizer_config.json", "meta.json"} | {
        f"{s}.{end}" for s in SPLITS for end in ("bin", "ends", "idx.npy")
    }
    foreign = sorted(file.name for file in partial.iterdir() if file.name not in ours) if partial.is_dir() else ["?"]
    if foreign:
        raise InvalidData(
            f"{partial} is in the way and holds something else ({foreign[0]}).\n  Move it, or give another --output."
        )
    shutil.rmtree(partial)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
