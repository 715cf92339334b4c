"""torchrun for several hosts, whose exit code says whether to start again.

    python -m moco_scale.launch TORCHRUN-ARGUMENTS -m moco_scale pretrain ...

torchrun itself ends with 1 and a traceback whatever happened. Exit codes here: 0 done; 75 start it
again and it goes on (a host was lost, or a signal stopped the run, whose own line says whether it
saved); else what the first process that failed ended with. SIGUSR1, which ends torchrun, is passed
on as SIGTERM is.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from moco_scale.errors import EXIT_AGAIN


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with these arguments, and return the exit code."""
    # Else agents share a store whose address the first of them tells once: a host that is started
    # again waits for it in vain, and all end (pytorch/pytorch#135712; seen with torch 2.14).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Schedulers warn with it, the same as with SIGTERM, before a job's time is up.
    signal.signal(signal.SIGUSR1, _stop)
    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]  # torch does not type them
    except ChildFailedError as err:
        return _of_workers(err)
    except (RendezvousError, DistError) as err:
        return _again(
            f"the rendezvous failed ({_first_line(err)}): its host is lost, or too few came"
        )
    except SignalException as err:
        return _again(f"stopped by {err.sigval.name}")
    return 0


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  signal's signature
    """As torchrun does with SIGTERM: its agent catches this, passes the signal on and waits."""
    received = signal.Signals(number)
    raise SignalException(received.name, received)


def _of_workers(err: ChildFailedError) -> int:
    codes = {rank: failure.exitcode for rank, failure in sorted(err.failures.items())}
    if set(codes.values()) == {EXIT_AGAIN}:
        return _again("the processes of this host ended, and no restart is left")
    rank, code = next((r, c) for r, c in codes.items() if c != EXIT_AGAIN)
    how = f"exit code {code}" if code > 0 else f"signal {-code}"
    print(f"moco-scale launch: error: rank {rank} failed with {how}", file=sys.stderr)
    return code if code > 0 else 1


def _again(why: str) -> int:
    print(f"moco-scale launch: {why}; start the same command again", file=sys.stderr)
    return EXIT_AGAIN


def _first_line(err: Exception) -> str:
    cause = err.__cause__ or err
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__


if __name__ == "__main__":
    sys.exit(main())
