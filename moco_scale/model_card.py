"""The card beside exported weights: what they are, where they come from, how to load them.

card.json is for programs; README.md says the same to people, and its Python runs as it stands in
the folder.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from moco_scale.card_code import Facts, loading, prose
from moco_scale.config import to_mapping
from pipelines import IMAGE_MEAN, IMAGE_STD

CARD_FILE = "card.json"
PAGE_FILE = "README.md"
CARD_FORMAT = "moco-scale model card"
VERSION = 1
"""Of card.json. A reader refuses another."""

_OF_EVALUATION = (
    "checkpoint", "step", "shards", "test_shards", "num_images", "num_learnt_from", "classes",
    "majority", "scores", "tasks",
)  # fmt: skip
"""What the card takes of an evaluation: nothing about single images."""

_NO_LICENSE = (
    "For the weights no licence is stated. They were learned from the images named above, so what "
    "may be done with them depends on those images' licences; Apache-2.0 is for moco-scale's code."
)


def card_of(facts: Facts) -> dict[str, Any]:
    """The card as JSON-able nested dicts."""
    checkpoint, config = facts.checkpoint, facts.config
    size = config.data.view_size
    return {
        "format": CARD_FORMAT,
        "version": VERSION,
        "export": {
            "format": facts.format,
            "file": facts.file,
            "bytes": len(facts.data),
            "sha256": hashlib.sha256(facts.data).hexdigest(),
            "max_relative_difference": facts.max_relative_difference,
        },
        "encoder": {
            "backbone": config.model.backbone,
            "stem": config.model.stem,
            "features": facts.num_features,
            "parameters": facts.num_parameters,
            "bn_sub_batch": config.model.bn_sub_batch if facts.has_batch_norm else None,
        },
        "input": {
            "size": size,
            "resize": round(size * 8 / 7),
            "channels": "RGB",
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_STD),
        },
        "source": {"run": facts.run_url, "checkpoint": checkpoint.url},
        "data": _shard_sets(facts),
        "training": {
            "steps": checkpoint.step,
            "images_seen": _images_seen(facts),
            "begun_with": _begun_with(facts),
            "world_size": checkpoint.world_size,
            "skipped_steps": checkpoint.skipped_steps,
            "versions": checkpoint.versions,
            "settings": to_mapping(config),
        },
        "evaluation": {
            name: facts.evaluation[name] for name in _OF_EVALUATION if name in facts.evaluation
        }
        if facts.evaluation
        else None,
        "license": facts.license or None,
    }


def page_of(facts: Facts, card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    encoder = card["encoder"]
    sections = [
        f"# {facts.name}, pretrained with MoCo",
        prose(
            f"{encoder['backbone']} of {encoder['parameters']:,} parameters, from RGB images to "
            f"{encoder['features']:,} features each, learned without labels (MoCo, He et al. 2019) "
            "by moco-scale. The features are what enters the head that training used."
        ),
        "## Loading it",
        *loading(facts, card["input"]),
        "## Images",
        _images(card["input"]),
        _batch_norm(card["encoder"]),
        "## Where it comes from",
        _provenance(facts, card),
        "## Scores",
        *_scores(card["evaluation"]),
        "## Licence",
        prose(f"Of the weights: {facts.license}." if facts.license else _NO_LICENSE),
        prose(f"All of this for programs, with every setting of the run: `{CARD_FILE}`."),
    ]
    return "\n\n".join(sections) + "\n"


def _shard_sets(facts: Facts) -> list[dict[str, Any]]:
    """Id and version are those that training read, at this checkpoint."""
    urls = facts.config.data.shards
    read = facts.checkpoint.loader.get("sets") or [{}] * len(urls)
    return [
        {"url": url, "id": one.get("set_id"), "version": one.get("version")}
        for url, one in zip(urls, read, strict=True)
    ]


def _images_seen(facts: Facts) -> int:
    by_step = facts.checkpoint.step * facts.config.data.global_batch_size
    return int(facts.checkpoint.loader.get("position", by_step))


def _begun_with(facts: Facts) -> str | None:
    run = facts.config.run
    return run.init or (run.resume if run.resume not in ("auto", "never") else None)


def _images(taken: Mapping[str, Any]) -> str:
    size = taken["size"]
    mean, std = (", ".join(map(str, taken[name])) for name in ("mean", "std"))
    return _table(
        [
            ("channels", "RGB, in this order, 0 to 1 before they are normalised"),
            ("mean", mean),
            ("standard deviation", std),
            (
                "size",
                f"training views had {size} x {size} px; scores are of the middle {size} px after "
                f"the shorter side was resized to {taken['resize']}",
            ),
        ]
    )


def _batch_norm(encoder: Mapping[str, Any]) -> str:
    count = encoder["bn_sub_batch"]
    if count is None:
        return prose("The backbone has no batch normalisation.")
    return prose(
        "Take features in evaluation mode: batch normalisation then uses its running statistics, "
        f"those of the query encoder. In training it normalised {count} images at a time; where "
        "the whole network is trained on in other batches, train batch normalisation too and "
        "synchronise it, or freeze it."
    )


def _provenance(facts: Facts, card: Mapping[str, Any]) -> str:
    data, model, optim = facts.config.data, facts.config.model, facts.config.optim
    training = card["training"]
    rows = [
        ("run", facts.run_url or "not known"),
        ("checkpoint", facts.checkpoint.url),
        ("begun with", training["begun_with"] or "random weights"),
    ]
    rows += [("shard set", _shard_set(one)) for one in card["data"]]
    rows += [
        ("trained for", f"{training['steps']:,} steps, {training['images_seen']:,} images"),
        ("views", f"recipe {data.recipe}, {data.view_size} px, colour {data.colour}"),
        (
            "method",
            f"{model.dictionary} of {model.queue_size:,}, momentum {model.momentum:g}, temperature "
            f"{model.temperature:g}, {'two layers' if model.mlp_head else 'one layer'} of head, "
            f"embeddings of {model.dim}",
        ),
        (
            "optimizer",
            f"SGD, {data.global_batch_size:,} images a step, learning rate {optim.lr:g} "
            f"({optim.schedule}), momentum {optim.sgd_momentum:g}, weight decay "
            f"{optim.weight_decay:g}",
        ),
        ("seed", str(facts.config.run.seed)),
        ("written by", ", ".join(f"{name} {one}" for name, one in training["versions"].items())),
    ]
    return _table(rows)


def _shard_set(one: Mapping[str, Any]) -> str:
    known = f", id {one['id'][:12]}, version {one['version']}" if one["id"] else ""
    return f"{one['url']}{known}"


def _scores(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return [prose("This checkpoint was not evaluated.")]
    tested = evaluation.get("test_shards") or evaluation["shards"]
    sections = [
        prose(f"kNN accuracy on {evaluation['num_images']:,} images of {tested}:"),
        _accuracies(evaluation["scores"]),
    ]
    for task in evaluation.get("tasks", ()):
        sections += [prose(f"{task['name']}: {task['how']}"), _accuracies(task["scores"])]
    return sections


def _accuracies(scores: Sequence[Mapping[str, Any]]) -> str:
    columns = list(scores[0]["accuracy"])

    def shown(score: Mapping[str, Any], column: str) -> str:
        spread = score.get("spread", {}).get(column)
        accuracy = f"{score['accuracy'][column]:.3f}"
        return accuracy if spread is None else f"{accuracy} \u00b1 {spread:.3f}"

    return _table(
        [[one["features"], *[shown(one, column) for column in columns]] for one in scores],
        ["features", *[f"k = {name}" if name.isdigit() else name for name in columns]],
    )


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("what", "")) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(one.replace('|', '&#124;') for one in row)} |" for row in cells
    )
