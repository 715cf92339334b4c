"""The loaders of other projects on the same photos, each as its documentation trains with it.

`python -m benchmarks.peer_sides NAME JSON` runs one side, as `benchmarks.loader_sides` does. What a
loader caches stays in $TMPDIR: its workers may still write there when the side is done.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks.loader_sides import (
    BATCH,
    SEED,
    Figures,
    encoded_touched,
    measured,
    passes,
    run_side,
    transforms_of_moco,
)

VIEW = 224
_WARM_UP = 8  # batches: more than the workers are asked for ahead


def main() -> int:
    return run_side(SIDES)


# What they read: the bytes of the same JPEG files, converted outside the timing.


def write_mds(*, photos: str, out: str, copies: int) -> Figures:
    """Shards of MosaicML Streaming, of the default size; JPEGs are not compressed once more."""
    from streaming import MDSWriter

    paths = sorted(Path(photos).iterdir())
    with MDSWriter(out=out, columns={"jpg": "bytes"}) as writer:
        for path in paths:
            writer.write({"jpg": path.read_bytes()})
    index = json.loads(Path(out, "index.json").read_text())
    files = [shard["raw_data"] for shard in index["shards"]]
    index["shards"] = [
        shard | {"raw_data": raw | {"basename": name}}
        for names in _named_again(out, [raw["basename"] for raw in files], copies)
        for shard, raw, name in zip(index["shards"], files, names, strict=True)
    ]
    Path(out, "index.json").write_text(json.dumps(index))
    return {"samples": copies * len(paths)}


def write_litdata(*, photos: str, out: str, copies: int) -> Figures:
    """litData's chunks, of the default size."""
    import litdata

    paths = sorted(map(str, Path(photos).iterdir()))
    litdata.optimize(fn=_read, inputs=paths, output_dir=out, chunk_bytes="64MB", num_workers=1)
    index = json.loads(Path(out, "index.json").read_text())
    index["chunks"] = [
        chunk | {"filename": name}
        for names in _named_again(out, [chunk["filename"] for chunk in index["chunks"]], copies)
        for chunk, name in zip(index["chunks"], names, strict=True)
    ]
    Path(out, "index.json").write_text(json.dumps(index))
    return {"samples": copies * len(paths)}


def _named_again(folder: str, files: list[str], copies: int) -> Iterator[list[str]]:
    """The files `copies` times, as links: once in the page cache, but each once for a loader."""
    for copy in range(copies):
        names = [f"{copy:02}-{file}" for file in files]
        for file, name in zip(files, names, strict=True):
            Path(folder, name).hardlink_to(Path(folder, file))
        yield names
    for file in files:
        Path(folder, file).unlink()


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _mds(dataset: Any, url: str, *, shuffle: bool) -> Any:
    where = {"remote": url, "local": tempfile.mkdtemp()} if "://" in url else {"local": url}
    return dataset(**where, batch_size=BATCH, shuffle=shuffle)


def _litdata(url: str, **options: Any) -> Any:
    from litdata import StreamingDataset
    from litdata.streaming import downloader

    # It has no setting for plain http, which the server on loopback speaks.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    return StreamingDataset(url, cache_dir=tempfile.mkdtemp(), **options)


# 1 and 7. Encoded samples, in order, which costs each of them least.


def encoded_mds(*, url: str, **span: Any) -> Figures:
    from streaming import StreamingDataset

    samples = passes(_mds(StreamingDataset, url, shuffle=False))
    return encoded_touched((one["jpg"] for one in samples), **span)


def encoded_litdata(*, url: str, **span: Any) -> Figures:
    return encoded_touched(passes(_litdata(url, shuffle=False)), **span)


def encoded_files(*, folder: str, **span: Any) -> Figures:
    from torchvision.datasets import ImageFolder

    photos = ImageFolder(folder, loader=_read)
    return encoded_touched((photos[at][0] for at in passes(range(len(photos)))), **span)


# 8. The whole loader: two views of each photo, in batches.


class _TwoViews:
    """MoCo's transforms, twice on a picture that was decoded once."""

    def __init__(self) -> None:
        self._of_pil = transforms_of_moco(VIEW)

    def __call__(self, image: Any) -> tuple[Any, Any]:
        return self._of_pil(image), self._of_pil(image)

    def of_bytes(self, data: bytes) -> tuple[Any, Any]:
        from PIL import Image

        return self(Image.open(BytesIO(data)).convert("RGB"))


def _measured(pairs: Iterable[Any], **span: Any) -> Figures:
    def batches() -> Iterator[int]:
        for view_q, view_k in pairs:
            assert view_q.shape == view_k.shape == (BATCH, 3, VIEW, VIEW)
            yield BATCH

    return measured(batches(), warm_up=_WARM_UP, **span)


