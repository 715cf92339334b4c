"""How exported weights are loaded: the lines of code that their card shows.

They run as they stand in the folder of the weights.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moco_scale.checkpoint import Checkpoint
from moco_scale.config import TrainConfig
from moco_scale.encoders import TIMM
from pipelines import IMAGE_MEAN, IMAGE_STD


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the card is made of."""

    format: str
    file: str
    """Name of the weights' file."""
    data: bytes
    """Its content."""
    max_relative_difference: float
    run_url: str
    checkpoint: Checkpoint
    config: TrainConfig
    evaluation: dict[str, Any] | None
    license: str
    num_features: int
    num_parameters: int
    """Without the head's."""
    has_batch_norm: bool
    head_path: str
    """Where the backbone's library has its last layer."""

    @property
    def name(self) -> str:
        """The backbone's name in its library."""
        return self.config.model.backbone.removeprefix(TIMM)


def loading(facts: Facts, taken: Mapping[str, Any]) -> list[str]:
    """Sections of Markdown that say how the file is loaded.

    Args:
        taken: the card's "input".
    """
    how_near = (
        "its features of random images differed from the run's by at most "
        f"{facts.max_relative_difference:g} of the largest."
    )
    if facts.format == "detectron2":
        return [
            prose(
                "In a configuration of detectron2; the order of colours and the place of the "
                "stride are this model's, not detectron2's defaults. Train its batch "
                "normalisation, and that of what is new, over all GPUs:"
            ),
            _block("yaml", detectron2_settings(facts.name, facts.file)),
            prose(
                "Names are those of detectron2's converter (tools/convert-torchvision-to-d2.py). "
                f"Before it was written it was read back into torchvision's {facts.name}; "
                f"{how_near}"
            ),
        ]
    lines = {
        "torchvision": _torchvision_lines,
        "timm": _timm_lines,
        "safetensors": _safetensors_lines,
        "onnx": _onnx_lines,
        "official": _official_lines,
    }[facts.format](facts)
    sections = [
        _block("python", lines),
        _block("python", _using_lines(taken)),
        prose(f"Before it was written it was loaded so; {how_near}"),
    ]
    if facts.format == "official":
        sections.append(
            prose(
                "The published linear probe takes it as it is: `main_lincls.py --pretrained "
                f"{facts.file} -a {facts.name}`; 'moco-scale import' makes a run of it."
            )
        )
    return sections


def _torchvision_lines(facts: Facts) -> list[str]:
    return [
        "import torch",
        "import torchvision",
        "",
        f'model = torchvision.models.get_model("{facts.name}", weights=None)',
        *_headless_lines(facts),
        f'model.load_state_dict(torch.load("{facts.file}", weights_only=True))',
        "model.eval()",
    ]


def _timm_lines(facts: Facts) -> list[str]:
    return [
        "import timm",
        "",
        f'model = timm.create_model("{facts.name}", num_classes=0, checkpoint_path="{facts.file}")',
        "model.eval()",
    ]


def _safetensors_lines(facts: Facts) -> list[str]:
    is_timm = facts.config.model.backbone.startswith(TIMM)
    return [
        "import safetensors.torch",
        *(["import timm", "import torch"] if is_timm else ["import torch", "import torchvision"]),
        "",
        f'model = timm.create_model("{facts.name}")'
        if is_timm
        else f'model = torchvision.models.get_model("{facts.name}", weights=None)',
        *_headless_lines(facts),
        f'model.load_state_dict(safetensors.torch.load_file("{facts.file}"))',
        "model.eval()",
    ]


def _onnx_lines(facts: Facts) -> list[str]:
    return [
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{facts.file}")',
        "",
        "",
        "def model(images):  # any number of them",
        '    return session.run(["features"], {"images": images.numpy()})[0]',
    ]


def _official_lines(facts: Facts) -> list[str]:
    return [
        "import torch",
        "import torchvision",
        "",
        'prefix = "module.encoder_q."',
        f'state = torch.load("{facts.file}", weights_only=True)["state_dict"]',
        "body = {",
        "    name.removeprefix(prefix): tensor",
        "    for name, tensor in state.items()",
        '    if name.startswith(prefix) and not name.startswith(f"{prefix}fc.")',
        "}",
        f"model = torchvision.models.{facts.name}()",
        *_headless_lines(facts),
        "model.load_state_dict(body)",
        "model.eval()",
    ]


def _headless_lines(facts: Facts) -> list[str]:
    at = "".join(
        f"[{name}]" if name.isdigit() else f".{name}" for name in facts.head_path.split(".")
    )
    lines = [f"model{at} = torch.nn.Identity()  # where the head was"]
    if facts.config.model.stem == "cifar":
        width = "model.conv1.out_channels"
        lines += [
            "# The first layers are those for small images.",
            f"model.conv1 = torch.nn.Conv2d(3, {width}, 3, stride=1, padding=1, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
    return lines


def _using_lines(taken: Mapping[str, Any]) -> list[str]:
    return [
        "import torch",
        "from PIL import Image",
        "from torchvision.transforms import v2",
        "",
        "prepare = v2.Compose(",
        "    [",
        "        v2.ToImage(),",
        f"        v2.Resize({taken['resize']}),",
        f"        v2.CenterCrop({taken['size']}),",
        "        v2.ToDtype(torch.float32, scale=True),",
        f"        v2.Normalize(mean={taken['mean']}, std={taken['std']}),",
        "    ]",
        ")",
        'images = prepare(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)',
        "with torch.no_grad():",
        "    features = model(images)",
    ]


def detectron2_settings(name: str, file: str) -> list[str]:
    """Lines of YAML for detectron2, after the published code's detection/configs."""
    depth = int(re.sub(r"^(wide_)?resne[x]?t(\d+).*", r"\2", name))
    special = []
    if depth < 50:
        special = ["RES2_OUT_CHANNELS: 64"]
    elif name.startswith("wide_"):
        special = ["WIDTH_PER_GROUP: 128"]
    elif name.startswith("resnext"):
        groups, width = re.findall(r"_(\d+)x(\d+)d", name)[0]
        special = [f"NUM_GROUPS: {groups}", f"WIDTH_PER_GROUP: {width}"]
    return [
        "MODEL:",
        f"  WEIGHTS: {file}",
        f"  PIXEL_MEAN: {[round(255 * value, 3) for value in IMAGE_MEAN]}",
        f"  PIXEL_STD: {[round(255 * value, 3) for value in IMAGE_STD]}",
        "  BACKBONE:",
        "    FREEZE_AT: 0",
        "  RESNETS:",
        f"    DEPTH: {depth}",
        *[f"    {setting}" for setting in special],
        "    STRIDE_IN_1X1: False",
        "    NORM: SyncBN",
        "INPUT:",
        "  FORMAT: RGB",
    ]


def _block(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def prose(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
