"""Trainer and accelerate under FSDP2 on CPU processes, by a shim.

THE SHIM: accelerate turns FSDP on only for accelerators. On CPUs it trains with DDP, without a
warning. ``shim`` makes accelerate treat CPU processes as accelerators in this one respect. All code
behind it (sharding, the optimizer's switch to DTensors, checkpoints, resuming) is accelerate's and
Trainer's.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import striped_hf  # noqa: F401
from striped_hf.optim import StripedAdamW
from striped_hf.trainer import param_groups


def shim() -> None:
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args, fsdp_plugin=None, **kwargs) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:  # each new state resets it
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


class Windows(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(61, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def new_model() -> GPT2LMHeadModel:
    set_seed(1)
    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 18, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def through_trainer(state_dict_type: str, mesh: DeviceMesh, folder: Path) -> None:
    """Trains eight steps, then the last four again from the checkpoint after the first four."""
    shim()
    whole = train(folder, state_dict_type, None)
    resumed = train(folder, state_dict_type, f"{folder}/checkpoint-4")
    assert list(resumed) == [5, 6, 7, 8], resumed
    assert resumed == {step: whole[step] for step in resumed}, (resumed, whole)


def train(folder: Path, state_dict_type: str, checkpoint: str | None) -> dict[int, float]:
    """Trains by Trainer's arguments alone; returns the loss of each step made."""
    fsdp = {"version": 2, "state_dict_type": state_dict_type}
    args = TrainingArguments(
        output_dir=str(folder),
        optim="striped_adamw_8bit",
        fsdp=True,
        fsdp_config={**fsdp, "transformer_layer_cls_to_wrap": ["GPT2Block"]},
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(new_model(), args, train_dataset=Windows())
    trainer.train(resume_from_checkpoint=checkpoint)
    check(trainer.accelerator, trainer.model, trainer.optimizer)
    log = trainer.state.log_history
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    return {step: loss for step, loss in losses.items() if checkpoint is None or step > 4}


def through_accelerate(state_dict_type: str, mesh: DeviceMesh, folder: Path) -> None:
    """Does the same by ``save_state`` and ``load_state``."""
    shim()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type=state_dict_type,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    state = str(folder / "state")

    def prepare() -> tuple:
        model = new_model()
        groups = param_groups(model, weight_decay=0.0)
        optimizer = StripedAdamW(groups, lr=1e-2, momentum_dtype="int8")
        return accelerator.prepare(model, optimizer)

    def train(model: torch.nn.Module, optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            tokens = Windows()[2 * step + accelerator.process_index]["input_ids"].unsqueeze(0)
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        check(accelerator, model, optimizer)
        return losses

    model, optimizer = prepare()
    train(model, optimizer, range(4))
    accelerator.save_state(state)
    whole = train(model, optimizer, range(4, 8))
    accelerator.free_memory()
    model, optimizer = prepare()
    accelerator.load_state(state)
    assert train(model, optimizer, range(4, 8)) == whole


def check(accelerator: Accelerator, model: torch.nn.Module, optimizer) -> None:
    """Checks that it was FSDP2, and our optimizer: a wrong shim would raise no error."""
    assert accelerator.is_fsdp2
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert isinstance(optimizer.optimizer, StripedAdamW)
    states = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert states
    assert all(isinstance(value, DTensor) for value in states)
    packed = [module.c_attn.weight for module in model.modules() if hasattr(module, "c_attn")]
    stripes = {optimizer.state[param]["exp_avg_sq_row"].shape for param in packed}
    assert stripes == {(18, 3)}, stripes  # they are marked before they become DTensors
