"""The formats of an export: what each holds, what it is for, and how its library loads it.

The names of weights are those of the backbone's library. Nine ResNets have the same ones in
torchvision and in timm, and the published MoCo code and detectron2 know those.
"""

import importlib
import io
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from moco_scale.encoders import TIMM, build_headless
from moco_scale.errors import ExportError
from moco_scale.model import ModelConfig

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
"""Of one architecture and the same names of weights in torchvision and in timm."""

ONNX_OPSET = 18
_PREFIX = "module.encoder_q."

Features = Callable[[Tensor], Tensor]
"""N x 3 x S x S to N x D."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """What an export is made of."""

    model: ModelConfig
    view_size: int
    body: dict[str, Tensor]
    """Weights of the query encoder without its head, under their library's names."""
    state: dict[str, Tensor]
    """All that training keeps, by published name."""
    epoch: int

    @property
    def name(self) -> str:
        """The backbone's name in its library."""
        return self.model.backbone.removeprefix(TIMM)

    @property
    def has_common_names(self) -> bool:
        """Whether it is one of RESNETS as it stands."""
        return self.name in RESNETS and self.model.stem == "imagenet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One way to write an encoder down."""

    suffix: str
    """Of the file."""
    needs: tuple[str, ...]
    """Packages that are not there in every installation."""
    domain: str
    """Which backbones it is for."""
    fits: Callable[[Encoder], bool]
    write: Callable[[Encoder], bytes]
    read: Callable[[bytes, Encoder], Features]
    """Load it as its library does."""
    tolerance: float = 1e-5
    """Largest difference of a feature that is borne, relative to the largest feature."""


def fitting(encoder: Encoder) -> list[str]:
    """Formats that this encoder can be written in."""
    return [name for name, format in FORMATS.items() if format.fits(encoder)]


def check_format(name: str, encoder: Encoder) -> Format:
    """The format of this name.

    Raises:
        ExportError: it is not for this encoder, or a library that it takes is missing.
    """
    format = FORMATS[name]
    if not format.fits(encoder):
        stem = "" if encoder.model.stem == "imagenet" else f" with model.stem {encoder.model.stem}"
        raise ExportError(
            f"{name} is for {format.domain}, not for {encoder.model.backbone}{stem}; "
            f"formats for it: {', '.join(fitting(encoder))}"
        )
    for package in format.needs:
        try:
            importlib.import_module(package)
        except ImportError as err:
            raise ExportError(f"{name} needs {package}: pip install 'moco-scale[export]'") from err
    return format


def detectron2_name(name: str) -> str:
    """detectron2's name of a torchvision ResNet's weight.

    After tools/convert-torchvision-to-d2.py of detectron2.
    """
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"\blayer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _torchvision_name(name: str) -> str:
    """The other way."""
    name = name.removeprefix("stem.").replace("shortcut.norm", "downsample.1")
    name = re.sub(r"conv(\d)\.norm", r"bn\1", name.replace("shortcut", "downsample.0"))
    return re.sub(r"\bres(\d)", lambda found: f"layer{int(found[1]) - 1}", name)


def _loaded(model: nn.Module, weights: Mapping[str, Tensor]) -> Features:
    model.load_state_dict(weights, strict=True)
    return model.eval()


def _of_torchvision(encoder: Encoder) -> nn.Module:
    return build_headless(replace(encoder.model, backbone=encoder.name))


def _write_pth(encoder: Encoder) -> bytes:
    written = io.BytesIO()
    torch.save(encoder.body, written)
    return written.getvalue()


def _read_pth(data: bytes, encoder: Encoder) -> Features:
    weights = torch.load(io.BytesIO(data), weights_only=True)
    return _loaded(_of_torchvision(encoder), weights)


def _write_safetensors(encoder: Encoder) -> bytes:
    import safetensors.torch  # deferred: an extra

    return safetensors.torch.save(encoder.body, metadata={"format": "pt"})


def _read_safetensors(data: bytes, encoder: Encoder) -> Features:
    import safetensors.torch  # deferred: an extra

    return _loaded(build_headless(encoder.model), safetensors.torch.load(data))


