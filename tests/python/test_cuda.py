"""The model on a GPU: its forward pass and the Hessians there, the solver on the CPU. Skipped where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import resumable_run
import small_models
from miniquant import LayerOptions, cli, dequantize, load, quantize_model
from miniquant.modules import find_sites
from model_folder import QUICK, VOCABULARY, make_folder
from quantized_folders import quantized_folder
from test_cli import TEXT
from test_loading import distance, quantized_modules
from test_resume import contents, interrupted

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
OPTIONS = LayerOptions(preset="fast", group_size=16, min_tokens=2, unseen="siblings")


def moved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(GPU) for name, value in batch.items()}


@pytest.mark.parametrize("kind", small_models.MODELS)
def test_layers_are_those_of_a_run_on_the_cpu(kind: str) -> None:
    """Inputs differ by rounding, so a few codes do."""
    make, batches = small_models.MODELS[kind]
    given: list[Any] = [dict(batch) for batch in 4 * batches()]
    on_cpu, on_gpu = make(), make().to(GPU)
    options = replace(OPTIONS, unseen="rtn") if kind == "mamba" else OPTIONS  # its code takes a weight without a call
    expected = quantize_model(on_cpu, given, options, held_out=0.25).layers
    found = quantize_model(on_gpu, given, options, held_out=0.25).layers
    assert list(found) == list(expected)
    sites = {site.name: site for site in find_sites(on_gpu).sites}
    different = total = 0
    for name, layer in found.items():
        assert (layer.tokens, layer.held_out_tokens) == (expected[name].tokens, expected[name].held_out_tokens)
        different += int((layer.quantized.codes != expected[name].quantized.codes).sum())
        total += layer.quantized.codes.numel()
        assert torch.equal(sites[name].read(), dequantize(layer.quantized, dtype=torch.float32))
    assert all(tensor.device.type == "cuda" for tensor in on_gpu.state_dict().values())
    assert different <= 0.02 * total
    losses = [sum(layer.loss or 0.0 for layer in layers.values()) for layers in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


ON_GPU: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder = resumable_run.save(tmp_path / "float")
    resumable_run.run(folder, tmp_path / "whole", **ON_GPU)
    interrupted(folder, tmp_path / "out", 7, **ON_GPU)
    result = resumable_run.run(folder, tmp_path / "out", resume=True, **ON_GPU)
    assert sum(layer.restored for layer in result.result.layers.values()) == 7
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    resumable_run.run(folder, tmp_path / "at once", lazy=False, **ON_GPU)
    assert contents(tmp_path / "at once") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [
        ("llama", torch.float32, 1e-5),
        ("llama", torch.bfloat16, 0.03),
        ("llama", torch.float16, 0.004),
        ("gpt2", torch.float32, 1e-5),
        ("mixtral", torch.float32, 1e-5),  # with fewer digits it routes tokens otherwise
    ],
    ids=str,
)
def test_a_quantized_model_runs_there(kind: str, dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    make, batches = small_models.MODELS[kind]
    made = quantized_folder(make(), tmp_path)
    model = load(made.folder, dtype=dtype, device="cuda")
    assert all(tensor.device.type == "cuda" for tensor in model.state_dict().values() if torch.is_tensor(tensor))
    assert distance(model, made.reference().to(GPU), [moved(batch) for batch in batches()]) <= bound
    for name, layer in quantized_modules(model).items():
        if name in made.layers:  # experts are named otherwise in the file
            assert torch.equal(layer.quantized().codes.cpu(), made.layers[name].codes)
    back = model.to("cpu")
    assert distance(back, made.reference(), batches()) <= bound


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "float", small_models.decoder("Llama", vocab_size=VOCABULARY, max_position_embeddings=128))
    (tmp_path / "text.txt").write_text(TEXT * 20)
    divergence = {}
    for device in ("cpu", "cuda"):
        assert cli.main(["quantize", "float", device, *QUICK, "--device", device]) == 0
        capsys.readouterr()
        on = ("--device", device, "--dtype", "float32")
        assert cli.main(["evaluate", device, "--against", "float", "--text", "text.txt", *on, "--json"]) == 0
        divergence[device] = json.loads(capsys.readouterr().out)["kl_divergence"]["value"]
    assert divergence["cuda"] == pytest.approx(divergence["cpu"], rel=0.05)
    assert cli.main(["generate", "cuda", "a b", "--max-tokens", "4", "--device", "cuda"]) == 0
