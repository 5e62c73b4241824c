"""The paused pass: the same as reruns on many architectures, and what it leaves behind in every case."""

from __future__ import annotations

import contextvars
import copy
import gc
import threading
import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import greenlet
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import multipass
import small_models
from miniquant import HessianAccumulator
from miniquant.modules import ExpertSite, Site, find_sites
from miniquant.walk import Given, Visit, Walk, WalkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MODELS = small_models.MODELS
# Weights that the model multiplies with by itself: no module is called, so no batch ever comes to them.
NOT_CALLED = {"mamba": {"backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"}}


def walked(
    model: nn.Module, batches: Iterable[Any], sites: Sequence[Site], **options: Any
) -> tuple[dict[str, Tensor], Walk]:
    """Quantizes every site; Hessians by name in the order of visits."""
    hessians = {}
    with Walk(model, batches, sites, **options) as walk:
        for visit in walk:
            accumulator = HessianAccumulator(visit.site.columns, halves=True)
            for given in visit.inputs:
                accumulator.update(given.tokens(), mask=given.mask)
            hessians[visit.site.name] = accumulator.hessian()
            visit.site.write(multipass.quantized(visit.site.read(), hessians[visit.site.name]))
    return hessians, walk


def eager(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation_internal = "eager"
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_equal_to_reruns_bit_for_bit(kind: str) -> None:
    """Every layer's Hessian and the final weights; the order; the outputs of the quantized model."""
    build, batches = MODELS[kind]
    model, other = build(), eager(build())
    sites = find_sites(model).sites
    names = [site.name for site in sites]
    expected = multipass.multipass(other, batches(), [name for name in names if name not in NOT_CALLED.get(kind, ())])
    hessians, walk = walked(model, batches(), sites, masks=[None] * len(batches()))
    assert list(hessians) == list(expected)
    assert {site.name for site in walk.unreached} == NOT_CALLED.get(kind, set())
    assert set(hessians) == set(names) - NOT_CALLED.get(kind, set())
    for name, hessian in hessians.items():
        assert torch.equal(hessian, expected[name]), name
    for (name, parameter), (_, expected_parameter) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(parameter, expected_parameter), name
    assert (walk.late, walk.again) == ({}, {})
    changed = model.state_dict()
    original = build().state_dict()
    unchanged = {name for name, value in original.items() if torch.equal(value, changed[name])}
    assert not unchanged & {site.parameter_name for site in sites if site not in walk.unreached}
    assert unchanged >= {one.name for one in find_sites(model).left_alone} & set(original)


@pytest.mark.parametrize("kind", MODELS)
def test_a_second_run_beside_sees_the_model_as_it_was(kind: str) -> None:
    """Its inputs are those of a walk that changes nothing, and it changes nothing about the first run."""
    build, batches = MODELS[kind]
    untouched, alone, model = build(), build(), build()
    original: dict[str, dict[int, Tensor]] = {}
    with Walk(untouched, batches(), find_sites(untouched).sites) as walk:
        for visit in walk:
            original[visit.site.name] = {given.batch: given.tokens().clone() for given in visit.inputs}
    expected, _ = walked(alone, batches(), find_sites(alone).sites)
    seen = set()
    with Walk(model, batches(), find_sites(model).sites, beside=True) as walk:
        for visit in walk:
            accumulator = HessianAccumulator(visit.site.columns, halves=True)
            for given in visit.inputs:
                accumulator.update(given.tokens(), mask=given.mask)
                tokens = given.original_tokens()
                if tokens is not None:
                    seen.add(visit.site.name)
                    assert torch.equal(tokens, original[visit.site.name][given.batch]), visit.site.name
            assert torch.equal(accumulator.hessian(), expected[visit.site.name]), visit.site.name
            visit.site.write(multipass.quantized(visit.site.read(), accumulator.hessian()))
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, alone.state_dict()[name]), name
    assert (walk.late, walk.again) == ({}, {})
    experts = [name for name in expected if ".experts." in name]
    if experts:  # no layer from the first expert on
        assert set(walk.parted) == set(range(len(batches())))
        assert set(walk.parted.values()) == {experts[0]}
        assert seen == set(list(expected)[: list(expected).index(experts[0])])
    else:
        assert walk.parted == {}
        assert seen == set(expected)


