"""The loader in a training loop of your own: SimCLR (arXiv 2002.05709) on a shard set, plain torch.

    python examples/own_loop.py SHARD_SET --to simclr.pt --steps 1000

Stop it at any moment and start the same command again: it goes on with the batch behind its last
checkpoint, and ends where it would have ended without the stop (on the CPU, with the same bits).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models import resnet18

from pipelines import DataConfig, open_loader


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", help="URL or path that 'moco-scale pack' wrote to")
    parser.add_argument("--to", type=Path, required=True, help="file of the checkpoint")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--view-size", type=int, default=224)
    parser.add_argument("--save-every", type=int, default=100)
    given = parser.parse_args(arguments)

    device_index = 0 if torch.cuda.is_available() else None
    device = torch.device("cpu" if device_index is None else f"cuda:{device_index}")
    torch.manual_seed(0)
    encoder = resnet18(num_classes=128).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    # Rank and world size are plain numbers, so any launcher will do: give each process its own.
    loader = open_loader(
        DataConfig(
            shards=(given.shards,),
            global_batch_size=given.batch_size,
            view_size=given.view_size,
            recipe="v2",  # crop, jitter, grey, blur, flip
        ),
        seed=0,
        rank=0,
        world_size=1,
        device_index=device_index,
    )
    step = 0
    if given.to.exists():
        saved = torch.load(given.to, map_location=device, weights_only=True)
        step = saved["step"]
        encoder.load_state_dict(saved["encoder"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])  # before the first batch is taken

    try:
        while step < given.steps:
            batch = next(loader)  # never ends: one epoch follows another
            z = encoder(torch.cat([batch.view_q, batch.view_k]))
            loss = nt_xent(z, temperature=0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step}  epoch {loader.epoch}  loss {loss.item():.4f}")
            if step % given.save_every == 0 or step == given.steps:
                # The loader has read ahead by now; its state counts what the loop has taken.
                content = {
                    "step": step,
                    "encoder": encoder.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "loader": loader.state_dict(),
                }
                unfinished = given.to.with_suffix(".unfinished")
                torch.save(content, unfinished)
                unfinished.replace(given.to)  # whole, or not at all
    finally:
        loader.close()


def nt_xent(z: Tensor, *, temperature: float) -> Tensor:
    """SimCLR's loss of 2N x C embeddings, the second views behind the first ones in their order."""
    z = functional.normalize(z, dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)  # none is its own partner
    n = len(z) // 2
    partner = (torch.arange(2 * n, device=z.device) + n) % (2 * n)
    return functional.cross_entropy(similarity, partner)


if __name__ == "__main__":
    main()
