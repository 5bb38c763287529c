"""Translation: text to tokens to batches, the Transformer, beam search, BLEU, and the task on four real ranks."""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_resume import same_files
from torch.nn import functional
from worlds import Real

from slowmo_mpi import config, presets, tasks
from slowmo_mpi.checkpoint.read import Checkpoint
from slowmo_mpi.comm import Endpoint
from slowmo_mpi.data import text, vocabulary
from slowmo_mpi.data.text import compose, lines, open_pairs, scan
from slowmo_mpi.data.vocabulary import BEGIN, END, PAD, Vocabulary, learn
from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.models import transformer
from slowmo_mpi.models.beam import beam_search
from slowmo_mpi.models.transformer import SIZES, Size, Transformer
from slowmo_mpi.resume import checkpoint_of
from slowmo_mpi.tasks import bleu
from slowmo_mpi.tasks.sampler import Shards
from slowmo_mpi.tasks.wmt16 import Translation, wmt16
from slowmo_mpi.train import train

ENTRIES = 80
NUMBERS = ["one eins", "two zwei", "three drei", "four vier", "five fünf", "six sechs", "seven sieben", "eight acht"]


def write(folder: Path, split: str, pairs: int, seed: int, longest: int = 12) -> None:
    """Numbers, 1 to `longest` in a sentence, and their translation."""
    draw = np.random.Generator(np.random.PCG64(seed))
    english, german = [], []
    for _ in range(pairs):
        chosen = [NUMBERS[i].split() for i in draw.integers(len(NUMBERS), size=draw.integers(1, longest + 1))]
        english.append(" ".join(a for a, _ in chosen) + ".")
        german.append(" ".join(b for _, b in chosen).capitalize() + ".")
    for language, sentences in (("en", english), ("de", german)):
        (folder / f"{split}.{language}").write_text("".join(f"{s}\n" for s in sentences), encoding="utf-8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the task wants it: 400 pairs to train on, 30 to evaluate."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, pairs, seed in (("train", 400, 1), ("valid", 30, 2), ("test", 20, 3)):
        write(folder, split, pairs, seed)
    learn([folder / "train.en", folder / "train.de"], ENTRIES, folder / "vocabulary.model")
    return folder


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    """A copy to spoil, with nothing encoded."""
    for file in corpus.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def make(folder: Path, **options: Any) -> Translation:
    own = {"model": "small", "vocabulary": ENTRIES, "max_tokens": 200, "max_length": 60, **options}
    return wmt16(tasks.Context(0, 1, 5, str(folder)), **own)


# Text


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes("\ufeffone\u2028still one\r\n\x0ctwo\n\nfour, unended".encode())
    assert list(lines(file)) == ["one\u2028still one", "\x0ctwo", "", "four, unended"]
    assert scan(file).lines == 4


def test_text_that_is_not_utf8_is_named_with_its_line(folder: Path) -> None:
    content = (folder / "train.de").read_bytes().split(b"\n")
    content[6] = "fünf".encode("latin-1")
    (folder / "train.de").write_bytes(b"\n".join(content))
    with pytest.raises(SlowmoError, match=r"train\.de, line 7, is not UTF-8: byte 0xfc at column 2") as error:
        open_pairs(folder, "train", Vocabulary(folder / "vocabulary.model"))
    assert "iconv" in error.value.hint
    assert not list((folder / "encoded").glob("train-*"))


def test_files_of_different_length_are_named_with_both_counts(folder: Path) -> None:
    with (folder / "valid.de").open("a") as stream:
        stream.write("zwei\n")
    with pytest.raises(SlowmoError, match=r"valid\.en has 30 lines and valid\.de 31"):
        open_pairs(folder, "valid", Vocabulary(folder / "vocabulary.model"))


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "train.en").unlink(), r"train\.en cannot be read: No such file"),
    (lambda f: (f / "train.en").write_bytes(b""), r"train\.en is empty"),
    (lambda f: (f / "vocabulary.model").unlink(), r"There is no vocabulary .*vocabulary\.model"),
    (lambda f: (f / "vocabulary.model").write_bytes(b"abc"), "is not a sentencepiece model"),
    (lambda f: (f / "vocabulary.model").write_bytes(b""), "is not a sentencepiece model"),
    (lambda f: ((f / "vocabulary.model").unlink(), (f / "vocabulary.model").mkdir()), "cannot be read: Is a directory"),
    (lambda f: (f / "encoded").write_bytes(b""), "The encoded text cannot be kept"),
    (lambda f: (f / "train.en").write_bytes(b"\n" * 400), r"nothing to train on in .*: 0 of 400 .*; 400 have an empty"),
])  # fmt: skip
def test_what_is_missing_is_told(folder: Path, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(SlowmoError, match=message):
        _ = make(folder).train


def test_an_empty_line_in_what_is_evaluated_is_named(folder: Path) -> None:
    content = (folder / "valid.en").read_text().split("\n")
    content[3] = "  "
    (folder / "valid.en").write_text("\n".join(content))
    with pytest.raises(SlowmoError, match=r"Line 4 of valid\.en or valid\.de"):
        _ = make(folder).test


def test_empty_and_long_pairs_are_left_out_counted_and_said(folder: Path) -> None:
    for language in ("en", "de"):
        content = (folder / f"train.{language}").read_text().split("\n")
        content[2 if language == "en" else 9] = ""
        content[5] = "one two three four " * 40
        (folder / f"train.{language}").write_text("\n".join(content))
    task = make(folder)
    seen = np.concatenate([task.train.batch(torch.tensor([i]))["line"] for i in range(len(task.train))])
    assert sorted(seen) == [i for i in range(400) if i not in (2, 5, 9)]
    assert task.notes[0] == ("397 of 400 sentence pairs to train on; 2 have an empty side; 1 are longer than 60 tokens")
    assert task.notes[1].startswith("BLEU: sacrebleu nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def catalog(messages: dict[str, str]) -> bytes:
    """A gettext catalog, as msgfmt writes it."""
    charset = "Content-Type: text/plain; charset=UTF-8\n"
    items = sorted((a.encode(), b.encode()) for a, b in {"": charset, **messages}.items())
    tables, texts, place = [b"", b""], b"", 28 + 16 * len(items)
    for side in (0, 1):
        for item in items:
            tables[side] += struct.pack("<2I", len(item[side]), place + len(texts))
            texts += item[side] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(items), 28, 28 + 8 * len(items), 0, 0)
    return header + tables[0] + tables[1] + texts


def test_pairs_come_out_of_message_catalogs(tmp_path: Path) -> None:
    code = (Path(__file__).parent.parent / "benchmarks" / "translation_data.py").read_text(encoding="utf-8")
    script: dict[str, Any] = {"__name__": "translation_data"}
    exec(compile(code, "translation_data.py", "exec"), script)
    (tmp_path / "a.mo").write_bytes(catalog({
        "menu\4_Open <b>file</b>...": "Datei &amp;\n_öffnen ...",
        "%d file\0%d files": "%d Datei\0%d Dateien",
        "some_name of %s": "Name von %d",
        "Cancel": "Cancel",
        "%s: %s": "%s: %s!",
    }))  # fmt: skip
    (tmp_path / "b.mo").write_bytes(b"no catalog")
    assert not list(script["messages"](tmp_path / "b.mo"))
    pairs = [tuple(map(script["clean"], pair)) for pair in script["messages"](tmp_path / "a.mo")]
    assert sorted((*pair, script["unfit"](*pair)) for pair in pairs) == [
        ("%d file", "%d Datei", ""),
        ("%d files", "%d Dateien", ""),
        ("%s: %s", "%s: %s!", "no words"),
        ("Cancel", "Cancel", "not translated"),
        ("Open file ...", "Datei & öffnen ...", ""),
        ("some_name of %s", "Name von %d", "other formats"),
    ]
    names = [script["key"](f"{word} %s 1") for word in ("Open", "open!", "close", "print")]
    assert names[0] == names[1] and {script["split"](n) for n in names} <= {"train", "valid", "test"}


# The vocabulary


def test_the_same_text_gives_the_same_vocabulary(corpus: Path, tmp_path: Path) -> None:
    files = [corpus / "train.en", corpus / "train.de"]
    assert learn(files, ENTRIES, tmp_path / "again.model") == 800
    assert (tmp_path / "again.model").read_bytes() == (corpus / "vocabulary.model").read_bytes()


def test_tokens_give_back_the_text(corpus: Path) -> None:
    entries = Vocabulary(corpus / "vocabulary.model")
    texts = ["one two fünf.", "Sieben acht.", ""]
    tokens = entries.encode(texts)
    assert entries.decode(tokens) == texts and tokens[2] == []
    assert min(min(row, default=END + 1) for row in tokens) > END
    assert transformer.PAD == PAD


def test_a_vocabulary_that_the_text_does_not_give_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No vocabulary of 9,000 entries can be learned from 400 lines: .*too high"):
        learn([corpus / "train.en"], 9000, tmp_path / "v.model")
    assert not list(tmp_path.iterdir())


def test_long_lines_are_learned_from_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(("quiz " * 2000 + "\n") * 3)
    learn([tmp_path / "a.txt"], 12, tmp_path / "v.model")
    (tokens,) = Vocabulary(tmp_path / "v.model").encode(["quiz quiz"])
    assert tokens and vocabulary.UNKNOWN not in tokens


@pytest.mark.parametrize("content, message", [
    (b"f\xfcnf\n", r"^.*a\.txt, line 1, is not UTF-8: byte 0xfc at column 2\.\nMend"),
    (b"\n \n", "There is no text in"),
])  # fmt: skip
def test_text_to_learn_from_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SlowmoError, match=message):
        learn([tmp_path / "a.txt"], ENTRIES, tmp_path / "v.model")