def loader_ours(*, url: str, workers: int, **span: Any) -> Figures:
    from pipelines import DataConfig, open_loader

    config = DataConfig(shards=(url,), global_batch_size=BATCH, view_size=VIEW, num_threads=workers)
    loader = open_loader(config, seed=SEED, rank=0, world_size=1, device_index=None)
    try:
        return _measured(((batch.view_q, batch.view_k) for batch in loader), **span)
    finally:
        loader.close()


def loader_torchvision(*, folder: str, copies: int, workers: int, **span: Any) -> Figures:
    from torch.utils.data import ConcatDataset, DataLoader
    from torchvision.datasets import ImageFolder

    photos = ImageFolder(folder, transform=_TwoViews())
    loaded: Any = DataLoader(
        ConcatDataset([photos] * copies),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
    )
    return _measured((views for views, _ in passes(loaded)), **span)


def loader_webdataset(*, tars: list[str], workers: int, **span: Any) -> Figures:
    import webdataset

    two_views = _TwoViews()
    photos = (
        webdataset.WebDataset(tars, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg")
        .map(lambda one: two_views(*one))
        .batched(BATCH, partial=False)
    )
    loaded = webdataset.WebLoader(
        photos, batch_size=None, num_workers=workers, persistent_workers=True
    )
    return _measured(passes(loaded), **span)


def loader_mds(*, url: str, workers: int, **span: Any) -> Figures:
    from streaming import StreamingDataLoader, StreamingDataset

    two_views = _TwoViews()

    class Photos(StreamingDataset):  # type: ignore[misc]  # it has no types
        def __getitem__(self, at: Any) -> Any:
            return two_views.of_bytes(super().__getitem__(at)["jpg"])

    loaded = StreamingDataLoader(
        _mds(Photos, url, shuffle=True),
        batch_size=BATCH,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
    )
    return _measured(passes(loaded), **span)


def loader_litdata(*, url: str, workers: int, **span: Any) -> Figures:
    from litdata import StreamingDataLoader

    loaded = StreamingDataLoader(
        _litdata(url, shuffle=True, drop_last=True, transform=_TwoViews().of_bytes),
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=True,
    )
    return _measured(passes(loaded), **span)


def loader_dali(*, tars: list[str], idx: list[str], workers: int, **span: Any) -> Figures:
    """DALI's reader and DALI's own operators, which draw for themselves."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    from pipelines.views import IMAGE_MEAN, IMAGE_STD

    def happens(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    def between(low: float, high: float) -> Any:
        return fn.random.uniform(range=(low, high))

    @pipeline_def(  # type: ignore[untyped-decorator]  # DALI has no types
        batch_size=BATCH, num_threads=workers, device_id=None, enable_conditionals=True, seed=SEED
    )
    def graph() -> Any:
        encoded = fn.readers.webdataset(
            paths=tars, index_paths=idx, ext=["jpg"], random_shuffle=True
        )
        image = fn.decoders.image(encoded, output_type=types.RGB)
        views = []
        for _ in range(2):
            view = fn.random_resized_crop(image, size=VIEW, random_area=(0.2, 1.0))
            if happens(0.8):
                view = fn.color_twist(
                    view,
                    brightness=between(0.6, 1.4),
                    contrast=between(0.6, 1.4),
                    saturation=between(0.6, 1.4),
                    hue=between(-36.0, 36.0),
                )
            if happens(0.2):
                view = fn.saturation(view, saturation=0.0)
            if happens(0.5):
                view = fn.gaussian_blur(view, sigma=between(0.1, 2.0))
            view = fn.crop_mirror_normalize(
                view,
                mirror=fn.random.coin_flip(),
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255.0 * value for value in IMAGE_MEAN],
                std=[255.0 * value for value in IMAGE_STD],
            )
            views.append(view)
        return tuple(views)

    loaded = DALIGenericIterator([graph()], ["view_q", "view_k"], prepare_first_batch=False)
    return _measured(((one["view_q"], one["view_k"]) for (one,) in loaded), **span)


SIDES: dict[str, Callable[..., Figures]] = {
    "write_mds": write_mds,
    "write_litdata": write_litdata,
    "encoded_mds": encoded_mds,
    "encoded_litdata": encoded_litdata,
    "encoded_files": encoded_files,
    "loader_ours": loader_ours,
    "loader_torchvision": loader_torchvision,
    "loader_webdataset": loader_webdataset,
    "loader_mds": loader_mds,
    "loader_litdata": loader_litdata,
    "loader_dali": loader_dali,
}

if __name__ == "__main__":
    sys.exit(main())