LLAMA_BLOCK = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def test_order_is_that_of_execution() -> None:
    def order(kind: str) -> list[str]:
        model = MODELS[kind][0]()
        return list(walked(model, MODELS[kind][1](), find_sites(model).sites)[0])

    assert order("llama") == [f"model.layers.{layer}.{name}" for layer in range(2) for name in LLAMA_BLOCK]
    assert order("opt")[:5] == [
        "model.decoder.project_in",
        *(f"model.decoder.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    ]
    assert order("opt")[-1] == "model.decoder.project_out"
    moe = order("mixtral")
    assert moe[4:12] == [
        f"model.layers.0.mlp.experts.{name}_proj.{expert}" for expert in range(4) for name in ("gate_up", "down")
    ]
    t5 = order("t5")
    assert [name.split(".")[0] for name in t5] == ["encoder"] * 14 + ["decoder"] * 22


@pytest.mark.parametrize(
    ("kind", "sets"),
    [
        # Sites that are given the same tensors, by their number in the order of execution
        ("llama", [[0, 1, 2], [4, 5], [7, 8, 9], [11, 12]]),
        ("bert", [[0, 1, 2], [6, 7, 8]]),
        ("gpt2", []),
        ("opt", [[1, 2, 3], [7, 8, 9]]),
        ("t5", [[0, 1, 2], [4, 5], [7, 8, 9], [11, 12], [14, 15, 16], [19, 20], [22, 23], [25, 26, 27], [30, 31]]),
    ],
)
def test_sites_that_are_given_the_same_tensors(kind: str, sets: list[list[int]]) -> None:
    model = MODELS[kind][0]()
    ids, hessians = [], []
    with Walk(model, MODELS[kind][1](), find_sites(model).sites) as walk:
        for visit in walk:
            ids.append(visit.inputs_id)
            accumulator = HessianAccumulator(visit.site.columns)
            for given in visit.inputs:
                accumulator.update(given.tokens(), mask=given.mask)
            hessians.append(accumulator.hessian())
            visit.site.write(multipass.quantized(visit.site.read(), hessians[-1]))
    found = [[number for number, one in enumerate(ids) if one == shared] for shared in dict.fromkeys(ids)]
    shared = [numbers for numbers in found if len(numbers) > 1]
    # T5: keys and values of the cross attention of both blocks are given the encoder's output.
    assert [one for one in shared if one in sets] == [one for one in sets if one in shared]
    assert {number for one in shared for number in one} >= {number for one in sets for number in one}
    for numbers in shared:
        for number in numbers[1:]:
            assert torch.equal(hessians[number], hessians[numbers[0]])


class Twice(nn.Module):
    """Two Linears on what is, or is not, the same input."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        return self.first(x) + self.second(self.between(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("between", "same"),
    [
        (lambda x: x, True),
        (lambda x: x.view(x.shape), True),
        (lambda x: x.clone(), False),
        (lambda x: x.add_(1), False),  # the same tensor, of other values
        (lambda x: x.view(-1)[:].view(x.shape).mul_(2), False),  # written to through a view
        (lambda x: x[1:], False),
        (lambda x: x.unsqueeze(0), False),
        (lambda x: x.data, False),  # a tensor of its own, whose writes are not counted with the other's
    ],
)
def test_a_tensor_that_was_written_to_is_another(between: Callable[[Tensor], Tensor], same: bool) -> None:
    model = Twice(between)
    with Walk(model, [torch.zeros(3, 4), torch.ones(2, 4)], find_sites(model).sites) as walk:
        ids = [visit.inputs_id for visit in walk]
    assert (ids[0] == ids[1]) == same


def test_memory_that_is_used_again_is_another_tensor() -> None:
    """A tensor that is gone leaves its address to the next; one in inference mode has no count of writes."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> None:
            for layer in self.layers:
                layer(x + 1)  # each sum is dropped at once

    with Walk(Drops(), [torch.zeros(8, 64)], find_sites(model).sites) as walk:
        ids = [visit.inputs_id for visit in walk]
    assert len(set(ids)) == 3

    class Inference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        @torch.inference_mode()
        def forward(self, x: Tensor) -> None:
            x = x + 1
            for layer in self.layers:
                layer(x)

    with Walk(Inference(), [torch.zeros(8, 64)], find_sites(model).sites) as walk:
        ids = [visit.inputs_id for visit in walk]
    assert len(set(ids)) == 3


# Masks


def test_padding_does_not_count() -> None:
    """Hessians of padded texts are those of the texts alone, layer by layer."""
    model, other = MODELS["llama"][0](), MODELS["llama"][0]()
    batches = small_models.text_batches()
    alone = [
        {"input_ids": row[mask.bool()][None]}
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    hessians, _ = walked(model, batches, find_sites(model).sites)
    expected, _ = walked(other, alone, find_sites(other).sites)
    first = list(hessians)[:3]  # later ones see what rounding made of the first
    for name in first:
        torch.testing.assert_close(hessians[name], expected[name], rtol=1e-5, atol=1e-6)
    unmasked, _ = walked(MODELS["llama"][0](), batches, find_sites(other).sites, masks=[None] * 3)
    assert not torch.allclose(unmasked[first[0]], expected[first[0]], rtol=1e-2) if unmasked else True


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral", "gpt-oss"])
def test_padding_that_is_routed_to_experts_does_not_count(kind: str) -> None:
    """Padded positions are told from others by what the module is given: the tokens themselves, and their experts."""
    model: Any = MODELS[kind][0]()
    batches = MODELS[kind][1]()
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def routing(module: nn.Module, args: Any) -> None:
        seen[id(module), id(greenlet.getcurrent())] = (args[0].clone(), args[1].clone())

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(routing)
    numbers: dict[int, int] = {}
    checked = dropped = 0
    with Walk(model, batches, find_sites(model).sites) as walk:
        for run in walk._runs:
            numbers[run.number] = id(run)
        for visit in walk:
            if not isinstance(visit.site, ExpertSite):
                continue
            for given in visit.inputs:
                hidden, index = seen[id(visit.site.modules[0]), numbers[given.batch]]
                attention = batches[given.batch]["attention_mask"].bool().flatten()
                expected = sum(
                    bool(attention[token])
                    for token in range(len(hidden))
                    for expert in index[token].tolist()
                    if expert == visit.site.expert
                )
                assert given.mask is not None
                assert int(given.mask.sum()) == expected
                dropped += len(given.mask) - expected
                if visit.site.attribute == "gate_up_proj":
                    kept = {tuple(row) for row in given.tokens()[given.mask].tolist()}
                    assert kept <= {tuple(row) for row in hidden[attention].tolist()}
                checked += 1
    assert checked > 20
    assert dropped > 5


def test_masks_of_encoder_and_decoder() -> None:
    """Of equal shape, so the sites tell whose they are: cross attention's keys and values come from the encoder."""
    model = MODELS["t5"][0]()
    batches = small_models.t5_batches()
    with Walk(model, batches, find_sites(model).sites) as walk:
        for visit in walk:
            name = visit.site.name
            of_encoder = name.startswith("encoder") or "EncDecAttention.k" in name or "EncDecAttention.v" in name
            for given in visit.inputs:
                key = "attention_mask" if of_encoder else "decoder_attention_mask"
                assert given.mask is not None
                assert torch.equal(given.mask, batches[given.batch][key].bool()), name


def test_masks_where_the_caller_gives_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0, 1), nn.Linear(4, 4))
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    with Walk(model, [torch.randn(2, 3, 4), torch.randn(2, 3, 4)], find_sites(model).sites, masks=[mask, None]) as walk:
        given = [visit.inputs.copy() for visit in walk]
    assert [[one.mask is None for one in inputs] for inputs in given] == [[False, True]] * 2
    assert given[0][0].mask is not None
    assert given[1][0].mask is not None
    assert torch.equal(given[0][0].mask, mask.bool())
    assert torch.equal(given[1][0].mask, mask.bool().flatten())


# Branches and repetitions


class Branches(nn.Module):
    """Of three batches, each takes another way."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(4, 4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.end = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor, ways: str) -> Tensor:
        x = self.start(x)
        for way in ways.replace("stop", "").split():
            x = torch.tanh(getattr(self, way)(x))
        return self.end(x) if "stop" not in ways else x


def test_branches() -> None:
    """A layer is ready when every batch waits or has ended."""
    model = Branches()
    batches = [(torch.randn(3, 4), "left right"), (torch.randn(5, 4), "right"), (torch.randn(2, 4), "")]
    visits = []
    with Walk(model, batches, find_sites(model).sites) as walk:
        visits = [(visit.site.name, [given.batch for given in visit.inputs]) for visit in walk]
        assert [site.name for site in walk.unreached] == ["never"]
    assert visits == [("start", [0, 1, 2]), ("left", [0]), ("right", [0, 1]), ("end", [0, 1, 2])]
    assert walk.late == {}


class Threshold(nn.Module):
    """A way that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(4, 4)
        self.positive = nn.Linear(4, 4)
        self.negative = nn.Linear(4, 4)
        self.end = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        return self.end(self.positive(x) if float(x.sum()) > 0 else self.negative(x))  # type: ignore[no-any-return]


def test_a_batch_whose_runs_part_goes_on_in_one() -> None:
    model = Threshold()
    with torch.no_grad():
        model.start.bias.zero_()
        model.start.weight.copy_(torch.eye(4))
    batches = [torch.ones(3, 4), torch.ones(5, 4)]
    has_original: dict[str, list[bool]] = {}
    with Walk(model, batches, find_sites(model).sites, beside=True) as walk:
        for visit in walk:
            has_original[visit.site.name] = [given.original is not None for given in visit.inputs]
            if visit.site.name == "start":  # now the first runs take the other way
                visit.site.write(-torch.eye(4))
    assert has_original == {"start": [True, True], "negative": [False, False], "end": [False, False]}
    assert walk.parted == {0: "negative", 1: "negative"}
    assert torch.equal(model.start.weight, -torch.eye(4))


def visits_of(walk: Walk) -> list[tuple[str, list[int]]]:
    return [(visit.site.name, [given.batch for given in visit.inputs]) for visit in walk]


def test_a_batch_that_comes_late_is_reported() -> None:
    """It runs against the order of definition, so what it gives to the layer is missing, and said to be."""
    model = Branches()
    batches = [(torch.randn(3, 4), "right left"), (torch.randn(5, 4), "left")]
    sites = find_sites(model).sites
    with Walk(model, batches, sites, look_ahead=False) as walk:
        assert visits_of(walk) == [("start", [0, 1]), ("left", [1]), ("right", [0]), ("end", [0, 1])]
    assert walk.late == {"left": 3}
    assert walk.again == {}
    with Walk(model, batches, sites[1:3], look_ahead=False) as walk:  # also where nothing else is to come
        assert visits_of(walk) == [("left", [1]), ("right", [0])]
    assert walk.late == {"left": 3}


def test_looking_ahead_finds_the_order_of_execution() -> None:
    """Whatever the order of definition; each batch is run once more at most, and none where all wait at one site."""
    model = Branches()
    calls: list[str] = []
    model.start.register_forward_hook(lambda *_: calls.append("start"))

    def walked_through(*ways: str) -> list[tuple[str, list[int]]]:
        calls.clear()
        batches = [(torch.randn(3, 4), way) for way in ways]
        with Walk(model, batches, find_sites(model).sites, ended=lambda *_: None) as walk:
            visits = visits_of(walk)
        assert walk.late == {}
        return visits

    everyone = [0, 1]
    assert walked_through("right left", "left") == [
        ("start", everyone),
        ("right", [0]),
        ("left", everyone),
        ("end", everyone),
    ]
    assert len(calls) == 4
    assert walked_through("left", "right left")[1:3] == [("right", [1]), ("left", everyone)]
    assert walked_through("left right", "right")[1:3] == [("left", [0]), ("right", everyone)]
    assert len(calls) == 3  # the first batch alone says it
    walked_through("right left", "right left")
    assert len(calls) == 2
    # Two that exclude each other, and a third way that has neither.
    assert walked_through("left", "right", "never left", "never right", "") == [
        ("start", [0, 1, 2, 3, 4]),
        ("never", [2, 3]),
        ("left", [0, 2]),
        ("right", [1, 3]),
        ("end", [0, 1, 2, 3, 4]),
    ]
    assert len(calls) <= 10


def test_batches_that_run_against_each_other_cannot_all_be_right() -> None:
    model = Branches()
    batches = [(torch.randn(3, 4), "right left"), (torch.randn(5, 4), "left right")]
    with Walk(model, batches, find_sites(model).sites) as walk:
        assert visits_of(walk) == [("start", [0, 1]), ("left", [1]), ("right", [0, 1]), ("end", [0, 1])]
    assert walk.late == {"left": 3}


def test_an_error_while_looking_ahead_names_the_batch() -> None:
    model = Branches()
    with (
        pytest.raises(WalkError, match=r"batch 1 failed after it came to layer 'right': AttributeError"),
        Walk(model, [(torch.ones(1, 4), "left"), (torch.ones(1, 4), "right nowhere")], find_sites(model).sites) as walk,
    ):
        list(walk)
    assert left_behind(model) == []


class Voice(nn.Module):
    """Voxtral's order of definition: what leads from the audio tower to the language model stands behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 4)
        self.language = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.projector = nn.Linear(4, 4)

    def forward(self, text: Tensor, audio: Tensor | None = None) -> Tensor:
        if audio is not None:
            text = torch.cat([self.projector(self.tower(audio)), text])
        return self.language(text)  # type: ignore[no-any-return]


def test_batches_with_and_without_audio() -> None:
    model = Voice()
    audio = torch.randn(2, 4)
    batches = [{"text": torch.randn(3, 4)}, {"text": torch.randn(4, 4), "audio": audio}, {"text": torch.randn(5, 4)}]
    sites = find_sites(model).sites
    with Walk(model, batches, sites) as walk:
        visits = [(visit.site.name, [len(given.tokens()) for given in visit.inputs]) for visit in walk]
    assert visits == [("tower", [2]), ("projector", [2]), ("language.0", [3, 6, 5]), ("language.1", [3, 6, 5])]
    assert walk.late == {}


def test_a_site_that_is_left_out() -> None:
    model = Branches()
    batches = [(torch.randn(3, 4), "right left"), (torch.randn(5, 4), "right")]
    visits = []
    with Walk(model, batches, find_sites(model).sites) as walk:
        for visit in walk:
            visits.append(visit.site.name)
            if visit.site.name == "right":
                assert [site.name for site in walk.waiting] == ["right"]
                with pytest.raises(ValueError, match="at which no batch waits, but got 'right'"):
                    walk.leave_out(visit.site)
                for site in walk.unreached:
                    if site.name in ("left", "never"):
                        walk.leave_out(site)
        assert walk.unreached == ()
    assert visits == ["start", "right", "end"]
    assert walk.late == {"left": 3}


def test_a_layer_that_is_used_twice() -> None:
    """Its first use is what it is quantized for; later ones pass through, quantized, and are counted."""
    model = Branches()
    weights = []
    with Walk(model, [(torch.randn(3, 4), "left left left")], find_sites(model).sites) as walk:
        for visit in walk:
            if visit.site.name == "left":
                visit.site.write(torch.eye(4))
            weights.append((visit.site.name, visit.inputs[0].source.clone()))
    assert [name for name, _ in weights] == ["start", "left", "end"]
    assert walk.again == {"left": 6}
    expected = weights[1][1]
    for _ in range(3):
        expected = torch.tanh(expected + model.left.bias)
    torch.testing.assert_close(weights[2][1], expected)


def test_batches_that_end_early_and_empty_ones() -> None:
    model = Branches()
    batches = [(torch.randn(3, 4), "left stop"), (torch.randn(0, 4), "left"), (torch.randn(2, 4), "left")]
    with Walk(model, batches, find_sites(model).sites) as walk:
        visits = [(visit.site.name, [len(given.tokens()) for given in visit.inputs]) for visit in walk]
    assert visits == [("start", [3, 0, 2]), ("left", [3, 0, 2]), ("end", [0, 2])]


def test_no_batches_and_no_sites() -> None:
    model = Branches()
    with Walk(model, [], find_sites(model).sites) as walk:
        assert list(walk) == []
        assert len(walk.unreached) == 5
    with Walk(model, [(torch.randn(2, 4), "left")], []) as walk:
        assert list(walk) == []


# The end


def test_what_follows_the_last_site_is_not_run_unless_asked_for() -> None:
    model = Branches()
    calls: list[str] = []
    model.end.register_forward_hook(lambda *_: calls.append("end"))
    sites = find_sites(model).sites[:2]
    batches = [(torch.randn(3, 4), "left"), (torch.randn(2, 4), "left right")]
    with Walk(model, batches, sites) as walk:
        assert len(list(walk)) == 2
    assert calls == []
    outputs: dict[int, Tensor] = {}
    with Walk(model, batches, sites, ended=outputs.__setitem__) as walk:
        assert len(list(walk)) == 2
    assert calls == ["end", "end"]
    with torch.no_grad():
        for number, batch in enumerate(batches):
            assert torch.equal(outputs[number], model(*batch))


class Fails(nn.Module):
    def __init__(self, when: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.when = when
        self.left: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        try:
            for number, layer in enumerate(self.layers):
                if self.when == f"{number}:{len(x)}":
                    raise ZeroDivisionError("made up")
                x = layer(x)
        finally:
            self.left.append(str(len(x)))
        return x


def left_behind(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


@pytest.mark.parametrize(("when", "last"), [("0:2", None), ("1:2", "layers.0"), ("2:3", "layers.1")])
def test_an_error_names_batch_and_layer(when: str, last: str | None) -> None:
    model = Fails(when).train()
    batches = [torch.randn(n, 4) for n in (1, 2, 3)]
    where = "before it came to a layer" if last is None else f"after it came to layer '{last}'"
    walk = Walk(model, batches, find_sites(model).sites)
    number = int(when[-1]) - 1
    message = f"Walk: batch {number} failed {where}: ZeroDivisionError: made up"
    with pytest.raises(WalkError, match=message) as caught, walk:
        list(walk)
    assert caught.value.batch == number
    assert (caught.value.site.name if caught.value.site else None) == last
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert left_behind(model) == []
    assert all(module.training for module in model.modules())
    assert len(model.left) == sum(not (last is None and batch > number) for batch in range(3))  # batches that began


def test_an_interrupt_in_a_batch_comes_through() -> None:
    model = Fails("")
    model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), Walk(model, [torch.ones(1, 4)] * 2, find_sites(model).sites) as walk:
        list(walk)
    assert model.left == ["1", "1"]
    assert len(left_behind(model)) == 1  # the test's own


@pytest.mark.parametrize("how", ["break", "raise", "no visit", "close by hand"])
def test_everything_is_cleaned_up_when_the_consumer_stops(how: str) -> None:
    model = small_models.qwen3_moe().train()
    model.config.use_cache = True  # type: ignore[union-attr]
    implementation = model.config._experts_implementation  # type: ignore[union-attr]
    sites = find_sites(model).sites
    live: list[weakref.ref[Any]] = []

    def use() -> None:
        with Walk(model, small_models.text_batches(), sites) as walk:
            live.extend(weakref.ref(run) for run in walk._runs)
            if how == "no visit":
                return
            for count, visit in enumerate(walk):
                if count == 6:  # between experts, in the middle of a module
                    live.extend(weakref.ref(given.source) for given in visit.inputs)
                    if how == "break":
                        break
                    if how == "raise":
                        raise KeyError("consumer")
                    walk.__exit__(None, None, None)
                    assert list(walk) == []

    with pytest.raises(KeyError, match="consumer") if how == "raise" else nullcontext():
        use()
    gc.collect()
    assert all(ref() is None for ref in live)
    assert left_behind(model) == []
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is True  # type: ignore[union-attr]
    assert model.config._experts_implementation == implementation  # type: ignore[union-attr]
    assert all("gate_up_proj" not in vars(module) for module in model.modules())


def test_code_that_catches_everything_is_ended_too() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.caught = 0

        def forward(self, x: Tensor) -> None:
            for layer in self.layers:
                try:
                    layer(x)
                except BaseException:  # noqa: BLE001
                    self.caught += 1

    model = Stubborn()
    with Walk(model, [torch.ones(1, 4)], find_sites(model).sites) as walk:
        next(walk)
    assert model.caught == 4
    assert left_behind(model) == []


def test_inputs_are_dropped_as_soon_as_the_walk_goes_on() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    before: weakref.ref[Tensor] | None = None
    kept: list[Visit] = []
    with Walk(model, [torch.ones(5, 4)], find_sites(model).sites) as walk:
        for visit in walk:
            assert before is None or before() is None
            before = weakref.ref(visit.inputs[0].source) if kept else None  # the first is the test's own
            kept.append(visit)  # holding a visit holds no input
    assert [visit.inputs for visit in kept] == [[], [], []]


def test_what_is_kept_for_a_site_is_what_its_batches_hold_anyway() -> None:
    """An input lives as long as the call that waits, whether or not the walk keeps it too."""

    class Temporary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())  # type: ignore[no-any-return]

    model = Temporary()
    with Walk(model, [torch.ones(5, 4)] * 3, find_sites(model).sites) as walk:
        next(walk)
        visit = next(walk)
        inputs = [weakref.ref(given.source) for given in visit.inputs]
        visit.inputs.clear()
        for run in walk._runs:
            run.at = None
        gc.collect()
        assert all(ref() is not None for ref in inputs)
    gc.collect()
    assert all(ref() is None for ref in inputs)


def test_a_walk_goes_on_after_a_break() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with Walk(model, [torch.ones(5, 4)] * 2, find_sites(model).sites) as walk:
        first = None
        for visit in walk:
            first = visit
            break
        assert first is not None
        assert first.site.name == "0"
        assert [visit.site.name for visit in walk] == ["1", "2"]
        assert list(walk) == []


# State of torch


class Modes(nn.Module):
    """Pauses inside of blocks that change the thread's state; says what it is before and after each pause."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.log: list[tuple[str, tuple[Any, ...]]] = []

    def note(self, who: str) -> None:
        self.log.append((who, state()))

    def forward(self, x: Tensor, kind: str) -> None:
        blocks: dict[str, Callable[[], Any]] = {
            "grad": torch.enable_grad,
            "no_grad": torch.no_grad,
            "inference": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "no autocast": lambda: torch.autocast("cpu", enabled=False),
            "device": lambda: torch.device("meta"),
            "mode": Noted,
            "plain": nullcontext,
        }
        self.note(kind)
        self.layers[0](x)
        self.note(kind)
        with blocks[kind]():
            self.note(f"{kind} inside")
            self.layers[1](x)
            self.note(f"{kind} inside")
            with blocks["no_grad"](), blocks["autocast"]():
                self.note(f"{kind} innermost")
                self.layers[2](x)
                self.note(f"{kind} innermost")
            self.note(f"{kind} inside")
        self.note(kind)
        self.layers[3](x)
        self.note(kind)


class Noted(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.empty(1).device.type,
        len(torch.overrides._get_current_function_mode_stack()),
        torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutocastCPU),
        torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.ADInplaceOrView),
    )


