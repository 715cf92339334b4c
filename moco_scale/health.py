"""Figures about the embeddings that need no label: what goes wrong before the loss shows it."""

import torch
from torch import Tensor

_DUPLICATE = 0.99
_LOOKED_AT = 256


@torch.no_grad()
def embedding_health(
    q: Tensor, keys: Tensor | None, queue: Tensor | None, *, newest: Tensor | None = None
) -> dict[str, float]:
    """Some figures of one step; the host waits for them.

    Args:
        q: n x C, this rank's queries.
        keys: N x C; the first n of them are the queries' positives. None: of the queries alone.
        queue: C x K; None without one.
        newest: columns of the queue that are not looked at, since they hold these keys.

    Returns:
        alignment: mean squared distance of a query and its key (Wang and Isola 2020, arXiv
            2005.10242); uniformity: log of the mean of exp(-2 squared distance) over pairs of
            embeddings (ibid.); effective_rank: exp of the entropy of the singular values (Roy and
            Vetterli 2007); duplicate_key_frac: keys whose nearest key in the queue has a cosine
            above 0.99.
    """
    found: dict[str, float] = {}
    embeddings = (q if keys is None else keys)[:_LOOKED_AT].float()
    count = len(embeddings)
    if keys is not None:
        positives = keys[: len(q)].float()
        found["alignment"] = float((q.float() - positives).square().sum(1).mean())
    distances = (2 - 2 * embeddings @ embeddings.T).clamp_min(0)
    apart = ~torch.eye(count, dtype=torch.bool, device=q.device)
    found["uniformity"] = float(torch.exp(-2 * distances[apart]).mean().log())
    singular = torch.linalg.svdvals(embeddings)
    share = singular / singular.sum().clamp_min(1e-12)
    found["effective_rank"] = float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
    if queue is not None:
        cosines = embeddings @ queue.float()
        if newest is not None:
            cosines[:, newest] = -1
        found["duplicate_key_frac"] = float((cosines.amax(dim=1) > _DUPLICATE).float().mean())
    return found
