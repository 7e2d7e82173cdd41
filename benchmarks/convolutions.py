"""Count the bytes of optimizer state of convolutional models and of single shapes.

    python -m benchmarks.convolutions

Nothing is allocated: the models are built on torch's meta device from their configurations in
transformers. The UNet of diffusers' example for unconditional image generation is here by its
shapes.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
)

from benchmarks import state_bytes
from striped_hf.optim.matrix import readings, stepped_shape
from striped_hf.optim.momentum import MOMENTUM_DTYPES
from striped_hf.optim.state import init_state
from striped_hf.results import environment, markdown_table, write_json

RESULTS = "benchmarks/results/state_bytes_convolutions.json"

# how many parameters of each shape
UNET2D = {
    (3,): 1,
    (128,): 72,
    (256,): 79,
    (384,): 4,
    (512,): 126,
    (768,): 4,
    (1024,): 10,
    (128, 512): 10,
    (256, 512): 10,
    (512, 128): 1,
    (512, 512): 37,
    (128, 256, 1, 1): 5,
    (128, 384, 1, 1): 1,
    (256, 128, 1, 1): 1,
    (256, 384, 1, 1): 1,
    (256, 512, 1, 1): 4,
    (256, 768, 1, 1): 1,
    (512, 256, 1, 1): 1,
    (512, 768, 1, 1): 1,
    (512, 1024, 1, 1): 5,
    (3, 128, 3, 3): 1,
    (128, 3, 3, 3): 1,
    (128, 128, 3, 3): 17,
    (128, 256, 3, 3): 5,
    (128, 384, 3, 3): 1,
    (256, 128, 3, 3): 1,
    (256, 256, 3, 3): 17,
    (256, 384, 3, 3): 1,
    (256, 512, 3, 3): 4,
    (256, 768, 3, 3): 1,
    (512, 256, 3, 3): 1,
    (512, 512, 3, 3): 20,
    (512, 768, 3, 3): 1,
    (512, 1024, 3, 3): 5,
}

# what has which shape, for the table in docs/algorithm.md
SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("`Conv2d`, 3 x 3", (256, 128, 3, 3)),
    ("`Conv2d`, 1 x 1", (1280, 320, 1, 1)),
    ("`Conv2d`, depthwise", (96, 1, 3, 3)),
    ("`Conv1d`", (512, 512, 10)),
    ("`Conv1d`, depthwise", (512, 1, 31)),
    ("`Conv3d`", (64, 32, 3, 3, 3)),
    ("patch embedding", (768, 3, 16, 16)),
    ("patch embedding, video", (1024, 3, 2, 14, 14)),
    ("experts", (8, 4096, 14336)),
    ("adapters of rank 16", (8, 4096, 16)),
    ("one matrix a head", (12, 64, 64)),
    ("position embedding", (1, 197, 768)),
    ("position embedding, 2-D", (1, 768, 14, 14)),
    ("class token", (1, 1, 768)),
    ("layer scale", (96, 1, 1)),
]


def models() -> Iterator[tuple[str, nn.Module]]:
    """Yields models of convolutions on the meta device, with their names."""
    yield "MobileNetV2", MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000))
    b0 = EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, num_labels=1000
    )
    yield "EfficientNet-B0", EfficientNetForImageClassification(b0)
    yield "ResNet-50", ResNetForImageClassification(ResNetConfig(num_labels=1000))
    yield "ConvNeXt-T", ConvNextForImageClassification(ConvNextConfig(num_labels=1000))
    yield "Wav2Vec2-Conformer", Wav2Vec2ConformerForCTC(Wav2Vec2ConformerConfig(vocab_size=32))
    params = [torch.empty(shape) for shape, count in UNET2D.items() for _ in range(count)]
    yield "UNet2D", nn.ParameterList(params)


def bytes_of_shape(shape: tuple[int, ...], momentum_dtype: str) -> int:
    """Returns the bytes of state of a parameter of which only the shape is known."""
    state = init_state(torch.empty(shape, device="meta"), momentum_dtype, (1, 1))
    return sum(value.nbytes for key, value in state.items() if key != "step")


def reading(shape: tuple[int, ...]) -> str:
    """Returns how a parameter of three or more dimensions is read by its shape."""
    stepped = stepped_shape(torch.Size(shape), (1, 1))
    return next(name for name, each in readings(torch.Size(shape)).items() if each == stepped)


def render_models(results: dict) -> str:
    """Makes the Markdown table of the models."""
    return state_bytes.render(results)


def render_shapes(results: dict) -> str:
    """Makes the Markdown table of the shapes."""
    header = ("parameter", "shape", "read as", "numbers of the second moment", "of AdamW's")
    rows = []
    for each in results["shapes"]:
        shape, stepped = torch.Size(each["shape"]), torch.Size(each["stepped"])
        numbers = each["second_moment"]
        rows.append(
            (
                each["parameter"],
                str(list(shape)),
                f"{each['reading']} {list(stepped)}",
                f"{numbers:,}",
                f"{numbers / shape.numel():.2%}",
            )
        )
    return markdown_table(header, rows)


def main() -> None:
    counted = []
    with torch.device("meta"):
        for name, model in models():
            parameters = sum(param.numel() for param in model.parameters())
            counts = {dtype: state_bytes.count(model, dtype) for dtype in MOMENTUM_DTYPES}
            counted.append(
                {"name": name, "parameters": parameters, "adamw": 8 * parameters, **counts}
            )
    shapes = [
        {
            "parameter": parameter,
            "shape": list(shape),
            "reading": reading(shape),
            "stepped": list(stepped_shape(torch.Size(shape), (1, 1))),
            # what float32 momentum leaves of the state is the second moment
            "second_moment": bytes_of_shape(shape, "float32") // 4 - torch.Size(shape).numel(),
        }
        for parameter, shape in SHAPES
    ]
    results = {"environment": environment(), "models": counted, "shapes": shapes}
    write_json(RESULTS, results)
    print(render_models(results), render_shapes(results), sep="\n\n")


if __name__ == "__main__":
    main()
