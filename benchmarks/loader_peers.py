"""Sections of `benchmarks.loaders` that set us beside other projects' whole loaders."""

import os
import shutil
from importlib import metadata
from typing import Any

import boto3

from benchmarks.loader_places import (
    Places,
    Sides,
    Sizes,
    figures_of,
    in_turns,
    rate_table,
    uploaded,
)
from benchmarks.loader_sides import BATCH
from benchmarks.peer_sides import VIEW
from demo.images import CACHE

ENCODED_COPIES, LOADER_COPIES = 8, 2
"""Times that each photo is read in a pass over S3, so that it takes seconds, not less."""
_PEERS = {"mds": ("MosaicML Streaming", "mosaicml-streaming"), "litdata": ("litData", "litdata")}
"""Formats that need a package of their own: whose they are, and the package."""


def installed_peers() -> dict[str, str]:
    """Name of the package by format."""
    installed = {one.name for one in metadata.distributions()}
    return {kind: package for kind, (_, package) in _PEERS.items() if package in installed}


def left_out() -> list[str]:
    """A line about the peers that do not take part, if there are any."""
    missing = [package for kind, (_, package) in _PEERS.items() if kind not in installed_peers()]
    said = f"Left out, not installed (extra `bench`): {', '.join(missing)}."
    return ["", said] if missing else []


def sides_of_peers(
    what: str, places: Places, *, copies: int, on_s3: bool = False, **given: Any
) -> Sides:
    """The side `what` of each peer that is installed, with the photos in its format."""
    found = {}
    for kind in installed_peers():
        folder = (CACHE / f"{kind}-{places.photos.name}x{copies}").absolute()
        if not folder.exists():
            begun = folder.with_suffix(".begun")
            shutil.rmtree(begun, ignore_errors=True)
            figures_of(
                f"write_{kind}",
                {"photos": str(places.photos), "out": str(begun), "copies": copies},
            )
            begun.rename(folder)
        url = uploaded(folder, places.bucket) if on_s3 else str(folder)
        found[_PEERS[kind][0]] = (f"{what}_{kind}", {"url": url, **given})
    return found


def image_folder(places: Places) -> str:
    """What torchvision's ImageFolder wants: a folder for each class."""
    root = places.photos.with_name(f"{places.photos.name}-classes")
    root.mkdir(exist_ok=True)
    link, photos = root / "photos", places.photos.resolve()
    if not link.exists():  # or it leads to where a checkout was
        link.unlink(missing_ok=True)
        link.symlink_to(photos)
    return str(root)


def _signed(places: Places) -> list[str]:
    """URLs of the tars on S3 for curl, which has no credentials."""
    client = boto3.client("s3")
    bucket, _, prefix = places.s3.removeprefix("s3://").partition("/")
    at = [{"Bucket": bucket, "Key": f"{prefix}/{name}"} for name in places.tars]
    return [client.generate_presigned_url("get_object", Params=one) for one in at]


def _sides(what: str, places: Places, *, copies: int, on_s3: bool, **given: Any) -> Sides:
    """The side `what` of everybody who can read from there; each photo is there `copies` times."""
    tars = places.s3_tars if on_s3 else places.local_tars
    for_webdataset = _signed(places) if on_s3 else tars
    return {
        "ours": (f"{what}_ours", {"url": places.s3 if on_s3 else places.local, **given}),
        "webdataset": (f"{what}_webdataset", {"tars": for_webdataset * copies, **given}),
        "DALI": (f"{what}_dali", {"tars": tars * copies, "idx": places.idx * copies, **given}),
        **sides_of_peers(what, places, copies=copies, on_s3=on_s3, **given),
    }


def epoch(places: Places, sizes: Sizes) -> list[str]:
    """Encoded samples out of S3, every one of them fetched."""
    samples = sizes.photos * ENCODED_COPIES
    sides = _sides("encoded", places, copies=ENCODED_COPIES, on_s3=True, samples=samples)
    return [
        "## 7. Encoded samples out of S3, one core, nothing cached",
        "",
        f"{samples:,} samples, from the first request on; the server has all cores. Ours: as in "
        "section 1. webdataset: presigned URLs, which it hands to curl. DALI: `readers.webdataset`,"
        " `s3://` paths, `.idx` local. MosaicML Streaming, litData: `shuffle=False`, from an empty "
        "local cache, in memory; each of their shards is fetched whole, once, under a name of its "
        "own, where the others fetch the same tars again.",
        "",
        *rate_table(in_turns(sides, sizes.repeats), what="samples"),
        *left_out(),
    ]


def whole(places: Places, sizes: Sizes) -> list[str]:
    """The whole loader: batches of two views, on all cores."""
    # A worker without a shard is more than webdataset takes.
    cores = min(len(os.sched_getaffinity(0)), LOADER_COPIES * len(places.tars))
    seconds = 4 * sizes.seconds
    given: dict[str, Any] = {"workers": cores, "seconds": seconds}
    local = {
        **_sides("loader", places, copies=sizes.copies, on_s3=False, **given),
        "torchvision": (
            "loader_torchvision",
            {"folder": image_folder(places), "copies": sizes.copies, **given},
        ),
    }
    # Not quite a pass: what is left for a worker at the end may not fill a batch.
    samples = max(BATCH, sizes.photos * LOADER_COPIES - cores * BATCH)
    s3 = _sides("loader", places, copies=LOADER_COPIES, on_s3=True, workers=cores, samples=samples)
    return [
        f"## 8. The whole loader: two views of {VIEW} px in batches of {BATCH}, {cores} cores",
        "",
        f"MoCo v2's recipe, normalised floats. Ours: `open_loader`, {cores} threads, in an order "
        "that mixes the whole set, every checksum compared; nobody else compares any. DALI: "
        "`readers.webdataset(random_shuffle=True)` with its buffer of 1,024, operators of its own "
        f"on the CPU (`color_twist` is not torchvision's jitter), {cores} threads, "
        "`DALIGenericIterator`. The others: Pillow and MoCo's own transforms, decoded once for "
        f"both views, {cores} worker processes that are kept, default collation. webdataset: "
        "`shardshuffle=100`, `shuffle(1000)`, batched by the workers, `WebLoader`. MosaicML "
        "Streaming: `shuffle=True` (py1e), `StreamingDataLoader`. litData: `shuffle=True` (order "
        "of chunks, and within each), `StreamingDataLoader`. torchvision: `ImageFolder`, "
        "`DataLoader(shuffle=True)`.",
        "",
        f"From local files, {seconds:g} s behind a warm-up of 8 batches:",
        "",
        *rate_table(in_turns(local, sizes.repeats, cores=cores), what="samples"),
        "",
        f"From S3, {samples:,} samples, from the first request on, start of the workers included. "
        "The server is on the same cores, its CPU-seconds are not counted. torchvision reads files "
        "alone:",
        "",
        *rate_table(in_turns(s3, sizes.repeats, cores=cores), what="samples"),
        *left_out(),
    ]
