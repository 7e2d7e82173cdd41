"""Plan the memory of finetuning a causal language model, for each way to train it.

    python recipes/plan_memory.py gpt2-xl --card_gib 8
    python recipes/plan_memory.py meta-llama/Llama-2-7b-hf --card_gib 24 --context 1024

The model is a name on the hub or a local folder; only its config.json is read. Some names need no
network: the message for an unknown name lists them.

The figures are computed, not measured. A whole training step (forward, backward and the
optimizer's step) of the real model class runs on tensors that have shapes but no memory. The
script follows the bytes of all live tensors (striped_hf/trainer/step_memory.py). The step is
transformers.Trainer's, which holds all logits. --chunked_loss plans the recipes' own loss instead.
1 GiB of the card is left for the CUDA context. The allocator's fragmentation comes on top.

In two rows the script does not run the real code. adamw_bnb_8bit only has the state of
bitsandbytes' optimizer, 2 x 1 byte per parameter and the scales (float32 for embeddings, as Trainer
sets it up). LoRA's adapters, of rank 16 on all linear layers but the output, are this script's own.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from striped_hf.cli import run
from striped_hf.optim import LayerwiseStripedAdamW, StripedAdamW
from striped_hf.pretrained import check_length
from striped_hf.published_configs import NAMES, load_config
from striped_hf.results import markdown_table
from striped_hf.trainer import param_groups
from striped_hf.trainer.step_memory import FakeTraining, Memory, Setting

CONTEXT_GIB = 1  # a card's memory for CUDA and the kernels themselves
LORA_RANK = 16
WEIGHT_DECAY = 0.01

Build = Callable[[Any, Setting], Optimizer]

# -------------------------------------------------------------------------------------------------
# the ways to train
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to train a model.

    Attributes:
        optim: The optimizer's name in TrainingArguments.
        dtype: The dtype of the weights. Float32 weights are trained under bfloat16 autocast.
        build: A function that makes the optimizer.
        layerwise: Whether the optimizer works in the backward pass.
        lora: Whether adapters are trained instead of the weights.
        remark: The reason against a recommendation; empty if the way may be recommended.
    """

    optim: str
    dtype: torch.dtype
    build: Build
    layerwise: bool = False
    lora: bool = False
    remark: str = ""

    @property
    def autocast(self) -> bool:
        """Whether the forward pass is under bfloat16 autocast."""
        return self.dtype == torch.float32 or self.lora


def _adamw(model: Any, setting: Setting) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


class _EightBitAdamW(Optimizer):
    """Has the state of bitsandbytes' AdamW8bit as Trainer sets it up, and computes nothing.

    Both moments are in 8 bits with a float32 scale for each 256 elements. They are float32 for
    parameters of fewer than 4,096 elements and for embeddings.
    """

    def __init__(self, model: Any, setting: Setting) -> None:
        self._embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            coded = param.numel() >= 4096 and param not in self._embeddings
            for name in ("state1", "state2"):
                moment = torch.zeros_like(param, dtype=torch.uint8 if coded else torch.float32)
                self.state[param][name] = moment
                if coded:
                    scales = moment.new_zeros(math.ceil(param.numel() / 256), dtype=torch.float32)
                    self.state[param][f"absmax_{name}"] = scales


def _striped(momentum_dtype: str, model: Any, setting: Setting) -> Optimizer:
    groups = param_groups(model, WEIGHT_DECAY)
    return StripedAdamW(groups, momentum_dtype=momentum_dtype, backend="reference")


def _layerwise(momentum_dtype: str, model: Any, setting: Setting) -> Optimizer:
    return LayerwiseStripedAdamW(
        param_groups(model, WEIGHT_DECAY),
        momentum_dtype=momentum_dtype,
        backend="reference",  # the others need tensors with memory
        max_grad_norm=setting.max_grad_norm,
        gradient_accumulation=setting.accumulation > 1,
    )


