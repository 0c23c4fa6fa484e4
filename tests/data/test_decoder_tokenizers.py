"""Tokenizers of Llama, GPT-2, Qwen and T5: roles and ids are those of transformers, in bins and in packed rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from bert2bert.data.bins import TokenBins
from bert2bert.data.loader import Loader
from bert2bert.data.objective import Causal, Masked, SpanCorruption, check
from bert2bert.data.prepare import prepare
from bert2bert.data.tokenizer_files import load_tokenizer
from bert2bert.errors import InvalidConfig
from tests.data.test_tokenizer_files import folder, same

CORPUS = ["the cat sat on the mat\n\n the cats don't, 1,234 times \n café naïve"] * 3
DOCUMENTS = [
    "the cat sat\n  on the mat,\n\tdon't 1,234",
    "café  naïve İstanbul ﬁn 👩‍💻 中文 \u2028 e\u0301 \x7f",
    "<s> </s> <extra_id_3> <|endoftext|> [MASK]\n<|begin|> cats",
    "a",
]


def template(made: Tokenizer, form: str, *names: str) -> None:
    made.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(name, made.token_to_id(name)) for name in names]
    )


def written(at: Path, made: Tokenizer, kind: str, **config: Any) -> Path:
    return folder(at, None, tokenizer=json.loads(made.to_str()), tokenizer_config={"tokenizer_class": kind, **config})


def byte_fallback(at: Path) -> Path:
    """Llama 2's kind: a sentencepiece BPE, converted."""
    names = ["<unk>", "<s>", "</s>"]
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    codes = [f"<0x{i:02X}>" for i in range(256)]
    made.train_from_iterator(CORPUS, BpeTrainer(vocab_size=420, special_tokens=names + codes, show_progress=False))
    state = json.loads(made.to_str())
    made = Tokenizer.from_str(json.dumps({**state, "added_tokens": state["added_tokens"][:3]}))
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(fallback)
    template(made, "<s> $A", "<s>")
    return written(at, made, "LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False)


def byte_level(kind: str, *names: str, bos: str = "", **config: Any) -> Callable[[Path], Path]:
    """A byte-level BPE with special tokens behind its vocabulary, the template of bos where it is given."""

    def make(at: Path) -> Path:
        made = Tokenizer(models.BPE())
        words = Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+| ?\p{L}+|\s+")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), bytes_only])
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(CORPUS, BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
        made.add_special_tokens(list(names))
        if bos:
            template(made, f"{bos} $A", bos)
        return written(at, made, kind, **config)

    return make


def unigram(at: Path) -> Path:
    """T5's kind: a sentencepiece Unigram, converted, with its sentinels in falling order behind it."""
    words = [("▁" + word, -float(i + 1)) for i, word in enumerate(("the", "cat", "sat", "on", "mat"))]
    letters = [(letter, -20.0) for letter in "abcdefghijklmnopqrstuvwxyz▁,'1234"]
    made = Tokenizer(
        models.Unigram([*((name, 0.0) for name in ("<pad>", "</s>", "<unk>")), *words, *letters], unk_id=2)
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    made.add_special_tokens(["<pad>", "</s>", "<unk>", *reversed(sentinels)])
    template(made, "$A </s>", "</s>")
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return written(at, made, "T5Tokenizer", extra_ids=100, additional_special_tokens=sentinels, **names)


END = "<|endoftext|>"
FOLDERS: dict[str, tuple[Callable[[Path], Path], set[str], bool]] = {  # maker, roles, whether bos stands before a text
    "llama 2": (byte_fallback, {"bos", "eos", "unk"}, True),
    "llama 3": (
        byte_level("PreTrainedTokenizerFast", "<|begin|>", "<|end|>", bos="<|begin|>", bos_token="<|begin|>",
                   eos_token="<|end|>"), {"bos", "eos"}, True,
    ),
    "gpt-2": (byte_level("GPT2Tokenizer", END), {"bos", "eos", "unk"}, False),
    "qwen 2": (byte_level("Qwen2Tokenizer", END, "<|im_end|>", eos_token="<|im_end|>", pad_token=END),
               {"pad", "eos", "unk"}, False),
    "t5": (unigram, {"pad", "eos", "unk"}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_roles_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    make, roles, add_bos = FOLDERS[name]
    at = make(tmp_path / "hub")
    same(at, tmp_path / "kept")
    truth, found = transformers.AutoTokenizer.from_pretrained(at), load_tokenizer(at).vocabulary
    assert found.special == {role: getattr(truth, f"{role}_token_id") for role in roles} and found.add_bos == add_bos
    sentinels = [f"<extra_id_{i}>" for i in range(100 if name == "t5" else 0)]
    assert list(found.sentinels) == truth.convert_tokens_to_ids(sentinels)
    assert found.size == len(truth)


def test_a_bos_that_is_asked_for_and_not_put_is_reported(tmp_path: Path) -> None:
    """transformers follows the template of tokenizer.json; without one the setting has no effect."""
    at = byte_fallback(tmp_path / "hub")
    config, state = (json.loads((at / name).read_text()) for name in ("tokenizer_config.json", "tokenizer.json"))
    (at / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    assert not load_tokenizer(at).notes
    (at / "tokenizer.json").write_text(json.dumps({**state, "post_processor": None}))
    found, truth = load_tokenizer(at), transformers.AutoTokenizer.from_pretrained(at)
    assert found.vocabulary.add_bos == (truth("the cat")["input_ids"][0] == truth.bos_token_id)
    assert found.vocabulary.add_bos or "has add_bos_token = true, but" in found.notes[0]


def bins_of(folder: Path, tokenizer: Path) -> TokenBins:
    """Every document of `DOCUMENTS` in both splits."""
    for name in ("train", "heldout"):
        for i, text in enumerate(DOCUMENTS):
            (folder / f"{name}{i}.txt").write_text(text, newline="")
    train, heldout = ([folder / f"{name}{i}.txt" for i in range(len(DOCUMENTS))] for name in ("train", "heldout"))
    prepare(train, None, None, None, None, tokenizer, 64, heldout, 0, "file", folder / "bins", 0, False)
    return TokenBins.open(folder / "bins")


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "t5"])
def test_causal_documents_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """As its tokenizer frames a text, with the end token behind it; a byte-level one gives the text back exactly."""
    at = FOLDERS[name][0](tmp_path / "hub")
    bins, truth = bins_of(tmp_path, at), transformers.AutoTokenizer.from_pretrained(at)
    ids, offsets = bins.split("train")
    assert not set(ids.tolist()) & {bins.special["eos"], bins.special.get("bos")}  # names in a text are text
    if name in ("llama 3", "gpt-2"):
        texts = [truth.decode(ids[a:b], clean_up_tokenization_spaces=False) for a, b in pairwise(offsets)]
        assert texts == DOCUMENTS
    batch = next(Loader(bins, "train", Causal(), 512, 1, 0, 1, 0))
    cu = batch.cu_seqlens.tolist()
    packed = [batch.tokens[a:b].tolist() for a, b in pairwise(cu)][: len(DOCUMENTS)]
    plain = [0, 1, 3]  # the others name special tokens
    expected = [[*truth(DOCUMENTS[i])["input_ids"], truth.eos_token_id] for i in plain]
    assert all(document in packed for document in expected) and len(batch.lengths) == len(DOCUMENTS)
    for objective in (Masked(), SpanCorruption()):
        with pytest.raises(InvalidConfig, match=r"^the tokenizer of .*bins has no .*which the objective"):
            check(objective, bins.vocabulary)
    written = transformers.AutoTokenizer.from_pretrained(bins.folder)
    assert [written(text)["input_ids"] for text in DOCUMENTS] == [truth(text)["input_ids"] for text in DOCUMENTS]


def test_sentinels_in_bins_of_a_t5(tmp_path: Path) -> None:
    at = unigram(tmp_path / "hub")
    bins, truth = bins_of(tmp_path, at), transformers.AutoTokenizer.from_pretrained(at)
    assert not set(bins.split("train")[0].tolist()) & {*bins.vocabulary.sentinels, truth.eos_token_id}
    for batch in islice(Loader(bins, "train", SpanCorruption(), 64, 1, 0, 1, 0), 2):
        assert batch.decoder is not None and batch.decoder.tokens[0] == truth.pad_token_id
        assert truth.decode(batch.labels[:1]) == "<extra_id_0>" and batch.labels[-1] == truth.eos_token_id


def test_prepare_says_what_a_tokenizer_can_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bins_of(tmp_path, byte_fallback(tmp_path / "hub"))
    text = "can train causal; not masked (no pad, cls, sep or mask token); not span-corruption (no pad token and"
    assert text in capsys.readouterr().err
