"""BLEU as sacrebleu computes it (Post 2018), from counts that can be added up over batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slowmo_mpi.errors import SlowmoError


def counts(hypotheses: list[str], references: list[str]) -> Tensor:
    """What BLEU is made of, int64 (10,): n-grams that match and n-grams there are (n = 1 ... 4), words on both sides.

    One reference for each hypothesis; plain text, which sacrebleu cuts into words.
    """
    found = _sacrebleu().BLEU().corpus_score(hypotheses, [references])
    return torch.tensor([*found.counts, *found.totals, found.sys_len, found.ref_len])


def score(total: Tensor) -> float:
    """BLEU, 0 to 100, of summed `counts`."""
    *ngrams, words, reference_words = total.tolist()
    bleu = _sacrebleu().BLEU.compute_bleu(ngrams[:4], ngrams[4:], words, reference_words, smooth_method="exp")
    return bleu.score


def signature() -> str:
    """sacrebleu's, which says how its numbers came about."""
    metric = _sacrebleu().BLEU()
    metric.corpus_score(["a"], [["a"]])  # the signature tells the number of references, so it needs some
    return str(metric.get_signature())


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise SlowmoError(
            f"BLEU needs the package sacrebleu, and Python cannot import it: {error}.",
            "Type: pip install 'slowmo-mpi[translation]', or --set task.beam=0 to go without BLEU.",
        ) from error
    return sacrebleu