@pytest.mark.parametrize("outside", ["plain", "inference", "autocast", "mode", "no_grad"])
def test_each_batch_has_its_own_state_of_torch(outside: str) -> None:
    kinds = ["grad", "autocast", "inference", "plain", "device", "no_grad", "mode", "no autocast"]
    blocks: dict[str, Callable[[], Any]] = {
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.float16),
        "mode": Noted,
        "no_grad": torch.no_grad,
        "plain": nullcontext,
    }

    def log(kinds: Sequence[str], *, ended: Any) -> list[tuple[str, tuple[Any, ...]]]:
        model = Modes()
        batches = [(torch.ones(1, 4), kind) for kind in kinds]
        with blocks[outside]():
            mine = state()
            with Walk(model, batches, find_sites(model).sites, ended=ended) as walk:
                for visit in walk:
                    assert state() == mine
                    visit.site.write(torch.zeros(4, 4))
            assert state() == mine
        return model.log

    before = state()
    together = log(kinds, ended=lambda *_: None)
    assert state() == before
    for kind in kinds:  # what a batch sees beside others is what it sees alone
        alone = log([kind], ended=lambda *_: None)
        assert [entry for entry in together if entry[0].split(" in")[0] == kind] == alone
        assert alone[0] == alone[1] == alone[-1]
        assert alone[2] == alone[3] == alone[6]
        assert not alone[0][1][0]  # no gradients
    log(kinds, ended=None)  # ended where they wait, inside of their blocks
    assert state() == before


