"""A run that began with torchao's low-bit AdamW, Trainer's ``adamw_torch_8bit``, continues."""

from pathlib import Path

import pytest
import torch
from optim_checks import FORMATS, assert_same_bits
from torch import nn

from striped_hf import StripedAdamW

torchao = pytest.importorskip("torchao.optim")

# codes are for tensors of 4096 elements and more
SHAPES = [(64, 96), (3, 32, 128), (5000,), (7, 9), (6,)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("AdamW8bit", torch.bfloat16),
        ("AdamW4bit", torch.float32),
        ("AdamWFp8", torch.float32),
    ],
)
def test_a_torchao_checkpoint_loads_like_adamws(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    theirs = getattr(torchao, name)(params, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        theirs.step()
    file = tmp_path / "optimizer.pt"
    torch.save(theirs.state_dict(), file)
    saved, plain = (torch.load(file, weights_only=True) for _ in range(2))
    # the second one in float32, as from torch's AdamW
    coded = 0
    for state in plain["state"].values():
        for key, value in state.items():
            if type(value) is not torch.Tensor:
                state[key] = value.dequantize().float()
                coded += 1
    assert coded >= 4

    for momentum_dtype in FORMATS:
        one, two = (StripedAdamW(params, momentum_dtype=momentum_dtype) for _ in range(2))
        one.load_state_dict(saved)
        two.load_state_dict(plain)
        group = one.param_groups[0]
        assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), 0.1)
        assert type(group["lr"]) is float
        assert group["lr"] == pytest.approx(0.02)
        for param in params:
            assert one.state[param].keys() == two.state[param].keys()
            for key, value in one.state[param].items():
                assert type(value) is torch.Tensor
                assert_same_bits(value, two.state[param][key])
        one.step()