def test_of_much_text_every_second_line_is_taken(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(vocabulary, "LEARNED_FROM", 400)
    assert learn([corpus / "train.en", corpus / "train.de"], ENTRIES, tmp_path / "v.model") == 400


def test_a_vocabulary_of_another_size_than_the_model_is_refused(corpus: Path) -> None:
    with pytest.raises(UsageError, match=r"vocabulary.model has 80 entries, and the model 100") as error:
        _ = make(corpus, vocabulary=100).train
    assert "--set task.vocabulary=80" in error.value.hint


def test_the_command(folder: Path) -> None:
    (folder / "vocabulary.model").unlink()
    code = f"from slowmo_mpi.cli.data_vocab import vocab; vocab(['{folder}', '--size', '{ENTRIES}'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{folder}/vocabulary.model: 80 entries, learned from 800 lines\n"
    assert len(Vocabulary(folder / "vocabulary.model")) == ENTRIES


# What is encoded


def test_text_is_encoded_once_and_again_when_it_or_the_vocabulary_changes(folder: Path) -> None:
    def encoded() -> dict[str, int]:
        return {p.name: (p / "tokens.npy").stat().st_ino for p in (folder / "encoded").glob("[!.]*")}

    entries = Vocabulary(folder / "vocabulary.model")
    first = open_pairs(folder, "train", entries)
    assert isinstance(first._tokens, np.memmap) and first._tokens.dtype == np.uint16
    before = encoded()
    assert open_pairs(folder, "train", entries).fingerprint == first.fingerprint and encoded() == before

    file, times = folder / "train.de", (folder / "train.de").stat()
    content = file.read_bytes()
    file.write_bytes(content.replace(b"eins", b"zwei"))  # as many bytes, and then the same time
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_pairs(folder, "train", entries).fingerprint != first.fingerprint and len(encoded()) == 2

    file.write_bytes(content)
    learn([folder / "train.en", file], ENTRIES - 10, folder / "vocabulary.model")
    other = open_pairs(folder, "train", Vocabulary(folder / "vocabulary.model"))
    assert len(encoded()) == 3 and other.lengths.sum() > first.lengths.sum()
    for i, (english, german) in enumerate(zip(lines(folder / "train.en"), lines(file), strict=True)):
        assert entries.decode([first.source(i).tolist(), first.target(i).tolist()]) == [english, german]


def test_what_is_encoded_and_damaged_is_told(folder: Path) -> None:
    entries = Vocabulary(folder / "vocabulary.model")
    open_pairs(folder, "train", entries)
    (file,) = folder.glob("encoded/train-*/tokens.npy")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SlowmoError, match=r"encoded/train-\w+ is damaged") as error:
        open_pairs(folder, "train", entries)
    assert error.value.hint.startswith("Type: rm -r ")


