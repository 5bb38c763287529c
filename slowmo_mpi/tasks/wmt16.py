"""Translation from English to German with a Transformer, as in WMT'16: the paper's language experiment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from slowmo_mpi.data.text import SOURCE, TARGET, Pairs, compose, lines, open_pairs
from slowmo_mpi.data.vocabulary import BEGIN, END, PAD, Vocabulary
from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.models.beam import beam_search
from slowmo_mpi.models.transformer import SIZES, Transformer
from slowmo_mpi.tasks import Context, bleu

EVALUATED_TOGETHER = 2048  # tokens of a batch that is evaluated; beam search holds `beam` times as many
LONGER = 50  # tokens that a translation may have more than its source, as Vaswani et al.


def wmt16(
    context: Context,
    *,
    model: Literal["small", "base", "big"] = "big",
    vocabulary: int = 32768,
    max_tokens: int = 3584,
    max_length: int = 256,
    dropout: float = 0.3,
    label_smoothing: float = 0.1,
    split: Literal["valid", "test"] = "valid",
    beam: int = 4,
    length_penalty: float = 0.6,
) -> Translation:
    """A Transformer of the size `model` with `vocabulary` entries, and the text in `context.data`.

    A sample is a batch of sentence pairs of about equal length, put together once: its sentences times its longest
    are at most `max_tokens`. Pairs with a side of no token or more than `max_length` are not trained on, and counted.
    `split` is evaluated: perplexity, and BLEU of beam search with `beam` hypotheses (0: no BLEU) and `length_penalty`.
    Raises UsageError when a value is out of range; reading raises SlowmoError, at the first use of the data.
    """
    for key, value, wrong, usual in (
        ("vocabulary", vocabulary, vocabulary <= END + 1, 32768),
        ("max_tokens", max_tokens, max_tokens < 2, 3584),
        ("max_length", max_length, not 1 <= max_length < max_tokens, min(256, max_tokens - 1)),
        ("dropout", dropout, not 0 <= dropout < 1, 0.3),
        ("label_smoothing", label_smoothing, not 0 <= label_smoothing < 1, 0.1),
        ("beam", beam, beam < 0, 4),
        ("length_penalty", length_penalty, length_penalty < 0, 0.6),
    ):
        if wrong:
            raise UsageError(f"task.{key} = {value} is out of range.", f"Type --set task.{key}={usual}.")
    return Translation(
        model=Transformer(SIZES[model], vocabulary, dropout), folder=Path(context.data or ".").expanduser(),
        seed=context.seed,
        max_tokens=max_tokens, max_length=max_length, label_smoothing=label_smoothing, split=split, beam=beam,
        length_penalty=length_penalty,
    )  # fmt: skip


class Batches:
    """Samples that are batches of sentence pairs; several together are one batch.

    A batch is `source`, int64 (b, s), each row ended by END; `target`, int64 (b, t), from BEGIN to END, both padded
    with PAD on the right; and `line`, int64 (b,), where in the text each pair stands, from 0.
    """

    def __init__(self, pairs: Pairs, chosen: npt.NDArray[np.int64], max_tokens: int, seed: int):
        """chosen: which pairs, int64 (n,); max_tokens, seed: see `compose`."""
        self._pairs = pairs
        order, self._ends = compose(pairs.lengths[chosen] + 1, max_tokens, seed)
        self._order = chosen[order]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        line = np.concatenate([self._order[self._ends[i] : self._ends[i + 1]] for i in indices.tolist()])
        longest_source, longest_target = self._pairs.lengths[line].max(axis=0)
        source = np.full((len(line), longest_source + 1), PAD, np.int64)
        target = np.full((len(line), longest_target + 2), PAD, np.int64)
        for row, pair in enumerate(line):
            for side, tokens in ((source[row], self._pairs.source(pair)), (target[row, 1:], self._pairs.target(pair))):
                side[: len(tokens)] = tokens
                side[len(tokens)] = END
        target[:, 0] = BEGIN
        return {name: torch.from_numpy(x) for name, x in (("source", source), ("target", target), ("line", line))}


@dataclass(kw_only=True)
class Translation:
    """The task that `wmt16` makes."""

    model: Transformer
    folder: Path
    seed: int
    max_tokens: int
    max_length: int
    label_smoothing: float
    split: str
    beam: int
    length_penalty: float
    evaluation_batch = 1  # of `test`'s samples, which are batches already

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Raises SlowmoError when it is missing or no such file, UsageError when it is not of the model's size."""
        found, wanted = Vocabulary(self.folder / "vocabulary.model"), self.model.embedding.num_embeddings
        if len(found) != wanted:
            raise UsageError(
                f"{found.file} has {len(found):,} entries, and the model {wanted:,}.",
                f"Type --set task.vocabulary={len(found)}, or learn one anew: "
                f"slowmo data vocab {self.folder} --size {wanted}",
            )
        return found

    @cached_property
    def _training(self) -> Pairs:
        return open_pairs(self.folder, "train", self.vocabulary)

    @cached_property
    def train(self) -> Batches:
        shortest, longest = self._training.lengths.min(axis=1), self._training.lengths.max(axis=1)
        chosen = ((shortest > 0) & (longest <= self.max_length)).nonzero()[0]
        if not len(chosen):
            raise SlowmoError(f"There is nothing to train on in {self.folder}: {self.notes[0]}.")
        return Batches(self._training, chosen, self.max_tokens, self.seed)

    @property
    def notes(self) -> list[str]:
        """What there is to train on and what was left out, and sacrebleu's signature."""
        lengths = self._training.lengths
        empty, long = (lengths == 0).any(axis=1), (lengths > self.max_length).any(axis=1)
        kept = f"{np.count_nonzero(~empty & ~long):,} of {len(lengths):,} sentence pairs to train on"
        if empty.any():
            kept += f"; {np.count_nonzero(empty):,} have an empty side"
        if (long & ~empty).any():
            kept += f"; {np.count_nonzero(long & ~empty):,} are longer than {self.max_length} tokens"
        return [kept, *([f"BLEU: sacrebleu {bleu.signature()}"] if self.beam else [])]

    @cached_property
    def test(self) -> Batches:
        pairs = open_pairs(self.folder, self.split, self.vocabulary)
        if len(empty := (pairs.lengths == 0).nonzero()[0]):
            raise SlowmoError(
                f"Line {empty[0] + 1} of {self.split}.{SOURCE} or {self.split}.{TARGET} in {self.folder} is empty; "
                "what is evaluated must be there.",
                "Delete that line in both files.",
            )
        return Batches(pairs, np.arange(len(pairs)), EVALUATED_TOGETHER, 0)

    @cached_property
    def _references(self) -> list[str]:
        return list(lines(self.folder / f"{self.split}.{TARGET}"))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of a target token in nats, its target distribution smoothed.

        Micro-batches and ranks count alike where their means are averaged, whatever their tokens.
        Also `nll`, without smoothing, and `tokens`, the target's in this batch.
        """
        log_p, nll, tokens = _log_likelihood(model, batch)
        mean = nll.sum() / tokens
        uniform = -(log_p.mean(dim=2) * (batch["target"][:, 1:] != PAD)).sum() / tokens
        loss = (1 - self.label_smoothing) * mean + self.label_smoothing * uniform
        return loss, {"nll": mean.detach(), "tokens": tokens.float()}

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Sums over the batch: `nll` of the target's `tokens`, and `bleu`, its counts see tasks/bleu.py."""
        _, nll, tokens = _log_likelihood(model, batch)
        sums = {"nll": nll.double().sum(), "tokens": tokens}
        if self.beam:
            hypotheses = self.translate(model, batch["source"])
            references = [self._references[line] for line in batch["line"].tolist()]
            sums["bleu"] = bleu.counts(hypotheses, references)
        return sums

    def score(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """`loss`, NLL of a target token in nats; `perplexity`, its exponential; `bleu`, sacrebleu's, 0 to 100.

        fairseq, and so the paper, tells the NLL in bits: 1.44 times as much.
        """
        nll = float(sums["nll"]) / int(sums["tokens"])
        scores = {"loss": nll, "perplexity": math.exp(min(nll, 700.0))}  # metrics.jsonl has no infinity
        return scores | ({"bleu": bleu.score(sums["bleu"])} if self.beam else {})

    def translate(self, model: Any, source: Tensor) -> list[str]:
        """The German of source, int64 (b, s), English tokens as `Batches` gives them."""
        found = beam_search(
            model, source, BEGIN, END, [PAD, BEGIN], self.beam, self.length_penalty, source.shape[1] + LONGER
        )
        return self.vocabulary.decode(found.tokens)

    def state_dict(self) -> dict[str, str]:
        """For a checkpoint: which vocabulary and text the run was trained on."""
        return {"vocabulary": self.vocabulary.fingerprint, "text": self._training.fingerprint}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Raises SlowmoError when the checkpoint was trained on another vocabulary or text than is here now."""
        for name, now in self.state_dict().items():
            if state[name] != now:
                what = "vocabulary" if name == "vocabulary" else f"train.{SOURCE} and train.{TARGET}"
                raise SlowmoError(
                    f"The checkpoint was trained with another {what} than {self.folder} has now.",
                    "Set task.data to the folder it was trained with, or start a new run.",
                )


def _log_likelihood(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(log p of every entry (b, t, vocabulary), -log p of each target token (b, t), 0 at padding, and their number)."""
    target = batch["target"]
    log_p = model(batch["source"], target[:, :-1]).float().log_softmax(dim=2)
    nll = functional.nll_loss(log_p.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, reduction="none")
    return log_p, nll.view_as(target[:, 1:]), (target[:, 1:] != PAD).sum()