def _ways() -> Iterator[Way]:
    """Yields the ways in the order in which they are recommended: by exactness, then by speed."""
    full, half = torch.float32, torch.bfloat16
    exact, eight, four = (partial(_striped, name) for name in ("float32", "int8", "int4"))
    yield Way("adamw_torch_fused", full, _adamw)
    yield Way("striped_adamw", full, exact)
    yield Way("striped_adamw_8bit", full, eight)
    yield Way("adamw_bnb_8bit", full, _EightBitAdamW)
    yield Way("striped_adamw_4bit", full, four)
    yield Way("striped_adamw", half, exact)
    yield Way("striped_adamw_8bit", half, eight)
    yield Way("striped_adamw_8bit_layerwise", half, partial(_layerwise, "int8"), layerwise=True)
    yield Way("striped_adamw_4bit", half, four)
    yield Way("striped_adamw_4bit_layerwise", half, partial(_layerwise, "int4"), layerwise=True)
    nearest = "rounds to nearest, which loses most updates at finetuning's learning rates"
    yield Way("adamw_torch_fused", half, _adamw, remark=nearest)
    yield Way("adamw_torch_fused", half, _adamw, lora=True, remark="trains adapters only")


WAYS = tuple(_ways())


class _Adapter(nn.Module):
    """A linear layer with LoRA's adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        columns, rows = layer.weight.shape
        if not isinstance(layer, Conv1D):
            columns, rows = rows, columns
        self.down = nn.Parameter(layer.weight.new_empty(LORA_RANK, columns, dtype=torch.float32))
        self.up = nn.Parameter(layer.weight.new_empty(rows, LORA_RANK, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(x)
        adapted = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return (result + adapted).to(result.dtype)


def add_adapters(model: Any) -> None:
    """Freezes a model and gives each linear layer but the output an adapter."""
    model.requires_grad_(False)
    output = model.get_output_embeddings()
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, (nn.Linear, Conv1D)) and child is not output
    ]
    for parent, name, child in layers:
        setattr(parent, name, _Adapter(child))


# -------------------------------------------------------------------------------------------------
# the plan
# -------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """The memory that a way needs, with or without gradient checkpointing."""

    way: Way
    setting: Setting
    memory: Memory

    def fits(self, card_gib: float) -> bool:
        """Tells whether a card has the memory for it beside the CUDA context."""
        return self.memory.total <= (card_gib - CONTEXT_GIB) * 2**30


def plan(
    config: PretrainedConfig,
    setting: Setting,
    ways: Sequence[Way] = WAYS,
    checkpointing: Sequence[bool] = (False, True),
) -> list[Plan]:
    """Computes the memory that each way needs.

    Args:
        config: The model's configuration.
        setting: The settings of the training, except gradient checkpointing.
        ways: The ways to plan.
        checkpointing: False plans without gradient checkpointing, True with it.

    Raises:
        UserError: The model cannot run on fake tensors.
    """
    # An ordinary optimizer's state is the same before and after the passes, and the passes are the
    # same for all ordinary optimizers. So the passes run once for each dtype, and each optimizer
    # steps once.
    steps: dict[Way, Memory] = {}
    passes: dict[Any, tuple[FakeTraining, Memory]] = {}
    found: dict[tuple[Way, bool], Plan] = {}
    for checkpoints in checkpointing:
        setting = replace(setting, gradient_checkpointing=checkpoints)
        for way in ways:
            training = partial(
                *(FakeTraining, config, way.dtype, setting, way.autocast),
                prepare=add_adapters if way.lora else None,
            )
            build = partial(_build, way, setting)
            if way.layerwise:
                memory = training().passes_and_step(build)
            else:
                key = (way.dtype, way.lora, checkpoints)
                if key not in passes:
                    model = training()
                    passes[key] = model, model.passes()
                model, of_passes = passes[key]
                if way not in steps:
                    steps[way] = model.step(build)
                of_step = steps[way]
                of_passes = of_passes._replace(state=of_step.state)
                memory = max(of_passes, of_step, key=lambda each: each.total)
            found[way, checkpoints] = Plan(way, setting, memory)
    return [found[way, checkpoints] for way in ways for checkpoints in checkpointing]


def _build(way: Way, setting: Setting, model: Any) -> Optimizer:
    return way.build(model, setting)


def recommended(plans: list[Plan], card_gib: float) -> Plan | None:
    """Returns the first plan that fits a card and trains all weights without losing updates."""
    fitting = (each for each in plans if not each.way.remark and each.fits(card_gib))
    return next(fitting, None)


# -------------------------------------------------------------------------------------------------
# what is printed
# -------------------------------------------------------------------------------------------------


def render(plans: list[Plan], card_gib: float) -> str:
    """Makes the Markdown table of the memory that each way needs."""
    header = (
        *("optim", "weights are", "gradient checkpointing", "weights", "gradients", "state"),
        *("optimizer's buffers", "activations", "peak, GiB", f"fits {card_gib:g} GiB"),
    )
    rows = []
    for each in plans:
        sizes = (*each.memory, each.memory.total)
        row = (
            f"`{each.way.optim}`" + (" on LoRA" if each.way.lora else ""),
            _name(each.way.dtype),
            "yes" if each.setting.gradient_checkpointing else "no",
            *(f"{size / 2**30:.2f}" for size in sizes),
            "yes" if each.fits(card_gib) else "no",
        )
        rows.append(row)
    return markdown_table(header, rows)


def command(each: Plan, name: str) -> str:
    """Returns the Python lines and the flags that train a model in a way."""
    setting, way = each.setting, each.way
    flags = {
        "optim": way.optim,
        "per_device_train_batch_size": setting.batch_size,
        "gradient_accumulation_steps": setting.accumulation,
        **({"bf16": True} if way.autocast else {}),
        **({"gradient_checkpointing": True} if setting.gradient_checkpointing else {}),
    }
    arguments = ", ".join(f"{key}={value!r}" for key, value in flags.items())
    dtype = _name(way.dtype)
    recipe = {"model_name_or_path": name, "dtype": dtype, "block_size": setting.context, **flags}
    shell = " ".join(f"--{key} {value}" for key, value in recipe.items())
    return (
        f'    model = AutoModelForCausalLM.from_pretrained("{name}", dtype="{dtype}")\n'
        f"    args = TrainingArguments({arguments})\n"
        "or\n"
        f"    python recipes/finetune_shakespeare.py {shell}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def advice(plans: list[Plan], card_gib: float, name: str) -> str:
    """Returns the recommendation, or advice if no way fits."""
    best = recommended(plans, card_gib)
    if best is not None:
        checkpointing = "with" if best.setting.gradient_checkpointing else "without"
        return (
            f"Recommended: `{best.way.optim}` on {_name(best.way.dtype)} weights {checkpointing} "
            "gradient checkpointing, the first way that fits in the order of exactness and then "
            f"speed:\n\n{command(best, name)}"
        )
    smallest = min((each for each in plans if not each.way.remark), key=lambda p: p.memory.total)
    gib = math.ceil(smallest.memory.total / 2**30 + CONTEXT_GIB)
    lora = " LoRA does." if any(p.way.lora and p.fits(card_gib) for p in plans) else ""
    return (
        f"Nothing that trains all weights fits {card_gib:g} GiB. The least is "
        f"`{smallest.way.optim}` on a card of {gib} GiB, or a shorter --context or a smaller "
        f"--batch.{lora}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = f"a hub name, a local folder, or one of {', '.join(NAMES)}"
    parser.add_argument("model", help=known)
    parser.add_argument("--card_gib", type=float, default=24.0, help="memory of the GPU, in GiB")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a forward pass")
    parser.add_argument(
        "--accumulation", type=int, default=1, metavar="N", help="passes in one optimizer step"
    )
    parser.add_argument(
        "--chunked_loss", action="store_true", help="the loss of the recipes, not of plain Trainer"
    )
    args = parser.parse_args()
    for flag in ("context", "batch", "accumulation"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: pass a number above 0")
    if args.card_gib <= CONTEXT_GIB:
        parser.error(f"--card_gib {args.card_gib:g}: pass more than the {CONTEXT_GIB} GiB of CUDA")
    return args


def main() -> None:
    args = parse_arguments()
    config = load_config(args.model)
    check_length("--context", args.context, args.model, config)
    setting = Setting(
        batch_size=args.batch,
        context=args.context,
        accumulation=args.accumulation,
        chunked_loss=args.chunked_loss,
    )
    plans = plan(config, setting)
    loss = "the recipes' chunked loss" if args.chunked_loss else "all logits in memory"
    print(
        f"{args.model}: {args.batch} x {args.context:,} tokens a pass, {args.accumulation} "
        f"{'passes' if args.accumulation > 1 else 'pass'} a step, {loss}. GiB at the peak:\n\n"
        f"{render(plans, args.card_gib)}\n"
    )
    for way in WAYS:
        if way.remark:
            kind = "on LoRA adapters" if way.lora else f"on {_name(way.dtype)} weights"
            print(f"`{way.optim}` {kind} {way.remark}.")
    print(
        "Computed on tensors without memory, not measured on a GPU. "
        f"{CONTEXT_GIB} GiB of the card is left for CUDA; fragmentation comes on top.\n\n"
        f"{advice(plans, args.card_gib, args.model)}"
    )


if __name__ == "__main__":
    run(main)
