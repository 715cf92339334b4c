"""An evaluation as one self-contained HTML page: tables, confusions, neighbours, failures."""

from dataclasses import dataclass
from typing import Literal

from moco_scale.evaluation import Evaluation, Failure, Score
from moco_scale.pages import render
from moco_scale.pictures import Picture, pictures_of
from moco_scale.subject import FRESH, TRAINED
from shards import ShardSet

_MOST_CLASSES = 30
_MOST_PAIRS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One measure, for people."""

    name: str
    how: str
    columns: list[str]
    """Titles of the scores' columns."""
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictured:
    """What there is to look at; images that cannot be decoded are left out."""

    failures: list[tuple[Failure, Picture, list[Picture]]]
    """Each with its image and the nearest that voted."""
    neighbours: list[tuple[Picture, list[Picture]]]
    """Images, and the nearest of each."""


def build_page(evaluation: Evaluation, *, loader: Literal["auto", "dali", "cpu"]) -> str:
    """The page as HTML. Names come from buckets and lists, and are escaped wherever shown."""
    return render(
        "evaluation.html",
        evaluation=evaluation,
        is_one_set=evaluation.shards == evaluation.test_shards,
        tables=tables_of(evaluation),
        tiles=_tiles(evaluation),
        has_fresh=any(score.features == FRESH for score in evaluation.scores),
        best_of_grid=max(accuracy for row in evaluation.grid.values() for accuracy in row.values()),
        confused=most_confused(evaluation),
        matrix=_matrix(evaluation),
        pictured=pictured(evaluation, loader=loader),
    )


def pictured(evaluation: Evaluation, *, loader: Literal["auto", "dali", "cpu"]) -> Pictured:
    """Failures and nearest neighbours, drawn again out of the sets that were evaluated on.

    Raises:
        UserError: the sets are no longer there.
    """
    learnt, tested = ShardSet.open(evaluation.shards), ShardSet.open(evaluation.test_shards)
    near = {int(query): found for query, found in evaluation.neighbours.items()}
    wanted = {sample for query, found in near.items() for sample in (query, *found)}
    wanted |= {sample for failure in evaluation.failures for sample in failure.neighbours}
    failed = {failure.sample_id for failure in evaluation.failures}
    pictures = pictures_of(learnt, wanted, loader=loader)
    tests = pictures_of(tested, failed, loader=loader) if failed else {}

    def shown(samples: list[int]) -> list[Picture]:
        return [pictures[sample] for sample in samples if sample in pictures]

    return Pictured(
        failures=[
            (failure, tests[failure.sample_id], shown(failure.neighbours))
            for failure in evaluation.failures
            if failure.sample_id in tests
        ],
        neighbours=[
            (pictures[query], shown(found)) for query, found in near.items() if query in pictures
        ],
    )


def most_confused(evaluation: Evaluation) -> list[tuple[str, str, int]]:
    """Label, the name that kNN gave instead, and images."""
    return [cell for cell in evaluation.confusion if cell[0] != cell[1]][:_MOST_PAIRS]


def tables_of(evaluation: Evaluation) -> list[Table]:
    """kNN first, then the other measures."""
    settings = evaluation.settings
    how = (
        "Every image is left out in its turn and named by its nearest"
        if evaluation.shards == evaluation.test_shards
        else f"Every image of --test-on is named by the nearest of {evaluation.num_learnt_from:,}"
    )
    knn = Table(
        name="Nearest neighbours (kNN)",
        how=f"{how}, by cosine; a vote weighs exp(cosine / {settings['temperature']}).",
        columns=[f"k = {k}" for k in evaluation.scores[0].accuracy],
        scores=evaluation.scores,
    )
    return [knn] + [
        Table(
            name=task.name.capitalize(),
            how=f"{task.how} {task.num_tested:,} images tested.",
            columns=[
                f"{column} a class" if task.name == "few shots" else column
                for column in task.scores[0].accuracy
            ],
            scores=task.scores,
        )
        for task in evaluation.tasks
    ]


def _tiles(evaluation: Evaluation) -> list[tuple[str, str]]:
    tiles = [
        (f"{evaluation.num_images:,}", "images tested"),
        (f"{len(evaluation.classes):,}", "classes"),
        (f"{evaluation.majority:.3f}", "always the largest class"),
    ]
    for name, scores in [("kNN", evaluation.scores)] + [
        (task.name, task.scores) for task in evaluation.tasks
    ]:
        (trained,) = (score for score in scores if score.features == TRAINED)
        column, accuracy = next(iter(trained.accuracy.items()))
        named = {"kNN": f"k = {column}", "few shots": f"{column} a class"}.get(name, column)
        tiles.append((f"{accuracy:.3f}", f"{name}, {named}"))
    return tiles


def _matrix(evaluation: Evaluation) -> list[tuple[str, list[tuple[int, float]]]]:
    """A row a class: images and part of the row for each guess; empty with many classes."""
    classes = [name for name, count in evaluation.classes.items() if count]
    if len(classes) > _MOST_CLASSES:
        return []
    counts = {(label, guess): count for label, guess, count in evaluation.confusion}
    rows = [(label, [counts.get((label, guess), 0) for guess in classes]) for label in classes]
    return [
        (label, [(count, count / evaluation.classes[label]) for count in row])
        for label, row in rows
    ]
