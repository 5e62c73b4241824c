"""Runs that go on from finished layers end with the same bytes."""

from __future__ import annotations

import errno
import itertools
import json
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import resumable_run
import small_models
from miniquant import LayerOptions, QuantizedWeight, Recipe, Rule, dequantize, load_calibration, quantize_model
from miniquant.grid import SuperblockKind
from miniquant.modules import find_sites
from miniquant.results import FinishedLayer, LayerResult, Stopped, TooFewTokensError
from miniquant.run import _Done, plan_folder, quantize_folder
from miniquant.state import RunState, kept_layers, state_folder
from test_quantize_model import BATCHES, ROUTED, Experts, Listed, chain, mixture
from test_run import gguf_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from miniquant.modules import Site

FAST = LayerOptions(preset="fast", group_size=16)


class Kept:
    """A store in memory: what a run saved, and what the next one is given."""

    def __init__(self, layers: Iterable[FinishedLayer] = ()) -> None:
        self.layers = {layer.result.name: layer for layer in layers}
        self.saved: list[str] = []

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    def load(self, site: Site, options: LayerOptions) -> FinishedLayer:
        kept = self.layers[site.name]
        assert kept.result.options == options
        return replace(kept, result=replace(kept.result, site=site))

    def save(self, layer: FinishedLayer) -> None:
        assert layer.result.quantized.codes.device.type == "cpu"
        self.layers[layer.result.name] = layer
        self.saved.append(layer.result.name)


def bytes_of(quantized: QuantizedWeight) -> list[bytes]:
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in quantized.tensors]


def figures(layer: LayerResult) -> dict[str, Any]:
    """All that is said of a layer, but for its tensors, and for what another run may say otherwise."""
    return {key: value for key, value in vars(layer).items() if key not in ("site", "quantized", "seconds", "restored")}


