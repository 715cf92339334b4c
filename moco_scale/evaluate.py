"""What an encoder learned: neighbours, probes and few shots, beside what needs no learning."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import torch
import xxhash

from moco_scale.distributed import Ranks
from moco_scale.errors import EvaluationError
from moco_scale.evaluation import (
    EVALUATION_FILE,
    PAGE_FILE,
    SAMPLES_FILE,
    Evaluation,
    Runs,
    Task,
    neighbourhood,
    samples_table,
    scores_of,
)
from moco_scale.evaluation_page import build_page
from moco_scale.features import FOLDER as FEATURES
from moco_scale.features import (
    Extractor,
    Features,
    Show,
    Views,
    baseline_extractors,
    extract,
)
from moco_scale.labels import LabelledSamples, join_labels, open_images
from moco_scale.probe import Heads, Learner, ProbeRecipe, probe_views, train_heads
from moco_scale.scoring import (
    Examples,
    ImageTable,
    Right,
    few_shot,
    find_nearest,
    knn,
    linear,
    on_split,
    recall,
    splits,
)
from moco_scale.subject import RANDOM, TRAINED, Encoders
from moco_scale.trained import Trained, open_trained
from shards import ShardSet, Store, open_store

logger = logging.getLogger(__name__)

_RECALLS = (1, 5, 10)
_PROBE_LOADER_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """How features are taken and scored."""

    on: str = ""
    """Labelled images: a shard set; a folder of images, or a list (CSV, Parquet) of uri and label,
    which are packed beside the run first. Empty: the set that the run trained on."""
    labels: str = ""
    """URL of a CSV or Parquet with the columns uri and label; or 'folder': the folder that an image
    lies in. Empty: the labels that were packed with the images, else the folder."""
    test_on: str = ""
    """Images to be tested on, of --on's classes; what is learnt from, and found, is then all of
    --on. Empty: one set, each image left out in its turn, or a part kept for the test."""
    test_labels: str = ""
    """Labels of --test-on, as --labels."""
    match: Literal["label", "name"] = "label"
    """A find in retrieval is right if it has the same label, or the same file name."""
    out: str = ""
    """Where the results and the features go; empty: the run."""
    features: Literal["pooled", "embedding"] = "pooled"
    """Of the encoder: what enters MoCo's head, or what leaves it."""
    k: tuple[int, ...] = (10, 200)
    """Numbers of neighbours that vote, a column of the table each."""
    temperature: float = 0.1
    """A neighbour's vote weighs exp(cosine / temperature) (Wu et al. 2018, section 3.4)."""
    probe: Literal["lbfgs", "paper", "none"] = "lbfgs"
    """Linear classifier: L-BFGS on the features of the middle crop; or the paper's recipe, SGD on
    random crops of images that pass through the encoder in every epoch."""
    probe_lrs: tuple[float, ...] = (30.0, 10.0, 3.0, 1.0, 0.3)
    """With --probe paper: learning rates, a column each; all are trained in the same passes. The
    paper's is 30."""
    probe_epochs: int = 100
    """With --probe paper: the paper's is 100."""
    probe_batch_size: int = 256
    """With --probe paper: the paper's is 256; another needs other learning rates."""
    shots: tuple[int, ...] = (1, 5, 10)
    """Images of a class that few-shot classification learns from, a column each."""
    draws: int = 10
    """Few-shot draws a seed."""
    test_frac: float = 0.2
    """Part of a class that is kept for the test where --on is the only set."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the splits, the draws, the probes and the random encoders (the run's seed + this)."""
    view_size: int = 0
    """Height and width of the evaluated centre crop, in pixels; 0 takes the run's view size."""
    batch_size: int = 256
    """Images per forward pass."""
    num_threads: int = 0
    """Decoding threads; 0 takes the cores of this machine."""
    bootstrap: int = 2000
    """Resamples of the images for the 95 % intervals."""

    def __post_init__(self) -> None:
        for name in ("k", "seeds", "shots", "probe_lrs"):
            if not getattr(self, name):
                raise ValueError(f"{name} needs at least one number")
        for name in ("k", "shots"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {min(getattr(self, name))}")
        for name in ("temperature", "probe_epochs", "probe_batch_size", "draws", "bootstrap"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 < self.test_frac < 1:
            raise ValueError(f"test_frac must be between 0 and 1, not {self.test_frac}")


def evaluate(
    url: str, config: EvaluateConfig, *, ranks: Ranks, show: Show = lambda *_: None
) -> Evaluation | None:
    """Score an encoder; write evaluation.json, .parquet (a row an image) and .html. A collective.

    Args:
        url: of a run, or of one checkpoint.
        show: is told how far it is.

    Returns:
        None on all ranks but the first.

    Raises:
        EvaluationError: no labels, one class only, no image with a label, or features that are not
            finite.
        CheckpointError: the run has no checkpoint, or it is of another architecture.
    """
    trained = open_trained(url)
    store = open_store(config.out or trained.run_url or url.rpartition("/")[0] or ".")
    views = Views(
        size=config.view_size or trained.config.data.view_size,
        batch_size=config.batch_size,
        loader=trained.config.data.loader,
        num_threads=config.num_threads,
    )
    data = _open_data(trained, config, store=store, ranks=ranks, show=show)
    encoders = Encoders(
        trained, seeds=config.seeds, output=config.features, views=views, device=ranks.device
    )
    extractors = [*baseline_extractors(), *encoders.random(*data.sets[0]), encoders.trained]
    found = [
        extract(
            shard_set, labelled, extractors, views=views, cache=store, ranks=ranks,
            show=show,
        )
        for shard_set, labelled in data.sets
    ]  # fmt: skip
    if not ranks.speaks:
        return None
    table = _join(data, found, config=config, device=ranks.device)
    results = _score(table, extractors, config=config, show=show)
    if config.probe == "paper":
        results["linear probe"] = _paper_probe(
            table, extractors, data, config=config, views=views, ranks=ranks,
            saved=store, show=show,
        )  # fmt: skip
    encoders.check_unchanged()
    evaluation = _evaluation(table, results, trained=trained, store=store, data=data, config=config)
    store.put(SAMPLES_FILE, samples_table(table, results, k=str(config.k[0])))
    written = json.dumps(dataclasses.asdict(evaluation), indent=1)
    store.put(EVALUATION_FILE, written.encode())
    show("pictures of the page", 0, 1)
    store.put(PAGE_FILE, build_page(evaluation, loader=views.loader).encode())
    return evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    sets: list[tuple[ShardSet, LabelledSamples]]
    """The one set; or what is learnt from, and what is tested."""
    classes: tuple[str, ...]
    num_unknown: int
    """Tested images of a class that is not learnt."""


def _open_data(
    trained: Trained, config: EvaluateConfig, *, store: Store, ranks: Ranks, show: Show
) -> _Data:
    trained_on = trained.config.data.shards
    if not config.on and len(trained_on) != 1:
        raise EvaluationError(
            f"the run has {len(trained_on)} shard sets; say by --on which one to evaluate on"
        )

    def opened(url: str) -> ShardSet:
        return open_images(
            url, packed_below=store.uri("evaluation-sets"), ranks=ranks,
            progress=lambda done: show("images packed", done.shards_done, done.shards),
        )  # fmt: skip

    first = opened(config.on or trained_on[0])
    labelled = join_labels(first, config.labels)
    if not config.test_on:
        return _Data(sets=[(first, labelled)], classes=labelled.classes, num_unknown=0)
    second = opened(config.test_on)
    tested = join_labels(second, config.test_labels)
    numbers = {name: number for number, name in enumerate(labelled.classes)}
    known = np.array([name in numbers for name in tested.classes])[tested.labels]
    if not known.any():
        raise EvaluationError(
            f"none of the {len(tested.classes)} classes of --test-on ({tested.classes[0]!r}, ...) "
            f"is one of --on ({labelled.classes[0]!r}, ...); give sets that share their labels"
        )
    renumbered = np.array([numbers.get(name, -1) for name in tested.classes])[tested.labels]
    rows = np.flatnonzero(known)
    tested = dataclasses.replace(
        tested,
        sample_ids=tested.sample_ids[rows],
        labels=renumbered[rows],
        classes=labelled.classes,
        uris=tuple(tested.uris[row] for row in rows),
    )
    return _Data(
        sets=[(first, labelled), (second, tested)],
        classes=labelled.classes,
        num_unknown=int((~known).sum()),
    )


def _join(
    data: _Data, found: Sequence[Features], *, config: EvaluateConfig, device: torch.device
) -> ImageTable:
    pairs = list(zip(data.sets, found, strict=True))
    labels = np.concatenate([labelled.labels[one.rows] for (_, labelled), one in pairs])
    names = [
        PurePosixPath(labelled.uris[row]).stem for (_, labelled), one in pairs for row in one.rows
    ]
    _, by_stem = np.unique(names, return_inverse=True)
    matches = labels if config.match == "label" else by_stem
    examples = Examples(
        labels=torch.from_numpy(labels).to(device),
        num_classes=len(data.classes),
        matches=torch.from_numpy(matches.astype(np.int64)).to(device),
        num_train=len(found[0].rows),
    )
    present = np.unique(labels[: examples.num_train])
    if len(present) < 2:
        raise EvaluationError(
            f"of the images that can be decoded all are {data.classes[int(present[0])]!r}; an "
            "evaluation needs two classes"
        )
    by_name = {
        name: torch.cat([one.by_name[name] for one in found]).to(device)
        for name in found[0].by_name
    }
    return ImageTable(
        examples=examples,
        by_name=by_name,
        sample_ids=np.concatenate([lab.sample_ids[one.rows] for (_, lab), one in pairs]),
        labels=labels,
        splits=splits(examples, test_frac=config.test_frac, seeds=config.seeds),
    )


def _rows(names: Sequence[str]) -> dict[str, list[str]]:
    """Rows of a table, and the extractors that are the seeds of each."""
    rows: dict[str, list[str]] = {}
    for name in names:
        rows.setdefault(RANDOM if name.startswith(f"{RANDOM} ") else name, []).append(name)
    return rows


def _score(
    table: ImageTable, extractors: Sequence[Extractor], *, config: EvaluateConfig, show: Show
) -> dict[str, Runs]:
    rows = _rows([one.name for one in extractors])
    results: dict[str, Runs] = {"kNN": {}, "linear probe": {}, "few shots": {}, "retrieval": {}}
    done, total = 0, len(extractors)
    for row, names in rows.items():
        columns: dict[str, dict[str, list[Right]]] = {task: {} for task in results}

        def add(
            task: str, column: str, right: Right, into: dict[str, dict[str, list[Right]]] = columns
        ) -> None:
            into[task].setdefault(column, []).append(right)

        for name in names:
            near = find_nearest(table.by_name[name], table.examples, max(*config.k, *_RECALLS))
            for k in config.k:
                right, _, _ = knn(near, table.examples, k=k, temperature=config.temperature)
                add("kNN", str(k), right)
            for k in _RECALLS:
                add("retrieval", f"R@{k}", recall(near, table.examples, k=k))
            done += 1
            show("features scored", done, total)
        for run in range(max(len(names), len(table.splits))):
            if config.probe == "lbfgs":
                features = table.by_name[names[run % len(names)]]
                split = table.splits[run % len(table.splits)]
                add("linear probe", "L-BFGS", linear(features, table.examples, split))
        for run, seed in enumerate(config.seeds):
            features = table.by_name[names[run % len(names)]]
            split = table.splits[run % len(table.splits)]
            for shots in config.shots:
                right = few_shot(
                    features, table.examples, split, shots=shots, draws=config.draws, seed=seed
                )
                add("few shots", str(shots), right)
        for task, found in columns.items():
            results[task][row] = {column: np.stack(runs) for column, runs in found.items()}
    if all(np.isnan(one["R@1"]).all() for one in results["retrieval"].values()):
        del results["retrieval"]
        if config.match == "name":
            raise EvaluationError(
                "no tested image has the file name of one to be found; give --test-on a set with "
                "the same names, or leave --match label"
            )
    return results


def _paper_probe(
    table: ImageTable,
    extractors: Sequence[Extractor],
    data: _Data,
    *,
    config: EvaluateConfig,
    views: Views,
    ranks: Ranks,
    saved: Store,
    show: Show,
) -> Runs:
    recipe = ProbeRecipe(
        lrs=config.probe_lrs, epochs=config.probe_epochs, batch_size=config.probe_batch_size
    )
    shard_set = data.sets[0][0]
    opened = {one.name: one.open() for one in extractors}
    learners = []
    for names in _rows(list(opened)).values():
        for run, seed in enumerate(config.seeds):
            name = names[run % len(names)]
            may_learn = np.zeros(table.examples.num_train, dtype=bool)
            may_learn[table.splits[run % len(table.splits)].train.numpy()] = True
            heads = Heads(
                recipe, num_features=table.by_name[name].shape[1],
                num_classes=table.examples.num_classes, seed=seed, device=ranks.device,
            )  # fmt: skip
            learners.append(
                Learner(name=name, extract=opened[name], heads=heads, may_learn=may_learn)
            )
    rows = table.sample_ids.tobytes() + table.labels.tobytes()
    told = [
        [one.key for one in extractors],
        [shard_set.set_id, xxhash.xxh3_64_hexdigest(rows), views.size],
        [dataclasses.asdict(recipe), config.seeds, config.test_frac],
    ]
    key = xxhash.xxh3_128_hexdigest(json.dumps(told).encode())
    train_heads(
        learners,
        probe_views(
            shard_set.url, views=views, batch_size=min(_PROBE_LOADER_BATCH, shard_set.num_samples)
        ),
        sample_ids=table.sample_ids[: table.examples.num_train],
        labels=table.labels[: table.examples.num_train],
        recipe=recipe,
        seed=config.seeds[0],
        device=ranks.device,
        saved=saved,
        path=f"{FEATURES}/probe-{key}.pt",
        show=show,
    )
    results: Runs = {}
    by_row = iter(learners)
    for row in _rows(list(opened)):
        columns: dict[str, list[Right]] = {f"lr {lr:g}": [] for lr in recipe.lrs}
        for run in range(len(config.seeds)):
            learner, split = next(by_row), table.splits[run % len(table.splits)]
            test = split.test.to(ranks.device)
            guesses = learner.heads.guesses(table.by_name[learner.name][test])
            for column, guess in zip(columns, guesses, strict=True):
                right = guess == table.examples.labels[test]
                columns[column].append(on_split(right, split, len(table.labels)))
        results[row] = {column: np.stack(runs) for column, runs in columns.items()}
    return results


def _evaluation(
    table: ImageTable,
    results: Mapping[str, Runs],
    *,
    trained: Trained,
    store: Store,
    data: _Data,
    config: EvaluateConfig,
) -> Evaluation:
    examples = table.examples
    truth = table.labels[0 if examples.is_one_set else examples.num_train :]
    counts = np.bincount(truth, minlength=examples.num_classes)
    learnt = np.bincount(table.labels[: examples.num_train], minlength=examples.num_classes)
    seen = neighbourhood(table, data.classes, k=config.k[0], temperature=config.temperature)
    return Evaluation(
        url=store.url,
        checkpoint=trained.checkpoint.url,
        step=trained.checkpoint.step,
        backbone=trained.config.model.backbone,
        shards=data.sets[0][0].url,
        test_shards=data.sets[-1][0].url,
        num_images=len(truth),
        num_learnt_from=examples.num_train,
        num_unlabelled=data.num_unknown + sum(one.num_unlabelled for _, one in data.sets),
        num_labels_unused=sum(one.num_unused for _, one in data.sets),
        classes={name: int(counts[number]) for number, name in enumerate(data.classes)},
        majority=float((truth == learnt.argmax()).mean()),
        scores=scores_of(results["kNN"], resamples=config.bootstrap),
        tasks=tuple(_tasks(results, table, config=config)),
        settings=dataclasses.asdict(config),
        grid=seen.grid,
        confusion=seen.confusion,
        neighbours=seen.neighbours,
        failures=seen.failures,
    )


def _tasks(results: Mapping[str, Runs], table: ImageTable, *, config: EvaluateConfig) -> list[Task]:
    parts = (
        "all of --on is learnt from, all of --test-on tested"
        if not table.examples.is_one_set
        else f"{100 * config.test_frac:g} % of each class is tested, another part for each seed"
    )
    how = {
        "linear probe": (
            "SGD on random crops and flips through the frozen encoder in evaluation mode, "
            f"{config.probe_epochs} epochs of batches of {config.probe_batch_size}, a column for "
            f"each learning rate: to pick the best one is to choose on the test images; {parts}."
            if config.probe == "paper"
            else "Logistic regression by L-BFGS on standardised features of the middle crop, its "
            f"penalty chosen on a fifth of the training part; {parts}."
        ),
        "few shots": (
            f"Nearest class mean of so many images a class, by cosine, {config.draws} draws a "
            f"seed; {parts}."
        ),
        "retrieval": (
            f"Whether an image of the same {config.match} is among the nearest 1, 5, 10"
            + ("." if table.examples.is_one_set else ": queries of --test-on, finds of --on.")
        ),
    }
    found = []
    for name in how:
        runs = results.get(name)
        if runs and runs[TRAINED]:
            tested = ~np.isnan(next(iter(runs[TRAINED].values()))).all(0)
            scores = scores_of(runs, resamples=config.bootstrap)
            found.append(
                Task(name=name, how=how[name], num_tested=int(tested.sum()), scores=scores)
            )
    return found
