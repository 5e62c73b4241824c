"""What in a model can be quantized: finding, reading and writing weights, their inputs, and what is left alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import small_models
from miniquant.modules import ExpertSite, LeftAlone, Site, find_sites, watch

if TYPE_CHECKING:
    from collections.abc import Callable

transformers = pytest.importorskip("transformers")


def names(model: nn.Module, **options: bool) -> list[str]:
    return [site.name for site in find_sites(model, **options).sites]


def reasons(model: nn.Module, **options: bool) -> dict[str, str]:
    return {one.name: one.reason for one in find_sites(model, **options).left_alone}


def inputs_of(model: nn.Module, sites: tuple[Site, ...], *arguments: Any) -> dict[str, list[Tensor]]:
    """What :func:`watch` says that each site is given."""
    given: dict[str, list[Tensor]] = {}
    with torch.no_grad(), watch(sites, lambda site, source: given.setdefault(site.name, []).append(source)):
        model(*arguments)
    return given


# Kinds


class OfALinear(nn.Linear):
    """A subclass, as adapters and libraries have them."""


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": OfALinear(5, 7), "down": nn.Linear(7, 5)}) for _ in range(2))
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))  # type: ignore[index]  # a ModuleDict
        return self.norm(x)  # type: ignore[no-any-return]


def test_linears_in_order_of_definition() -> None:
    model = Blocks()
    assert names(model) == ["first", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert reasons(model) == {}
    site = find_sites(model).sites[1]
    assert (site.rows, site.columns, site.dtype, site.parameter_name) == (7, 5, torch.float32, "blocks.0.up.weight")
    assert torch.equal(site.read(), model.blocks[0]["up"].weight)  # type: ignore[index]


def test_reading_gives_a_copy_and_writing_keeps_the_parameter() -> None:
    model = nn.Linear(4, 3).to(torch.bfloat16)
    (site,) = find_sites(model).sites
    parameter, before = model.weight, site.read()
    site.write(torch.full((3, 4), 1 / 3))
    assert model.weight is parameter
    assert torch.equal(model.weight, torch.full((3, 4), 1 / 3).bfloat16())
    assert not torch.equal(before, site.read())
    assert site.name == ""
    assert site.parameter_name == "weight"
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_weights_made_in_inference_mode_are_written() -> None:
    with torch.inference_mode():
        model = nn.Linear(4, 3)
    (site,) = find_sites(model).sites
    site.write(torch.ones(3, 4))
    assert torch.equal(model.weight, torch.ones(3, 4))


def test_writing_refuses_other_shapes_and_weights_without_memory() -> None:
    model = Blocks()
    site = find_sites(model).sites[0]
    before = site.read()
    with pytest.raises(ValueError, match=r"expected values for 'first' to have shape \[5, 6\], but got shape \[6, 5\]"):
        site.write(torch.zeros(6, 5))
    assert torch.equal(before, site.read())
    with torch.device("meta"):
        model = Blocks()
    assert names(model) == names(Blocks())
    with pytest.raises(ValueError, match="expected 'first' to have memory to write to, but got device meta"):
        find_sites(model).sites[0].write(torch.zeros(5, 6))


def test_conv1d_of_transformers_is_a_transposed_linear() -> None:
    module = transformers.pytorch_utils.Conv1D(5, 3)
    (site,) = find_sites(module).sites
    assert (site.rows, site.columns) == (5, 3)
    values = torch.arange(15.0).view(5, 3)
    site.write(values)
    assert torch.equal(module.weight, values.T)
    assert torch.equal(site.read(), values)
    assert site.read().is_contiguous()
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(site.tokens(x) @ values.T + module.bias, module(x))


CONVOLUTIONS: list[tuple[Callable[[], Any], tuple[int, ...]]] = [
    (lambda: nn.Conv1d(3, 5, 4), (2, 3, 11)),
    (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (2, 3, 10)),
    (lambda: nn.Conv1d(3, 5, 4, dilation=3, padding="same"), (2, 3, 14)),
    (lambda: nn.Conv1d(3, 5, 3, padding=2, padding_mode="circular"), (3, 9)),
    (lambda: nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 7, 9)),
    (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False), (3, 6, 5)),
    (lambda: nn.Conv2d(3, 4, 4, stride=4).to(memory_format=torch.channels_last), (1, 3, 8, 8)),  # type: ignore[call-overload]
    (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1), padding_mode="replicate"), (2, 2, 3, 4, 5)),
]


@pytest.mark.parametrize(("build", "shape"), CONVOLUTIONS)
def test_a_convolution_is_a_product_with_its_unfolded_inputs(build: Callable[[], Any], shape: tuple[int, ...]) -> None:
    module = build()
    (site,) = find_sites(module).sites
    x = torch.randn(shape)
    with torch.no_grad():
        expected = module(x)
        product = site.tokens(x) @ site.read().T
        if module.bias is not None:
            product = product + module.bias
        torch.testing.assert_close(product.movedim(-1, -len(module.kernel_size) - 1), expected)
        values = torch.randn(site.rows, site.columns)
        site.write(values)
        torch.testing.assert_close(module.weight.reshape(site.rows, -1), values, rtol=0, atol=0)
        assert torch.equal(site.read(), values)


def test_sites_of_equal_geometry() -> None:
    first, second, third = (find_sites(nn.Conv1d(3, 5, 3, padding=p)).sites[0] for p in (1, 1, 2))
    assert first.geometry == second.geometry != third.geometry


# Fused experts


def experts(kind: str = "mixtral") -> Any:
    model = small_models.MODELS[kind][0]()
    module: Any = model
    return module.model.layers[0].mlp.experts


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_each_expert_is_a_site(kind: str) -> None:
    module = experts(kind)
    sites = find_sites(module).sites
    assert [site.name for site in sites] == [
        f"{name}.{expert}" for expert in range(4) for name in ("gate_up_proj", "down_proj")
    ]
    site = sites[4]
    assert isinstance(site, ExpertSite)
    assert (site.expert, site.rows, site.columns, site.parameter_name) == (2, 96, 32, "gate_up_proj")
    before = module.gate_up_proj.detach().clone()
    values = torch.randn(96, 32)
    site.write(values)
    stored = values.T if kind == "gpt-oss" else values
    assert torch.equal(module.gate_up_proj[2], stored)
    assert torch.equal(site.read(), values)
    for other in (0, 1, 3):
        assert torch.equal(module.gate_up_proj[other], before[other])


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_given_the_tokens_routed_to_them(kind: str, implementation: str) -> None:
    module = experts(kind)
    module.config._experts_implementation = implementation
    hidden = torch.randn(10, 32)
    index = torch.stack([torch.arange(10) % 3, torch.full((10,), 3)], dim=1)  # expert 3 gets all
    weights = torch.rand(10, 2)
    sites = find_sites(module).sites
    with torch.no_grad():
        expected = module(hidden, index, weights)
    given: dict[str, Tensor] = {}
    with torch.no_grad(), watch(sites, lambda site, source: given.update({site.name: source})):
        assert module.gate_up_proj.shape == (4, 32, 96) if kind == "gpt-oss" else (4, 96, 32)
        torch.testing.assert_close(module(hidden, index, weights), expected)
    for expert in range(3):
        assert torch.equal(given[f"gate_up_proj.{expert}"], hidden[expert::3])
        first = hidden[expert::3] @ sites[2 * expert].read().T
        if kind == "mixtral":
            gate, up = first.chunk(2, dim=-1)
            torch.testing.assert_close(given[f"down_proj.{expert}"], functional.silu(gate) * up)
    assert torch.equal(given["gate_up_proj.3"], hidden)
    assert module.config._experts_implementation == implementation
    assert "gate_up_proj" not in vars(module)
    assert isinstance(module.gate_up_proj, nn.Parameter)


def test_a_written_expert_is_the_one_that_is_used() -> None:
    module = experts()
    hidden, index, weights = torch.randn(6, 32), torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1)

    def zero(site: Site, _: Tensor) -> None:
        site.write(torch.zeros(site.rows, site.columns))

    with torch.no_grad(), watch(find_sites(module).sites, zero):
        assert not module(hidden, index, weights).any()


class Stacked(nn.Module):
    """Experts of another library, that are stored one way or the other and used in different ways."""

    def __init__(self, use: str, *, transposed: bool) -> None:
        super().__init__()
        shapes = ((4, 6), (3, 4)) if transposed else ((6, 4), (4, 3))
        self.gate_up_proj = nn.Parameter(torch.randn(2, *shapes[0]))
        self.down_proj = nn.Parameter(torch.randn(2, *shapes[1]))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        uses: dict[str, Callable[[Tensor, Any], Tensor]] = {
            "bmm": torch.bmm,
            "matmul": lambda a, b: a @ b,
            "loop": lambda a, b: torch.stack([functional.linear(a[e], b[e]) for e in range(2)]),
            "loop over": lambda a, b: torch.stack([functional.linear(e, w) for e, w in zip(a, b, strict=True)]),
            "transposed loop": lambda a, b: torch.stack([a[e] @ b[e].T for e in range(2)]),
            "named": lambda a, b: torch.stack([functional.linear(a[e], weight=b[e]) for e in range(2)]),
            "einsum": lambda a, b: torch.einsum("etk,ekn->etn", a, b),
            "select": lambda a, b: a @ b[torch.tensor([0, 1])],
            "clone": lambda a, b: a @ b.clone(),
            "linear of all": functional.linear,
            "other way": lambda a, b: torch.stack([a[e] @ b[e].t().transpose(0, 1) for e in range(2)]),
        }
        first, second = uses[self.use](x, self.gate_up_proj).chunk(2, dim=-1)
        return uses[self.use](first * second, self.down_proj)


@pytest.mark.parametrize(
    ("use", "transposed"),
    [
        *(("bmm", True), ("matmul", True), ("other way", True)),
        *(("loop", False), ("loop over", False), ("transposed loop", False), ("named", False)),
    ],
)
def test_experts_without_the_decorator(use: str, transposed: bool) -> None:
    model = Stacked(use, transposed=transposed)
    sites = find_sites(model).sites
    assert [(site.rows, site.columns) for site in sites] == [(6, 4), (4, 3)] * 2
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        expected = model(x)
    given = inputs_of(model, sites, x)
    with torch.no_grad():
        for expert in range(2):
            (first,), (second,) = given[f"gate_up_proj.{expert}"], given[f"down_proj.{expert}"]
            assert torch.equal(first, x[expert])
            torch.testing.assert_close(second @ sites[2 * expert + 1].read().T, expected[expert])


@pytest.mark.parametrize(
    ("use", "transposed", "said"),
    [
        ("einsum", True, "einsum"),
        ("select", True, r"an index that is a tensor of shape \[2\]"),
        ("clone", True, r"\.clone"),
        ("linear of all", False, "linear"),
        ("other way", False, "matmul with the inputs along the other dimension"),
    ],
)
def test_experts_used_in_another_way_are_refused(use: str, transposed: bool, said: str) -> None:
    model = Stacked(use, transposed=transposed)
    sites = find_sites(model).sites
    with pytest.raises(TypeError, match=f"expected gate_up_proj to be used one expert at a time.*but got .*({said})"):
        inputs_of(model, sites, torch.randn(2, 5, 4))
    assert list(vars(model)["_parameters"]) == ["gate_up_proj", "down_proj"]
    assert isinstance(model.gate_up_proj, nn.Parameter)


# Shared and tied


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.same = self.one
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.one.weight
        self.by_memory = nn.Linear(4, 4)
        self.by_memory.weight.data = self.one.weight.data
        self.turned = nn.Linear(4, 4)
        self.turned.weight.data = self.one.weight.data.T

    def forward(self, x: Tensor) -> Tensor:
        return self.turned(self.by_memory(self.tied(self.same(self.one(x)))))  # type: ignore[no-any-return]


def test_shared_and_tied_weights_appear_once() -> None:
    model = Shared()
    found = find_sites(model)
    (site,) = found.sites
    assert site.name == "one"
    assert site.aliases == ("same", "tied", "by_memory")
    assert site.modules == (model.one, model.tied, model.by_memory)
    assert found.left_alone == (
        LeftAlone("turned.weight", (4, 4), "shares memory with one.weight, which lays it out otherwise"),
    )
    site.write(torch.eye(4))
    for module in (model.one, model.tied, model.by_memory):
        assert torch.equal(module.weight, torch.eye(4))
    assert len(inputs_of(model, found.sites, torch.ones(2, 4))["one"]) == 4  # every use


def test_tied_weights_on_meta_appear_once() -> None:
    with torch.device("meta"):
        model = Shared()
    assert names(model)[0] == "one"
    assert find_sites(model).sites[0].aliases[:2] == ("same", "tied")


@pytest.mark.parametrize("tie", [False, True])
def test_output_embeddings_only_where_asked_for(tie: bool) -> None:
    model = small_models.decoder("Llama", tie_word_embeddings=tie)
    assert "lm_head" not in names(model)
    text = "output embeddings: quantized only where asked for"
    assert reasons(model) == {
        "model.embed_tokens.weight": "an embedding",
        "lm_head.weight": f"{text}; the weight is also model.embed_tokens.weight" if tie else text,
    }
    assert names(model, output_embeddings=True) == [*names(model), "lm_head"]
    assert list(reasons(model, output_embeddings=True)) == ["model.embed_tokens.weight"]


def test_a_linear_tied_to_an_embedding_gives_output_embeddings_in_any_model() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "layer": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["embedding"].weight
    assert names(model) == ["layer"]
    assert "embedding.weight" in reasons(model)["head.weight"]


# Left alone


class Computed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_what_cannot_be_quantized_is_listed_with_the_reason() -> None:
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv1d(4, 8, 3, groups=2),
            "transposed": nn.ConvTranspose1d(4, 8, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "lstm": nn.LSTM(4, 4),
            "computed": nn.utils.parametrize.register_parametrization(nn.Linear(4, 4), "weight", Computed()),
            "packed": nn.Linear(4, 4),
            "eight": nn.Linear(4, 4).to(torch.float8_e4m3fn),
            "empty": nn.Linear(0, 4),
            "sparse": nn.Linear(4, 4),
            "lazy": nn.LazyLinear(4),
            "plain": nn.Linear(4, 4),
        }
    )
    model["packed"].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    model["sparse"].weight = nn.Parameter(torch.eye(4).to_sparse_csr(), requires_grad=False)
    assert names(model) == ["attention.out_proj", "plain"]
    unknown = "which is no kind of module that is known here"
    assert reasons(model) == {
        "grouped.weight": "a convolution with 2 groups, each with inputs of its own",
        "transposed.weight": f"a parameter of ConvTranspose1d, {unknown}",
        "attention.in_proj_weight": f"a parameter of MultiheadAttention, {unknown}",
        "lstm.weight_ih_l0": f"a parameter of LSTM, {unknown}",
        "lstm.weight_hh_l0": f"a parameter of LSTM, {unknown}",
        "computed.parametrizations.weight.original": f"a parameter of ParametrizationList, {unknown}",
        "packed.weight": "its weight is uint8",
        "eight.weight": "its weight is float8_e4m3fn",
        "empty.weight": "its weight is empty",
        "sparse.weight": "its weight has the layout sparse_csr",
    }


class Wrapped(Tensor):
    """A tensor that is not plain, as quantization and sharding libraries have them."""


def test_a_tensor_subclass_is_left_alone() -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Wrapped))
    assert names(model) == []
    assert reasons(model) == {"weight": "its weight is a test_modules.Wrapped, which is no plain tensor"}


def test_experts_of_unknown_orientation_are_left_alone() -> None:
    model = nn.Module()
    model.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 4))
    assert names(model) == []
    expected = "a parameter of Module, and which of its dimensions are the inputs is not known"
    assert reasons(model) == {"gate_up_proj": expected}


def test_a_model_that_is_none() -> None:
    model: Any = {"layer": nn.Linear(2, 2)}
    with pytest.raises(TypeError, match=r"find_sites: expected model to be a torch.nn.Module, but got dict"):
        find_sites(model)


# Watching


def test_watching_ends_with_its_block_also_after_an_error() -> None:
    model = Blocks()
    sites = find_sites(model).sites
    calls: list[str] = []

    def reached(site: Site, _: Tensor) -> None:
        calls.append(site.name)
        if site.name == "blocks.1.up":
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"), watch(sites, reached):
        model(torch.zeros(1, 6))
    assert calls == ["first", "blocks.0.up", "blocks.0.down", "blocks.1.up"]
    model(torch.zeros(1, 6))
    assert len(calls) == 4
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_copy_of_a_watched_model_is_none() -> None:
    """Only instance attributes and hooks are added, so what a model saves is the same while it is watched."""
    module = experts()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with watch(find_sites(module).sites, lambda *_: None):
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
        assert list(module.parameters()) == list(module._parameters.values())
    assert copy.deepcopy(module).gate_up_proj.shape == module.gate_up_proj.shape


def test_inputs_by_name_and_what_is_no_tensor() -> None:
    model = Blocks()
    sites = find_sites(model).sites
    given: list[Tensor] = []
    with watch(sites, lambda _, source: given.append(source)):
        model.first(input=torch.ones(1, 6))
        with pytest.raises(TypeError, match="expected Linear 'first' to be called with a tensor, but got list"):
            model.first([1.0])
    assert torch.equal(given[0], torch.ones(1, 6))