def _read_timm(data: bytes, encoder: Encoder) -> Features:
    import safetensors.torch  # deferred: extras, and timm is slow to import
    import timm

    model = timm.create_model(encoder.name, num_classes=0)
    return _loaded(model, safetensors.torch.load(data))


def _write_detectron2(encoder: Encoder) -> bytes:
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in encoder.body.items()}
    content = {"model": arrays, "__author__": "moco-scale", "matching_heuristics": True}
    # numpy 1, which most of detectron2's users have, does not know the module's name in numpy 2,
    # which knows the old one. In protocol 3 a name is a line of its own, and written once.
    pickled = pickle.dumps(content, protocol=3)
    return pickled.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)


def _read_detectron2(data: bytes, encoder: Encoder) -> Features:
    arrays: dict[str, Any] = pickle.loads(data)["model"]  # our own, of a moment ago
    weights = {
        _torchvision_name(name): torch.from_numpy(np.asarray(array))
        for name, array in arrays.items()
    }
    return _loaded(_of_torchvision(encoder), weights)


def _write_official(encoder: Encoder) -> bytes:
    written = io.BytesIO()
    content = {
        "epoch": encoder.epoch,
        "arch": encoder.name,
        "state_dict": {f"module.{name}": tensor for name, tensor in encoder.state.items()},
        "format": "moco-scale official",  # tells `load_published` who moved the key encoder
    }
    torch.save(content, written)
    return written.getvalue()


def _read_official(data: bytes, encoder: Encoder) -> Features:
    state = torch.load(io.BytesIO(data), weights_only=True)["state_dict"]
    body = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(_PREFIX) and not name.startswith(f"{_PREFIX}fc.")
    }
    model = torchvision.models.get_model(encoder.name, weights=None)
    model.fc = nn.Identity()
    return _loaded(model, body)


def _write_onnx(encoder: Encoder) -> bytes:
    model = build_headless(encoder.model)
    _loaded(model, encoder.body)
    size = encoder.view_size
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        opset_version=ONNX_OPSET,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    _forget_sources(proto)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _forget_sources(proto: Any) -> None:
    """Take out the notes of which line of which file on this machine each node came from."""
    for part in (proto, *_parts(proto.graph), *proto.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    for function in proto.functions:
        for node in function.node:
            del node.metadata_props[:]


def _parts(graph: Any) -> Iterator[Any]:
    yield graph
    for kind in ("node", "input", "output", "value_info", "initializer"):
        yield from getattr(graph, kind)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _parts(attribute.g)


def _read_onnx(data: bytes, _encoder: Encoder) -> Features:
    import onnxruntime  # deferred: an extra

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _is_common(encoder: Encoder) -> bool:
    return encoder.has_common_names


FORMATS: Mapping[str, Format] = {
    "torchvision": Format(
        suffix=".pth",
        needs=(),
        domain="torchvision's models",
        fits=lambda one: one.has_common_names or not one.model.backbone.startswith(TIMM),
        write=_write_pth,
        read=_read_pth,
    ),
    "timm": Format(
        suffix=".safetensors",
        needs=("timm", "safetensors"),
        domain="timm's models and torchvision's ResNets",
        fits=lambda one: (
            one.model.stem == "imagenet"
            and (one.has_common_names or one.model.backbone.startswith(TIMM))
        ),
        write=_write_safetensors,
        read=_read_timm,
    ),
    "detectron2": Format(
        suffix=".pkl",
        needs=(),
        domain="ResNets",
        fits=_is_common,
        write=_write_detectron2,
        read=_read_detectron2,
    ),
    "safetensors": Format(
        suffix=".safetensors",
        needs=("safetensors",),
        domain="all",
        fits=lambda _: True,
        write=_write_safetensors,
        read=_read_safetensors,
    ),
    "onnx": Format(
        suffix=".onnx",
        needs=("onnx", "onnxscript", "onnxruntime"),
        tolerance=1e-4,
        domain="all",
        fits=lambda _: True,
        write=_write_onnx,
        read=_read_onnx,
    ),
    "official": Format(
        suffix=".pth.tar",
        needs=(),
        domain="ResNets",
        fits=_is_common,
        write=_write_official,
        read=_read_official,
    ),
}
