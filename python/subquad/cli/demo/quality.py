"""How far two runs over the same prompt are apart: logits and perplexity."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# At this many logits the comparison ends: 5,461 positions of 49,152 tokens, 1,024 of 262,144. Computing them
# takes as long as a prefill where the vocabulary is large and the model small.
_MOST_LOGITS = 1 << 28
# Logits in memory at a time: 64 MB.
_BLOCK_LOGITS = 1 << 24


@dataclass(frozen=True)
class Quality:
    """Comparison of a candidate with a baseline over the last positions of the prompt.

    Attributes:
        positions: How many positions were compared; those before them were not.
        perplexity_baseline: exp of the mean negative log-likelihood of the tokens after the first of them.
        perplexity_candidate: The same for the candidate.
        logit_difference: Largest absolute difference of any logit at any of the positions.
        logit_difference_last: The same at the last position, which chooses the first new token.
    """

    positions: int
    perplexity_baseline: float
    perplexity_candidate: float
    logit_difference: float
    logit_difference_last: float


def _perplexity(losses: "torch.Tensor") -> float:
    mean = float(losses.double().mean().item())
    # math.exp raises on overflow; a broken result must be shown, not crash the report.
    return math.exp(mean) if mean < 700 else math.inf


def compare(
    model: Any, prompt: "torch.Tensor", baseline: "torch.Tensor", candidate: "torch.Tensor"
) -> Quality:
    """Compares two runs through their hidden states.

    The output projection is done in float32 whatever the model's dtype is: rounding the logits to bfloat16
    would hide most of what is being compared, and is slow on processors without bfloat16 arithmetic.

    Args:
        model: The model; only its output projection is used.
        prompt: Token ids, `[1, S]`, S at least 2.
        baseline: Hidden states of the baseline, `[S, hidden_size]`.
        candidate: Hidden states of the candidate, `[S, hidden_size]`.

    Returns:
        The comparison.
    """
    import torch
    from torch.nn import functional

    with torch.no_grad():
        weight = model.get_output_embeddings().weight.float()
        vocabulary = weight.shape[0]
        # Perplexity needs two positions.
        length = min(prompt.shape[1], max(2, _MOST_LOGITS // vocabulary))
        block = max(1, _BLOCK_LOGITS // vocabulary)
        states = [each[-length:] for each in (baseline, candidate)]
        # The last position predicts what follows the prompt; it has no loss.
        targets = prompt[0, -length:][1:]
        losses = torch.empty(2, length - 1)
        differences = torch.empty(length)
        for start in range(0, length, block):
            rows = slice(start, min(start + block, length))
            logits = [functional.linear(each[rows].float(), weight) for each in states]
            differences[rows] = (logits[0] - logits[1]).abs().amax(dim=1)
            wanted = targets[rows]
            for loss, each in zip(losses, logits, strict=True):
                loss[rows] = functional.cross_entropy(each[: len(wanted)], wanted, reduction="none")
    return Quality(
        positions=length,
        perplexity_baseline=_perplexity(losses[0]),
        perplexity_candidate=_perplexity(losses[1]),
        logit_difference=float(differences.max().item()),
        logit_difference_last=float(differences[-1].item()),
    )