def test_processes_that_start_together_encode_once(folder: Path) -> None:
    """Each writes down when it encodes; only one does, the others wait for it."""
    code = f"""
import time
from pathlib import Path
from slowmo_mpi.data import text
from slowmo_mpi.data.vocabulary import Vocabulary
encode = text._encode
def slow(*arguments):
    print("encodes")
    time.sleep(0.3)
    encode(*arguments)
text._encode = slow
folder = Path({str(folder)!r})
print(text.open_pairs(folder, "train", Vocabulary(folder / "vocabulary.model")).lengths.sum())
"""
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [p.communicate(timeout=60)[0].split("\n")[:-1] for p in processes]
    assert [p.returncode for p in processes] == [0] * 4
    assert sum(part[0] == "encodes" for part in said) == 1 and len({part[-1] for part in said}) == 1
    assert sorted(p.name[:6] for p in (folder / "encoded").iterdir()) == [".train", "train-"]


def test_waiting_for_another_process_is_bounded(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(text, "LOCK_S", 0.1)
    (folder / "encoded").mkdir()
    with (
        text._locked(folder / "encoded" / ".train.lock"),
        pytest.raises(SlowmoError, match="Another process has held"),
    ):
        open_pairs(folder, "train", Vocabulary(folder / "vocabulary.model"))


# Batches


def test_batches_hold_every_pair_once_and_little_padding() -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    source = draw.geometric(0.05, 20_000)
    lengths = np.stack([source, np.maximum(1, source + draw.integers(-3, 4, len(source)))], axis=1)
    order, ends = compose(lengths, 1000, seed=3)
    assert np.array_equal(np.sort(order), np.arange(20_000)) and ends[-1] == 20_000
    longest = lengths.max(axis=1)
    sizes = [(ends[i + 1] - ends[i]) * longest[order[ends[i] : ends[i + 1]]].max() for i in range(len(ends) - 1)]
    assert max(sizes) <= 1000
    assert longest.sum() / sum(sizes) > 0.97  # the rest is padding
    again, other = compose(lengths, 1000, seed=3), compose(lengths, 1000, seed=4)
    assert np.array_equal(again[0], order) and not np.array_equal(other[0], order)
    assert np.array_equal(compose(lengths[:1] * 0 + 2000, 1000, 0)[1], [0, 1])  # longer than a batch: by itself


def test_a_batch_is_the_sentences_between_their_marks(corpus: Path) -> None:
    task = make(corpus)
    one, two, both = (task.train.batch(torch.tensor(i)) for i in ([3], [7], [3, 7]))
    assert torch.equal(both["line"], torch.cat([one["line"], two["line"]]))
    english, german = list(lines(corpus / "train.en")), list(lines(corpus / "train.de"))
    for row, line in enumerate(both["line"].tolist()):
        source, target = (both[name][row][both[name][row] != PAD].tolist() for name in ("source", "target"))
        assert source[-1] == target[-1] == END and target[0] == BEGIN
        assert task.vocabulary.decode([source[:-1], target[1:-1]]) == [english[line], german[line]]
    assert (both["source"][:, -1] != PAD).any() and (both["target"][:, -1] != PAD).any()


def test_ranks_get_as_many_batches_and_about_as_many_tokens(corpus: Path) -> None:
    train_on = make(corpus).train
    tokens, seen = [], []
    for rank in range(4):
        shards = Shards(len(train_on), 4, rank, 1, seed=0)
        parts = [train_on.batch(shards.indices(step)) for step in range(shards.steps(1))]
        tokens.append(sum(int((b["target"] != PAD).sum()) for b in parts) / len(parts))
        seen += [line for b in parts for line in b["line"].tolist()]
    assert len(seen) == len(set(seen)) and len(seen) > 0.9 * 400
    assert max(tokens) < 1.15 * min(tokens)


# The model


@pytest.mark.parametrize("name, entries, parameters", [
    ("base", 37_000, 63_082_496),  # Vaswani et al. 2017, Table 3: 65 million
    ("big", 37_000, 214_245_376),  # 213 million
    ("base", 32_768, 60_915_712),  # fairseq's transformer_wmt_en_de with shared embeddings
    ("big", 32_768, 209_911_808),  # its transformer_vaswani_wmt_en_de_big, "about 210 million" (fairseq issue 2974)
])  # fmt: skip
def test_parameters_are_as_many_as_in_the_literature(name: str, entries: int, parameters: int) -> None:
    with torch.device("meta"):
        model = Transformer(SIZES[name], entries, 0.1)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not list(model.buffers())


def test_positions_are_sines_and_cosines_from_wavelength_2_pi_to_20000_pi() -> None:
    wanted = [[f(p * r) for f in (math.sin, math.cos) for r in (1.0, 0.01, 0.0001)] for p in (3, 4)]
    torch.testing.assert_close(transformer.sinusoids(3, 5, 6, torch.device("cpu")), torch.tensor(wanted))


def tiny(entries: int = 8, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(Size(16, 32, 2, 2), entries, 0.1).eval()


def test_the_future_and_the_padding_change_nothing() -> None:
    model = tiny()
    source, target = torch.tensor([[4, 5, 6, END], [7, END, PAD, PAD]]), torch.tensor([[BEGIN, 4, 5], [BEGIN, 6, PAD]])
    logits = model(source, target)
    torch.testing.assert_close(model(source[1:, :2], target[1:, :2]), logits[1:, :2])
    later = target.clone()
    later[:, 2] = 7
    torch.testing.assert_close(model(source, later)[:, :2], logits[:, :2])
    assert not torch.equal(model(source, later)[:, 2], logits[:, 2])


def test_a_step_with_kept_keys_and_values_is_the_whole_pass() -> None:
    model = tiny()
    source = torch.tensor([[4, 5, 6, END], [7, END, PAD, PAD]])
    target = torch.tensor([[BEGIN, 4, 5, 6], [BEGIN, 6, 4, 7]])
    logits, state = model(source, target), model.start(source)
    for j in range(2):
        torch.testing.assert_close(model.step(target[:, j], state), logits[:, j])
    state.select(torch.tensor([1, 0, 1]))
    for j in (2, 3):
        torch.testing.assert_close(model.step(target[[1, 0, 1], j], state), logits[[1, 0, 1], j])


def test_the_loss_is_torchs_smoothed_cross_entropy(corpus: Path) -> None:
    task = make(corpus, label_smoothing=0.2)
    task.model.eval()
    batch = task.train.batch(torch.tensor([0]))
    logits, wanted = task.model(batch["source"], batch["target"][:, :-1]).transpose(1, 2), batch["target"][:, 1:]
    loss, metrics = task.loss(task.model, batch)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, wanted, ignore_index=PAD, label_smoothing=0.2))
    torch.testing.assert_close(metrics["nll"], functional.cross_entropy(logits, wanted, ignore_index=PAD))
    assert metrics["tokens"] == (wanted != PAD).sum()


