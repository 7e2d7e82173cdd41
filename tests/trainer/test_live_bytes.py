"""What LiveBytes counts: the memory of tensors, once, while they live."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from striped_hf.trainer.live_bytes import OTHER, LiveBytes


def test_peak_counts_what_lives_at_a_time():
    with LiveBytes() as live:
        for _ in range(3):
            x = torch.zeros(1000)
            y = x + 1
            del x, y
    assert live.peak == 8000
    assert live.at_peak() == {OTHER: 8000}


def test_views_and_operations_in_place_take_no_memory():
    with LiveBytes() as live:
        x = torch.zeros(10, 100)
        x.t()[3:].unsqueeze(0).add_(1)
    assert live.peak == 4000


def test_labels_say_what_lived_at_the_peak():
    before = torch.zeros(100)
    with LiveBytes() as live:
        live.label("weights", [before])
        live.label("weights", [before.view(10, 10)])
        live.new = "step"
        kept = torch.zeros(200)
        temporary = torch.zeros(300)
        del temporary
        live.new = OTHER
        later = torch.zeros(250)
        live.label("state", [kept, later])  # one was there at the peak, one was not
    assert live.peak == 2400
    assert live.at_peak() == {"weights": 400, "state": 800, "step": 1200, OTHER: 0}


def test_fake_tensors_count_and_tensors_on_meta_do_not():
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.zeros(1 << 40, dtype=torch.bfloat16)
        torch.zeros(1 << 42, device="meta")
    assert live.peak == x.nbytes == 2 << 40


def test_gradients_of_a_backward_pass():
    weight = torch.nn.Parameter(torch.zeros(100, 100))
    with LiveBytes() as live:
        live.label("weights", [weight])
        (weight.square().sum()).backward()
        live.label("gradients", [weight.grad])
    assert live.at_peak()["weights"] == weight.nbytes
    assert live.at_peak()["gradients"] == weight.nbytes
    assert live.peak <= 5 * weight.nbytes
