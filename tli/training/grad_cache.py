"""The gradients of a batch that is too large to be held: forward in parts, the loss over all pairs, backward in parts.

A contrastive loss needs all words of the batch at once, but of each only its vector. So the parts go forward without a graph and
leave their vectors; the loss over all of them gives each vector its gradient; then each part goes forward again, with a graph, and
takes its vectors' gradients back. Twice the forward work, and the memory of one part. Dropout is a function of the step's seed, so a
part drops the same entries both times. Source: Gao et al. 2021 (arXiv 2101.06983).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tli.data.batch import Batch


def backward(parts: Sequence[Batch], vectors_of: Callable[[Batch], Tensor], loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Add the gradients of the loss over all parts' words to the parameters', and return the loss.

    Args:
        parts:       packed words, the sources of some pairs first, then their targets
        vectors_of:  a part -> its word vectors, fp32 [2b, D]
        loss_of:     all vectors, fp32 [2B, D], the sources of all parts first -> the loss, a scalar

    Returns:
        The loss, without its graph. With one part this is the plain backward pass.
    """
    if len(parts) == 1:
        loss = loss_of(vectors_of(parts[0]))
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        sources, targets = zip(*(vectors_of(part).chunk(2) for part in parts))
    vectors = torch.cat([*sources, *targets]).requires_grad_()
    loss = loss_of(vectors)
    loss.backward()
    # backward has filled it in
    assert vectors.grad is not None
    pairs = [len(part) for part in sources]
    for part, *gradients in zip(parts, *(half.split(pairs) for half in vectors.grad.chunk(2))):
        vectors_of(part).backward(torch.cat(gradients))
    return loss.detach()