def test_each_batch_has_its_own_context_variables() -> None:
    """It sees those of the caller, and what it sets is its own."""
    variable = contextvars.ContextVar("variable", default="none")

    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.seen: list[tuple[str, str, str]] = []

        def forward(self, x: Tensor, name: str) -> None:
            before = variable.get()
            token = variable.set(name)
            self.first(x)
            inside = variable.get()
            variable.reset(token)
            self.second(x)
            self.seen.append((before, inside, variable.get()))

    model = Sets()
    token = variable.set("caller")
    batches = [(torch.ones(1, 4), name) for name in "abc"]
    with Walk(model, batches, find_sites(model).sites, ended=lambda *_: None) as walk:
        for _ in walk:
            assert variable.get() == "caller"
    variable.reset(token)
    assert model.seen == [("caller", name, "caller") for name in "abc"]


def test_autocast_uses_weights_as_they_are_now() -> None:
    """Autocast keeps weights in its cache, as they were before they were replaced."""

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.end = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
                self.layer(x)
                return self.end(self.layer(x))  # type: ignore[no-any-return]

    model = Autocast()
    given: list[Given] = []
    with Walk(model, [torch.ones(1, 4)], find_sites(model).sites) as walk:
        for visit in walk:
            if visit.site.name == "layer":
                visit.site.write(torch.eye(4))
            else:
                given += visit.inputs
    assert torch.equal(given[0].source, torch.ones(1, 4).bfloat16())