# Beam search


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.5])
def test_a_wide_beam_is_exhaustive_search(penalty: float) -> None:
    """Every translation of up to 3 of 5 tokens, by hand: 156 of them, for two sentences side by side."""
    source = torch.tensor([[4, 5, 6, END], [7, END, PAD, PAD]])
    allowed = [1, 4, 5, 6, 7]
    for seed in range(3):
        model = tiny(seed=seed)
        # Untrained, it prefers to repeat what it was given; a sharper one makes ends and lengths compete.
        model.embedding.weight.data.mul_(2.0)
        found = beam_search(model, source, BEGIN, END, [PAD, BEGIN], 5**3, penalty, 3)
        for row in range(2):
            best = (-float("inf"), ())
            for length in range(4):
                all_of_it = torch.tensor([[BEGIN, *w] for w in itertools.product(allowed, repeat=length)])
                with torch.no_grad():
                    logits = model(source[row : row + 1].expand(len(all_of_it), -1), all_of_it)
                logits[:, :, [PAD, BEGIN]] = -float("inf")
                ended = torch.cat([all_of_it[:, 1:], torch.full((len(all_of_it), 1), END)], dim=1)
                log_p = logits.log_softmax(2).gather(2, ended[:, :, None]).sum(dim=(1, 2)) / (length + 1) ** penalty
                score, at = log_p.max(dim=0)
                best = max(best, (float(score), tuple(all_of_it[at, 1:].tolist())))
            assert tuple(found.tokens[row]) == best[1]
            assert found.scores[row] == pytest.approx(best[0], abs=1e-5)