CASES: dict[str, tuple[Callable[[], nn.Module], list[Any], Recipe, float]] = {
    "shared inputs": (chain, BATCHES, Recipe(FAST, [Rule("right", {"bits": 3})]), 0.1),
    "one ridge for several": (chain, BATCHES, Recipe(FAST), 0.1),
    "siblings": (lambda: mixture(Experts), ROUTED, Recipe(FAST, [Rule("experts.*", {"unseen": "siblings"})]), 0.1),
    "listed siblings": (
        lambda: mixture(Listed),
        ROUTED,
        Recipe(FAST, [Rule("experts.*", {"unseen": "siblings"})]),
        0.1,
    ),
    "rounded": (lambda: mixture(Experts), ROUTED, Recipe(replace(FAST, unseen="rtn")), 0.1),
    "llama": (
        lambda: small_models.decoder("Llama"),
        3 * small_models.text_batches(),
        Recipe(replace(FAST, min_tokens=2)),
        0.1,
    ),
    "corrected": (
        lambda: small_models.decoder("Llama"),
        3 * small_models.text_batches(),
        Recipe(replace(FAST, min_tokens=2, correction=0.5, stream_correction=0.3)),
        0.1,
    ),
    "ridges that are carried over": (
        lambda: small_models.decoder("Llama", num_hidden_layers=7),
        3 * small_models.text_batches(),
        Recipe(replace(FAST, min_tokens=2)),
        0.1,
    ),
    "mixtral": (
        small_models.MODELS["mixtral"][0],
        3 * small_models.text_batches(),
        Recipe(replace(FAST, min_tokens=2), [Rule("*.experts.*", {"unseen": "siblings"})]),
        0.1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_any_layer_to_the_same_bytes(case: str) -> None:
    build, batches, recipe, held_out = CASES[case]
    plain_model = build()
    plain = quantize_model(plain_model, batches, recipe, held_out=held_out)
    whole = Kept()
    result = quantize_model(build(), batches, recipe, held_out=held_out, store=whole)
    assert whole.saved == list(result.layers) == list(plain.layers)
    for layer in result.layers.values():
        assert {tensor.device.type for tensor in layer.quantized.tensors} == {"meta"}
        assert layer.quantized.codes.shape == (layer.site.rows, layer.site.columns)
        assert not layer.restored
    names = list(plain.layers)
    counts = (
        range(len(names) + 1)
        if len(names) < 12
        else (1, 3, 6, 9, len(names) // 2, len(names) * 3 // 4, len(names) - 1, len(names))
    )
    for count in counts:
        kept = Kept(whole.layers[name] for name in names[:count])
        calls: list[str] = []
        model = build()
        resumed = quantize_model(
            model,
            batches,
            recipe,
            held_out=held_out,
            store=kept,
            progress=lambda layer, *_, calls=calls: calls.append(layer.name),
        )
        assert calls == list(resumed.layers) == names
        assert kept.saved == names[count:]
        assert [layer.restored for layer in resumed.layers.values()] == [place < count for place in range(len(names))]
        for name in names:
            assert bytes_of(kept.layers[name].result.quantized) == bytes_of(plain.layers[name].quantized), name
            assert figures(resumed.layers[name]) == figures(plain.layers[name])
        for (name, value), other in zip(model.state_dict().items(), plain_model.state_dict().values(), strict=True):
            assert torch.equal(value, other), name


@pytest.mark.parametrize("case", ["shared inputs", "one ridge for several", "siblings", "listed siblings"])
def test_layers_in_between_may_be_missing(case: str) -> None:
    """Files that were lost: any subset of them gives the same bytes, since every layer sees the same inputs."""
    build, batches, recipe, held_out = CASES[case]
    whole = Kept()
    quantize_model(build(), batches, recipe, held_out=held_out, store=whole)
    for lost in itertools.islice(itertools.combinations(whole.layers, 2), 0, None, 3):
        kept = Kept(layer for name, layer in whole.layers.items() if name not in lost)
        quantize_model(build(), batches, recipe, held_out=held_out, store=kept)
        assert set(kept.saved) == set(lost)
        for name, layer in whole.layers.items():
            assert bytes_of(kept.layers[name].result.quantized) == bytes_of(layer.result.quantized), (lost, name)


def test_restored_layers_take_no_hessian() -> None:
    whole = Kept()
    quantize_model(chain(), BATCHES, FAST, store=whole)
    resumed = quantize_model(chain(), BATCHES, FAST, store=Kept(whole.layers.values()))
    assert resumed.seconds["hessians"] == resumed.seconds["solver"] == resumed.seconds["judging"] == 0


def test_without_the_ridge_of_the_layer_before_the_bytes_would_differ() -> None:
    """What the test above of one ridge for several rests on."""
    recipe = Recipe(FAST)
    whole = Kept()
    quantize_model(chain(), BATCHES, recipe, held_out=0, store=whole)
    left = whole.layers["left"]
    assert left.found_ridge == left.result.ridge
    forgetful = Kept([replace(left, found_ridge=99.0)])
    quantize_model(chain(), BATCHES, recipe, held_out=0, store=forgetful)
    assert forgetful.layers["right"].result.ridge == 99.0
    assert bytes_of(forgetful.layers["right"].result.quantized) != bytes_of(whole.layers["right"].result.quantized)


def test_a_store_that_fails_ends_the_run_with_its_own_error() -> None:
    class Full(Kept):
        def save(self, layer: FinishedLayer) -> None:
            if len(self.saved) == 1:
                raise OSError(28, "No space left on device")
            super().save(layer)

    model = chain()
    before = model.last.weight.detach().clone()
    store = Full()
    with pytest.raises(OSError, match="No space left"):
        quantize_model(model, BATCHES, FAST, store=store)
    assert store.saved == ["left"]
    assert torch.equal(model.last.weight, before)
    assert not [hook for module in model.modules() for hook in module._forward_pre_hooks]


def test_a_run_stops_at_a_layers_boundary() -> None:
    whole = Kept()
    quantize_model(chain(), BATCHES, FAST, store=whole)
    stopped_at: list[int] = []
    for calls in itertools.count():
        model, store = chain(), Kept()
        left = [calls]

        def stop(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] < 0

        stopped = None
        try:
            quantize_model(model, BATCHES, FAST, store=store, stop=stop)
        except Stopped as error:
            stopped = error
        if stopped is None:
            break
        done = list(stopped.result.layers)
        assert str(stopped) == f"quantize_model: stopped after {len(done)} of 3 layers"
        stopped_at.append(len(done))
        assert done == store.saved == list(whole.layers)[: len(done)]
        for site in find_sites(model).sites:
            if site.name in store:
                assert torch.equal(site.read(), dequantize(store.layers[site.name].result.quantized))
            else:
                assert torch.equal(site.read(), chain().state_dict()[site.parameter_name])
        assert not [hook for module in model.modules() for hook in module._forward_pre_hooks]
    # Before each of eight batches that goes on, and before each layer is solved.
    assert stopped_at == [0] * 9 + [1] * 9 + [2] * 9


def test_a_store_holds_layers_one_at_a_time() -> None:
    """The result of a run with a store holds on to no codes: nothing of them is left when the store drops them."""

    class Dropping(Kept):
        def __init__(self) -> None:
            super().__init__()
            self.bytes = 0

        def save(self, layer: FinishedLayer) -> None:
            self.bytes += layer.result.quantized.codes.numel()

    store = Dropping()
    result = quantize_model(chain(), BATCHES, FAST, store=store)
    assert store.bytes == sum(layer.site.rows * layer.site.columns for layer in result.layers.values())
    tensors: list[Tensor] = [tensor for layer in result.layers.values() for tensor in layer.quantized.tensors]
    assert all(tensor.is_meta for tensor in tensors)


# From a folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resumable_run.save(tmp_path_factory.mktemp("resume") / "float")


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """What a run writes that nothing interrupts."""
    output = source.with_name("whole")
    resumable_run.run(source, output)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a model, but for the report, which has times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("report.")}


def nothing_is_left(output: Path) -> bool:
    return [path.name for path in output.parent.iterdir() if path.name != output.name] == []


def stop_after(layers: int) -> Callable[[], bool]:
    """Stops a run when so many layers are there, counted by their files."""
    done: list[int] = []

    def progress(*_: Any) -> None:
        done.append(1)

    def stop() -> bool:
        return len(done) >= layers

    stop.progress = progress  # type: ignore[attr-defined]
    return stop


def interrupted(source: Path, output: Path, layers: int, **options: Any) -> None:
    stop: Any = stop_after(layers)
    with pytest.raises(Stopped) as caught:
        resumable_run.run(source, output, stop=stop, progress=stop.progress, **options)
    assert str(caught.value).startswith(f"quantize_folder: stopped; {layers} of 24 layers are kept in {output}.partial")
    assert not output.exists()


@pytest.mark.parametrize("layers", [1, 3, 7, 12, 23])
def test_a_stopped_run_goes_on_to_the_same_bytes(layers: int, source: Path, whole: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out", layers)
    with pytest.raises(FileExistsError, match=f"with {layers} finished layers .go on with resume=True, or forget it"):
        resumable_run.run(source, tmp_path / "out")
    result = resumable_run.run(source, tmp_path / "out", resume=True)
    assert sum(layer.restored for layer in result.result.layers.values()) == layers
    assert f"{layers} of 24 layers are from a run that had ended before" in result.notes
    assert contents(tmp_path / "out") == contents(whole)
    assert nothing_is_left(tmp_path / "out")


def test_what_a_run_left_that_was_killed_at_its_end_is_removed(source: Path, whole: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial.done" / "layers"
    left.mkdir(parents=True)
    (left / "00007.safetensors").touch()
    resumable_run.run(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)
    assert nothing_is_left(tmp_path / "out")


@pytest.mark.parametrize("moments", [4, pytest.param(20, marks=pytest.mark.nightly)])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    moments: int, source: Path, whole: Path, tmp_path: Path
) -> None:
    def begun(output: Path) -> Any:
        """A process whose run has come to its first layer, after seconds of imports."""
        process = resumable_run.started(resumable_run.run, source, output)
        while process.is_alive() and not (state_folder(output) / "layers").exists():
            time.sleep(0.002)
        return process

    process = begun(tmp_path / "first")
    start = time.perf_counter()
    process.join()
    seconds = time.perf_counter() - start
    assert process.exitcode == 0
    assert contents(tmp_path / "first") == contents(whole)
    draw = random.Random(moments)  # noqa: S311
    kept = []
    for moment in range(moments):
        output = tmp_path / str(moment) / "out"
        output.parent.mkdir()
        process = begun(output)
        process.join(seconds * draw.uniform(0, 1))
        process.kill()
        process.join()
        layers = state_folder(output) / "layers"
        kept.append(len(list(layers.glob("0*.safetensors"))) if layers.exists() else None)
        if kept[-1] is not None or not output.exists():
            resumable_run.run(source, output, resume=True)
        assert contents(output) == contents(whole), (moment, kept)
        if output.with_name(".out.partial.done").exists():  # killed while it removed what was kept
            with pytest.raises(FileExistsError):
                resumable_run.run(source, output, resume=True)
        assert nothing_is_left(output)
    print(f"finished layers when the run was killed: {kept}")
    assert any(kept), "no run was killed between its first layer and its end"


@pytest.mark.parametrize("largest", [500, 3_000, 20_000])
def test_a_full_disk_keeps_what_is_done(largest: int, source: Path, whole: Path, tmp_path: Path) -> None:
    """Writes fail at the start, at a large layer, or when the model's file is written."""
    output = tmp_path / "out"
    process = resumable_run.started(resumable_run.run_with_small_files, source, output, largest)
    process.join()
    assert process.exitcode == 0
    message = (tmp_path / "error.txt").read_text()
    (tmp_path / "error.txt").unlink()
    assert not output.exists()
    if largest == 500:
        assert "cannot keep what is asked: File too large" in message
        assert not output.with_name("out.partial").exists()
        return
    done = len(list((tmp_path / "out.partial" / "layers").iterdir()))
    assert "File too large" in message
    assert (done == 24) == (largest == 20_000)
    assert f"{done} of 24 layers are kept in {output}.partial: go on with resume=True" in message
    resumable_run.run(source, output, resume=True)
    assert contents(output) == contents(whole)
    assert nothing_is_left(output)


def test_no_space_left_in_the_middle_of_a_run(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_bytes(self: Path, data: bytes) -> int:
        if len(list(self.parent.glob("0*.safetensors"))) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, data)

    original = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(
        OSError, match=r"cannot keep layer .model\.layers\.0.*: No space left on device .5 of 24 layers"
    ) as e:
        resumable_run.run(source, tmp_path / "out")
    assert e.value.errno == errno.ENOSPC
    monkeypatch.undo()
    resumable_run.run(source, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_layer_is_written_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run does not wait for the disk until the next layer is done, or until it reads the layer again."""
    may_write, fails = threading.Event(), threading.Event()

    def write_bytes(self: Path, data: bytes) -> int:
        assert may_write.wait(60)
        if fails.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, data)

    original = Path.write_bytes
    finished = Kept()
    quantize_model(chain(), BATCHES, FAST, store=finished)
    layers = list(finished.layers.values())
    names = [layer.result.name for layer in layers]
    with RunState(tmp_path, names) as state:
        state.begin({})
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        state.save(layers[0])
        assert names[0] in state
        assert not kept_layers(tmp_path)
        may_write.set()
        assert bytes_of(state.quantized(names[0])) == bytes_of(layers[0].result.quantized)
        fails.set()
        state.save(layers[1])
        with pytest.raises(OSError, match=f"cannot keep layer '{names[1]}': No space left on device"):
            state.save(layers[2])
        assert state.kept() == {names[0]}
        fails.clear()
        state.save(layers[1])
    assert len(kept_layers(tmp_path)) == 2


def test_another_run_is_refused_saying_what_differs(source: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    interrupted(source, output, 2)
    before = {path: path.read_bytes() for path in (tmp_path / "out.partial").rglob("*") if path.is_file()}
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    batches = [{"input_ids": small_models.ids(2, 9, seed)} for seed in range(6)]
    recipe = Recipe(replace(resumable_run.RECIPE.defaults, bits=3), resumable_run.RECIPE.rules)
    for where, changes, message in (
        (source, {"recipe": recipe}, "recipe: defaults.bits: 3, in the other 4"),
        (source, {"recipe": Recipe(recipe.defaults)}, "recipe: rule 1.pattern: not stated, in the other"),
        (other, {}, "source.values: "),
        (source, {"calibration": load_calibration(batches, tokens=99)}, "calibration.sha256: "),
        (source, {"calibration": load_calibration(batches, tokens=99)}, "calibration.tokens: 108, before 1"),
        (source, {"held_out": 0.2}, "calibration.held_out: 0.2, before null"),
        (source, {"format": "miniquant"}, 'format: "miniquant", before "compressed-tensors"'),
        (source, {"dtype": torch.bfloat16}, 'dtype: "bfloat16", before "float32"'),
    ):
        with pytest.raises(
            ValueError, match="expected the run to resume to be of the same recipe, source and"
        ) as caught:
            resumable_run.run(where, output, resume=True, **changes)
        assert message in str(caught.value)
        assert {path: path.read_bytes() for path in before} == before
    resumable_run.run(source, output, resume=True, dtype=None)  # as the run before
    assert contents(output) == contents(whole)


def test_too_few_tokens_can_be_dealt_with_in_a_resumed_run(source: Path, tmp_path: Path) -> None:
    rules = [Rule("model.layers.1.self_attn.o_proj", {"min_tokens": 10**6}), *resumable_run.RECIPE.rules]
    recipe = Recipe(resumable_run.RECIPE.defaults, rules)
    output = tmp_path / "out"
    said = "model.layers.1.self_attn.o_proj saw .* layers are kept in .*: go on with resume=True and another unseen"
    with pytest.raises(TooFewTokensError, match=said) as caught:
        resumable_run.run(source, output, recipe=recipe)
    assert caught.value.layers == ("model.layers.1.self_attn.o_proj",)
    done = len(caught.value.result.layers)
    assert 0 < done < 24
    software = json.loads((state_folder(output) / "run.json").read_text())["software"]
    nearest = Recipe(replace(recipe.defaults, unseen="rtn"), rules)
    with pytest.raises(ValueError, match=r"recipe: defaults.bits: 3, in the other 4"):
        resumable_run.run(source, output, recipe=Recipe(replace(nearest.defaults, bits=3), rules), resume=True)
    interrupted(source, output, done + 1, recipe=nearest, resume=True)
    state = json.loads((state_folder(output) / "run.json").read_text())
    assert state["recipe"]["defaults"]["unseen"] == "rtn"
    assert state["software"] == software
    with pytest.raises(ValueError, match=r'recipe: defaults.unseen: "error", in the other "rtn"'):
        resumable_run.run(source, output, recipe=recipe, resume=True)
    result = resumable_run.run(source, output, recipe=nearest, resume=True)
    assert sum(layer.restored for layer in result.result.layers.values()) == done + 1
    resumable_run.run(source, tmp_path / "whole", recipe=nearest)
    assert contents(output) == contents(tmp_path / "whole")


def test_an_unfinished_run_is_forgotten_where_that_is_said(source: Path, whole: Path, tmp_path: Path) -> None:
    recipe = Recipe(replace(resumable_run.RECIPE.defaults, bits=3), resumable_run.RECIPE.rules)
    interrupted(source, tmp_path / "out", 3, recipe=recipe)
    result = resumable_run.run(source, tmp_path / "out", overwrite=True)
    assert not any(layer.restored for layer in result.result.layers.values())
    assert contents(tmp_path / "out") == contents(whole)
    result = resumable_run.run(source, tmp_path / "new", resume=True)  # there is none: from the start
    assert not any(layer.restored for layer in result.result.layers.values())


def test_files_of_layers_that_are_lost_or_damaged(source: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    interrupted(source, output, 12)
    layers = tmp_path / "out.partial" / "layers"
    files = sorted(layers.iterdir())
    assert len(files) == 12
    files[1].unlink()
    (layers / ".00023.safetensors.0123").write_bytes(b"what a process was writing that was killed")
    contents_before = files[4].read_bytes()
    for damaged, why in (
        (b"", "at least 8 bytes"),
        (contents_before[:-9], "expected a file of"),
        (files[5].read_bytes(), "another file"),
        (contents_before.replace(b"waited", b"wanted"), "with 'waited' in its metadata"),
        (contents_before.replace(b"miniquant.finished", b"miniquant.finishes"), "another file"),
    ):
        files[4].write_bytes(damaged)
        with pytest.raises(ValueError, match=r"00\d+\.safetensors: expected layer 'model\..*") as caught:
            resumable_run.run(source, output, resume=True)
        assert str(files[4]) in str(caught.value)
        assert why in str(caught.value)
        assert "(remove the file, and resume=True quantizes the layer again)" in str(caught.value)
    files[4].unlink()
    result = resumable_run.run(source, output, resume=True)
    assert sum(layer.restored for layer in result.result.layers.values()) >= 10
    assert contents(output) == contents(whole)
    assert nothing_is_left(output)


def test_a_damaged_file_of_the_run_is_named(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out", 1)
    run_file = tmp_path / "out.partial" / "run.json"
    for text in ("{", "[]", '{"a": ' * 99):
        run_file.write_text(text)
        with pytest.raises(ValueError, match=r"run\.json: expected"):
            resumable_run.run(source, tmp_path / "out", resume=True)


def test_a_run_that_was_killed_when_all_was_written(source: Path, whole: Path, tmp_path: Path) -> None:
    """The output is there, and the layers are not forgotten yet."""
    output = tmp_path / "out"
    interrupted(source, output, 23)
    shutil.copytree(whole, output)
    with pytest.raises(FileExistsError):
        resumable_run.run(source, output)
    resumable_run.run(source, output, resume=True)
    assert contents(output) == contents(whole)
    assert nothing_is_left(output)
    interrupted(source, tmp_path / "new", 23)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"of": "another model"}')
    with pytest.raises(FileExistsError, match="expected folder to be new or empty"):
        resumable_run.run(source, tmp_path / "new", resume=True)


def test_two_runs_to_one_folder(source: Path, tmp_path: Path) -> None:
    def progress(layer: LayerResult, number: int, of: int) -> None:
        if number == 1:
            with pytest.raises(BlockingIOError, match="expected to be alone with"):
                resumable_run.run(source, tmp_path / "out", resume=True)

    resumable_run.run(source, tmp_path / "out", progress=progress)


def test_an_interrupt_keeps_what_is_done(source: Path, whole: Path, tmp_path: Path) -> None:
    """As Ctrl-C raises it, in the middle of a forward pass."""

    def progress(layer: LayerResult, number: int, of: int) -> None:
        if number == 9:
            signal.setitimer(signal.ITIMER_REAL, 0.001)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            resumable_run.run(source, tmp_path / "out", progress=progress)
        assert time.perf_counter() - start < 60
    finally:
        signal.signal(signal.SIGALRM, before)
    result = resumable_run.run(source, tmp_path / "out", resume=True)
    assert sum(layer.restored for layer in result.result.layers.values()) >= 9
    assert contents(tmp_path / "out") == contents(whole)


def test_an_event_stops_a_run(source: Path, tmp_path: Path) -> None:
    event = threading.Event()
    with pytest.raises(Stopped, match="2 of 24 layers are kept"):
        resumable_run.run(
            source, tmp_path / "out", stop=event, progress=lambda _, number, __: event.set() if number == 2 else None
        )


def test_other_versions_are_noted(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out", 2)
    run_file = tmp_path / "out.partial" / "run.json"
    asked = json.loads(run_file.read_text())
    asked["software"]["threads"] = 7
    run_file.write_text(json.dumps(asked))
    result = resumable_run.run(source, tmp_path / "out", resume=True)
    assert "layers may differ from those of one run: software.threads: 1, before 7" in result.notes


@pytest.mark.parametrize("superblocks", [None, "Q4_K"])
def test_a_gguf_file_after_a_stop(tmp_path: Path, superblocks: SuperblockKind | None) -> None:
    sizes: dict[str, Any] = {} if superblocks is None else {"hidden_size": 256, "intermediate_size": 256}
    folder = gguf_model(tmp_path / "float", **sizes)
    batches = [{"input_ids": small_models.ids(2, 24, seed, below=290)} for seed in range(6)]
    given: dict[str, Any] = {
        "recipe": LayerOptions(preset="fast", group_size=32, superblocks=superblocks),
        "calibration": load_calibration(batches, tokens=10**6),
        "dtype": torch.float32,
        "format": "gguf",
    }
    quantize_folder(folder, tmp_path / "whole", **given)
    stop: Any = stop_after(5)
    with pytest.raises(Stopped):
        quantize_folder(folder, tmp_path / "out", stop=stop, progress=stop.progress, **given)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")  # as of a run that was killed at its end
    (tmp_path / "out.partial" / ".model.gguf.01234567").write_bytes(b"part of a file")
    quantize_folder(folder, tmp_path / "out", resume=True, **given)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(FileExistsError):
        quantize_folder(folder, tmp_path / "out", **given)
    quantize_folder(folder, tmp_path / "out", overwrite=True, **given)
    (tmp_path / "out" / "precious.txt").write_text("text")
    with pytest.raises(FileExistsError):
        quantize_folder(folder, tmp_path / "out", overwrite=True, **given)


def test_what_is_read_once_more_has_what_this_run_has_done(source: Path, tmp_path: Path) -> None:
    """Experts that an earlier run finished stay as they are until this one comes to them."""
    interrupted(source, tmp_path / "out", 10)
    plan = plan_folder(
        source,
        tmp_path / "out",
        resumable_run.RECIPE,
        calibration=resumable_run.calibration(),
        dtype=torch.float32,
        max_shard_bytes=60_000,
        resume=True,
    )
    sites = {site.name: site for site, _ in plan.planned.plan.layers}
    with plan.state() as state:
        kept = [name for name in sites if name in state and ".0.mlp.experts.down_proj." in name]
        assert len(kept) >= 2
        done = _Done(plan.planned, state)
        done.add(kept[1])
        with plan.source:
            before = {name: sites[name].read() for name in kept}
            done.restore("model.layers.0.mlp.experts.down_proj")
            for name in kept:
                expected = dequantize(state.quantized(name)) if name == kept[1] else before[name]
                assert torch.equal(sites[name].read(), expected)
    assert not torch.equal(before[kept[1]], dequantize(state.quantized(kept[1])))
