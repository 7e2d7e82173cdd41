"""A layerwise optimizer under DDP, by ``accelerate launch`` in two processes."""

import json
from pathlib import Path

import pytest
from processes import Launch


@pytest.mark.slow
def test_ddp_trains_as_the_ordinary_optimizer_and_says_that_it_keeps_gradients(
    launched: list[Launch], tmp_path: Path
) -> None:
    script = Path(__file__).parent / "layerwise_ddp.py"
    launched.append(Launch("ddp.yaml", script, tmp_path, cwd=tmp_path, log="ddp"))
    out, err = launched[-1].wait()
    (line,) = [line for line in out.splitlines() if line.startswith("RESULTS ")]
    results = json.loads(line.removeprefix("RESULTS "))
    for case in ("0.0 1", "1.0 1", "1.0 2"):
        ordinary = results[f"striped_adamw {case}"]
        layerwise = results[f"striped_adamw_layerwise {case}"]
        assert layerwise["replicas agree"]
        assert len(layerwise["losses"]) == len(layerwise["norms"]) == 3
        if case == "0.0 1":  # nothing is clipped
            assert layerwise["losses"] == ordinary["losses"]
            assert layerwise["weights"] == ordinary["weights"]
        assert layerwise["losses"] == pytest.approx(ordinary["losses"], rel=1e-5)
        assert layerwise["norms"] == pytest.approx(ordinary["norms"], rel=1e-5)
    assert results["striped_adamw 0.0 1"]["kept"] == [9, 9, 9]
    in_chunks = results["striped_adamw_layerwise in chunks"]
    assert in_chunks["replicas agree"]
    assert in_chunks["losses"] == pytest.approx(
        results["striped_adamw_layerwise 0.0 1"]["losses"], rel=1e-4
    )
    # once for both processes and all four runs
    assert (out + err).count("whose buckets keep all gradients") == 1
    assert "use FSDP2" in err