def test_a_sentence_is_translated_the_same_in_company() -> None:
    model = tiny(30, seed=1)
    draw = torch.Generator().manual_seed(0)
    source = torch.randint(4, 30, (6, 7), generator=draw)
    source[3, 4:] = PAD
    together = beam_search(model, source, BEGIN, END, [PAD, BEGIN], 4, 0.6, 12)
    for row in range(6):
        alone = beam_search(model, source[row : row + 1, : 4 if row == 3 else 7], BEGIN, END, [PAD, BEGIN], 4, 0.6, 12)
        assert alone.tokens[0] == together.tokens[row]
        assert alone.scores[0] == pytest.approx(together.scores[row], abs=1e-5)


# BLEU


def test_bleu_of_added_counts_is_that_of_the_whole_corpus() -> None:
    import sacrebleu

    draw = np.random.Generator(np.random.PCG64(0))
    words = ["der", "die", "Haus,", "Katze", "und", "läuft", "nicht."]
    references = [" ".join(draw.choice(words, draw.integers(1, 12))) for _ in range(40)]
    hypotheses = [" ".join(w if draw.random() < 0.8 else "ja" for w in r.split()) for r in references]
    parts = [bleu.counts(hypotheses[i : i + 7], references[i : i + 7]) for i in range(0, 40, 7)]
    whole = sacrebleu.corpus_bleu(hypotheses, [references])
    assert bleu.score(torch.stack(parts).sum(dim=0)) == pytest.approx(whole.score, rel=1e-12)
    assert 5 < whole.score < 95
    assert bleu.score(bleu.counts([""], ["ja"])) == 0.0


