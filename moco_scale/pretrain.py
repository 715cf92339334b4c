"""One process of a training run: settings, ranks, loader and trainer put together."""

import contextlib
import json
import math
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from moco_scale import distributed
from moco_scale.config import CONFIG_FILE, TrainConfig, load_config, to_mapping
from moco_scale.distributed import Ranks, broadcast_object
from moco_scale.errors import EXIT_AGAIN, TrainError
from moco_scale.metrics import StepMetrics
from moco_scale.trainer import STOP_SIGNALS, Trainer, silence
from pipelines import Loader, open_loader
from pipelines.view_maker import ToDevice
from shards import open_store

if TYPE_CHECKING:
    from moco_scale.exporter import Exporter


def pretrain(
    arguments: Sequence[str],
    *,
    show: Callable[[StepMetrics], None],
    say: Callable[[str], None],
) -> int:
    """Train as the arguments say, alone or as one of torchrun's processes; return the exit code.

    Args:
        arguments: of `moco-scale pretrain`.
        show: called with every row of metrics, on rank 0.
        say: called with a line now and then, on rank 0.

    Raises:
        TrainError: among others, the GPU's memory is too short.
    """
    config = load_config(arguments)
    ranks = distributed.start(config.run.device, timeout_s=config.run.collective_timeout_s)
    try:
        config.validate(world_size=ranks.world_size)
        return _train(config, ranks, show=show, say=say if ranks.speaks else silence)
    except torch.OutOfMemoryError as err:
        said = ". ".join(str(err).split(". ")[:3]).rstrip(".")
        raise TrainError(
            f"rank {ranks.rank}: {said}; raise optim.accumulation (times the processes it divides "
            "data.global_batch_size / model.bn_sub_batch), or take a smaller view or backbone"
        ) from err
    finally:
        distributed.shutdown()


def open_run_loader(
    config: TrainConfig, ranks: Ranks, *, to_device: ToDevice | None = None
) -> Loader:
    """The loader of this rank, its threads recorded by `ranks.spans`; see `open_loader`."""
    return open_loader(
        config.data,
        seed=config.run.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device_index=ranks.device_index,
        local_world_size=ranks.local_world_size,
        agree=lambda value: broadcast_object(value, ranks),
        spans=ranks.spans,
        to_device=to_device,
    )


def _train(
    config: TrainConfig,
    ranks: Ranks,
    *,
    show: Callable[[StepMetrics], None],
    say: Callable[[str], None],
) -> int:
    with contextlib.ExitStack() as opened:
        exporter: Exporter | None = None
        heard = show
        if config.run.metrics_port:
            from moco_scale.exporter import open_exporter  # a web server, for who asked for one

            exporter = open_exporter(
                ranks, address=config.run.metrics_address, port=config.run.metrics_port
            )
            opened.callback(exporter.close)
            heard = exporter.hearing(show)
        loader = opened.enter_context(contextlib.closing(open_run_loader(config, ranks)))
        trainer = Trainer(
            data=config.data,
            model=config.model,
            optim=config.optim,
            run=config.run,
            loader=loader,
            ranks=ranks,
            progress=heard,
            say=say,
            saved=exporter.saved if exporter else None,
        )
        if exporter is not None:
            exporter.watch(trainer)
        if trainer.finished:
            say(f"{config.run.url} is finished: {trainer.step:,} of {trainer.last_step:,} steps")
            return 0
        if trainer.resumed_from:
            say(f"resuming after step {trainer.step:,}, from {trainer.resumed_from}")
        say(
            f"{config.model.backbone} on {ranks.world_size} x {ranks.device.type}, "
            f"{config.data.global_batch_size} images a step, {loader.steps_per_epoch:,} steps "
            f"an epoch, {trainer.last_step:,} in all"
        )
        chance = math.log(1 + config.model.negatives(config.data.global_batch_size))
        rises = " (it rises first, while noise is replaced)"
        say(
            f"loss: in nats, guessing costs {chance:.2f}"
            f"{rises if config.model.dictionary == 'queue' else ''}"
        )
        say("lookup: how often an image's own key scores highest; wait: for data, of a step")
        if ranks.speaks:
            saved = json.dumps(to_mapping(config), indent=1)
            open_store(config.run.url).put(CONFIG_FILE, saved.encode())
        result = trainer.run()
        if result.preempted:
            # Launchers send another as soon as the first of several processes has ended.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            say(
                f"stopped by a signal and saved after step {result.step:,}: start it again to go on"
            )
            return EXIT_AGAIN
        say(f"done after {result.step:,} steps: {config.run.url}")
        return 0
