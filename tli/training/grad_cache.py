"""GradCache: the gradients of a batch too large to be held, by micro-batches.

A contrastive loss needs all words of the batch at once, but of each only its embedding. So the micro-batches go forward without a
graph and leave their embeddings; the loss over all of them gives each embedding its gradient; then each micro-batch goes forward
again, with a graph, and backpropagates its embeddings' gradients. Twice the forward work, and the memory of one micro-batch. Dropout
is a function of the step's seed, so a micro-batch drops the same entries both times. Source: Gao et al. 2021 (arXiv 2101.06983).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tli.data.batch import Batch


def backward(micro_batches: Sequence[Batch], embed: Callable[[Batch], Tensor], loss_fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Add the gradients of the loss over all micro-batches' words to the parameters', and return the loss.

    Args:
        micro_batches:  packed words, the sources of some pairs first, then their targets
        embed:          a micro-batch -> its embeddings, fp32 [2b, D]
        loss_fn:        all embeddings, fp32 [2B, D], the sources of all micro-batches first -> the loss, a scalar

    Returns:
        The loss, without its graph. With one micro-batch this is the plain backward pass.
    """
    if len(micro_batches) == 1:
        loss = loss_fn(embed(micro_batches[0]))
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        sources, targets = zip(*(embed(micro_batch).chunk(2) for micro_batch in micro_batches))
    embeddings = torch.cat([*sources, *targets]).requires_grad_()
    loss = loss_fn(embeddings)
    loss.backward()
    # backward has filled it in
    assert embeddings.grad is not None
    pairs = [len(source) for source in sources]
    for micro_batch, *gradients in zip(micro_batches, *(half.split(pairs) for half in embeddings.grad.chunk(2))):
        embed(micro_batch).backward(torch.cat(gradients))
    return loss.detach()