# The task


@pytest.mark.parametrize("key, value", [
    ("vocabulary", 4), ("max_tokens", 1), ("max_length", 200), ("dropout", 1.0), ("label_smoothing", -0.1),
    ("beam", -1), ("length_penalty", -0.5),
])  # fmt: skip
def test_values_out_of_range_are_refused(tmp_path: Path, key: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"task\.{key} = {value} is out of range"):
        make(tmp_path, **{key: value})


SHORT = [
    "run.epochs=0", "run.steps=10", "run.log_every=2", "run.eval_every=5", "run.worker=rank", "task.model=small",
    f"task.vocabulary={ENTRIES}", "task.max_tokens=200", "task.max_length=60", "optimizer.lr=2e-3",
    "optimizer.warmup=4", "slowmo.tau=4", "checkpoint.every=5",
]  # fmt: skip
TIMES = ("samples_per_s", "communication_share", "input_share", "time_s")


def begin(comm: Endpoint, wanted: config.Config, folder: Path) -> dict[str, Any]:
    return train(wanted, comm, folder)


def go_on(comm: Endpoint, wanted: config.Config, folder: Path, place: Path) -> dict[str, Any]:
    return train(wanted, comm, folder, resume=checkpoint_of(place, wanted, (), comm, print))


def records(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


@pytest.mark.parametrize("algorithm", ["local", "sgp"])
@pytest.mark.parametrize("world", ["mpi-4"], indirect=True)
def test_four_ranks_train_and_go_on_to_the_bit(world: Real, algorithm: str, folder: Path, tmp_path: Path) -> None:
    """What `slowmo init` gives, as Local Adam and SGP with SlowMo, buffers kept; stopped in mid-round and mid-epoch."""
    own = [f"base.algorithm={algorithm}", f'task.data="{folder}"']
    wanted = config.parse(presets.commented("wmt16"), "a test", [*SHORT, *own])
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    for place in (whole, rest):
        place.mkdir()
    world.run(begin, wanted, whole)
    assert len(list((folder / "encoded").glob("train-*"))) == 1
    last = records(whole)[-1]
    assert last["kind"] == "eval" and 0 < last["loss"] < 6 and last["perplexity"] > 1 and 0 <= last["bleu"] <= 100
    assert "BLEU: sacrebleu nrefs:1" in (whole / "manifest.json").read_text()
    world.run(go_on, wanted, rest, whole / "checkpoints/step-00000005.h5")
    assert records(rest) == [r for r in records(whole) if r["step"] > 5]
    same_files(whole / "checkpoints/step-00000010.h5", rest / "checkpoints/step-00000010.h5")
    with Checkpoint(whole / "checkpoints/step-00000010.h5") as checkpoint:
        state = json.loads(checkpoint.text(0))["extra"]["task"]
    assert set(state) == {"vocabulary", "text"}


def test_a_checkpoint_of_another_vocabulary_or_text_is_refused(folder: Path) -> None:
    task = make(folder)
    state = task.state_dict()
    task.load_state_dict(state)
    with pytest.raises(SlowmoError, match="was trained with another vocabulary"):
        task.load_state_dict(state | {"vocabulary": "0"})
    with pytest.raises(SlowmoError, match=r"was trained with another train\.en and train\.de"):
        task.load_state_dict(state | {"text": "0"})


def test_it_learns_to_translate(tmp_path: Path) -> None:
    """Short sentences of numbers it has not seen, in 300 steps; an untrained model gives a loss of 4 and no BLEU."""
    for split, pairs, seed in (("train", 400, 1), ("valid", 30, 2)):
        write(tmp_path, split, pairs, seed, longest=4)
    learn([tmp_path / "train.en", tmp_path / "train.de"], 60, tmp_path / "vocabulary.model")
    task = make(tmp_path, vocabulary=60, max_tokens=400, label_smoothing=0.0)
    torch.manual_seed(0)
    task.model = Transformer(Size(64, 128, 4, 1), 60, 0.0)
    optimizer = torch.optim.Adam(task.model.parameters(), 3e-3, betas=(0.9, 0.98))
    for step in range(300):
        loss, _ = task.loss(task.model, task.train.batch(torch.tensor([step % len(task.train)])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task.model.eval()
    with torch.no_grad():
        parts = [task.evaluate(task.model, task.test.batch(torch.tensor([i]))) for i in range(len(task.test))]
    scores = task.score({name: torch.stack([p[name] for p in parts]).sum(dim=0) for name in parts[0]})
    assert scores["loss"] < 0.25 and scores["bleu"] > 40, scores