def test_the_model_may_run_in_between() -> None:
    """Whoever takes the sites may evaluate the model, and another thread may use it: they do not pause."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    outputs: list[Tensor] = []
    with Walk(model, [torch.ones(5, 4)] * 2, find_sites(model).sites) as walk:
        for _ in walk:
            outputs.append(model(torch.ones(1, 4)))
            thread = threading.Thread(target=lambda: outputs.append(model(torch.ones(1, 4))))
            thread.start()
            thread.join()
    assert len(outputs) == 6
    assert all(torch.equal(output, outputs[0]) for output in outputs)


# What is put back


def test_no_dropout_no_cache_and_no_gradients() -> None:
    model: Any = MODELS["llama"][0]().train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    outputs: list[Any] = []
    with Walk(
        model, small_models.text_batches(), find_sites(model).sites, ended=lambda _, o: outputs.append(o)
    ) as walk:
        for visit in walk:
            assert not any(given.source.requires_grad for given in visit.inputs)
    assert all(output.past_key_values is None for output in outputs)
    with torch.no_grad():
        for batch, output in zip(small_models.text_batches(), outputs, strict=True):
            assert torch.equal(model.eval()(**batch).logits, output.logits)
    assert model.config.use_cache


def test_compiled_modules_run_as_written() -> None:
    torch.compile  # noqa: B018  (imports what a compiled model needs)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    compiled: Any = torch.compile(model, backend="eager")
    with Walk(compiled, [torch.ones(1, 4)] * 2, find_sites(compiled).sites) as walk:
        assert [visit.site.name for visit in walk] == ["_orig_mod.0", "_orig_mod.1"]
    assert torch.equal(compiled(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_batches_of_every_form() -> None:
    model = Branches()
    x = torch.ones(2, 4)
    sites = find_sites(model).sites[:1]
    for batches in ([(x, "left")], [[x, "left"]], [{"x": x, "ways": "left"}], iter([(x, "left")])):
        with Walk(model, batches, sites) as walk:
            assert [visit.inputs[0].source.shape for visit in walk] == [(2, 4)]
    with Walk(model, [x], sites, forward=lambda model, x: model(x, "left")) as walk:
        assert len(list(walk)) == 1


# Bad arguments


def test_bad_arguments() -> None:
    model = Branches()
    sites = find_sites(model).sites
    x = torch.ones(2, 4)
    bad: Any = "model"
    with pytest.raises(TypeError, match=r"Walk: expected model to be a torch.nn.Module, but got str"):
        Walk(bad, [x], sites)
    for one, kind in ((x, "Tensor"), ({"x": x}, "dict"), ("text", "str")):
        with pytest.raises(TypeError, match=f"Walk: expected batches to be an iterable of batches, but got one {kind}"):
            Walk(model, one, sites)
    with pytest.raises(ValueError, match="Walk: expected every site once, but got one twice"):
        Walk(model, [x], [*sites, sites[0]])
    with pytest.raises(ValueError, match="Walk: expected a mask or None for each of 2 batches, but got 1"):
        Walk(model, [x, x], sites, masks=[None])
    for mask, got in ((torch.ones(2), r"shape \[2\]"), ("mask", "str")):
        masks: Any = [None, mask]
        with (
            pytest.raises(ValueError, match=rf"expected the mask of batch 1 to be a tensor \[B, T\], but got {got}"),
            Walk(model, [x, x], sites, masks=masks),
        ):
            pass
    walk = Walk(model, [x], sites)
    with pytest.raises(RuntimeError, match="expected to be entered"):
        next(walk)
    with walk, pytest.raises(RuntimeError, match="expected to be entered once"), walk:
        pass
    assert left_behind(model) == []


def test_copies_of_models_walk_alike() -> None:
    """Two walks at a time, over two models, in turns."""
    first, second = Branches(), Branches()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    batches = [(torch.randn(3, 4), "left right"), (torch.randn(5, 4), "right")]
    with (
        Walk(first, batches, find_sites(first).sites) as one,
        Walk(second, batches, find_sites(second).sites) as other,
    ):
        for left, right in zip(one, other, strict=True):
            assert left.site.name == right.site.name
            for a, b in zip(left.inputs, right.inputs, strict=True):
                assert torch.equal(a.source, b.source)
