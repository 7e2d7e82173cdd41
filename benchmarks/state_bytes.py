"""Count the bytes of optimizer state of GPT-2's four sizes, without allocating them.

    python -m benchmarks.state_bytes

AdamW keeps two float32 numbers per parameter. For StripedAdamW, the script initializes the state on
torch's meta device, with Trainer's param groups, and counts the bytes of its tensors.
"""

import torch
from torch import nn

from benchmarks.model_shapes import meta_model
from striped_hf.optim import StripedAdamW
from striped_hf.optim.momentum import MOMENTUM_DTYPES
from striped_hf.optim.state import description_of, zero_state
from striped_hf.published_configs import GPT2_SIZES
from striped_hf.results import environment, markdown_table, write_json
from striped_hf.trainer import param_groups

RESULTS = "benchmarks/results/state_bytes.json"


def count(model: nn.Module, momentum_dtype: str) -> int:
    """Returns the bytes of StripedAdamW's state for a model on the meta device."""
    optimizer = StripedAdamW(param_groups(model, weight_decay=0.1), momentum_dtype=momentum_dtype)
    return sum(
        value.nbytes
        for group in optimizer.param_groups
        for position in range(len(group["params"]))
        for value in zero_state(description_of(group, position), torch.device("meta")).values()
    )


def render(results: dict) -> str:
    """Makes the Markdown table of a results file."""
    header = ("model", "parameters", "AdamW", *(f"striped, {d}" for d in MOMENTUM_DTYPES))
    rows = [
        (
            f"`{model['name']}`",
            f"{model['parameters']:,}",
            *(
                f"{size / 2**20:,.0f} MiB ({size / model['parameters']:.2f})"
                for size in (model["adamw"], *(model[d] for d in MOMENTUM_DTYPES))
            ),
        )
        for model in results["models"]
    ]
    return markdown_table(header, rows)


def main() -> None:
    models = []
    for name in GPT2_SIZES:
        model = meta_model(name)
        parameters = model.num_parameters()
        counts = {dtype: count(model, dtype) for dtype in MOMENTUM_DTYPES}
        models.append({"name": name, "parameters": parameters, "adamw": 8 * parameters, **counts})
    results = {"environment": environment(), "models": models}
    write_json(RESULTS, results)
    print(render(results))


if __name__ == "__main__":
    main()
