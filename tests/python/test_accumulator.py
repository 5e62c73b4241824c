"""The accumulator: the state after a rejected batch, masks, weights, merging, saving, threads, and its operators."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import miniquant
from miniquant import HessianAccumulator

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAN, INF = float("nan"), float("inf")
ACCUMULATOR_OPS = ("accumulator_update_", "accumulator_merge_", "accumulator_hessian", "accumulator_tokens")


def tokens_of(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hessian_of(inputs: Tensor) -> Tensor:
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat.T @ flat / len(flat)


def accumulated(inputs: Tensor, *, halves: bool = False, **update: Any) -> HessianAccumulator:
    accumulator = HessianAccumulator(inputs.shape[-1], inputs.dtype, halves=halves)
    accumulator.update(inputs, **update)
    return accumulator


def with_one(inputs: Tensor, value: float, *index: int) -> Tensor:
    out = inputs.clone()
    out[index] = value
    return out


def assert_refused(accumulator: HessianAccumulator, message: str, call: Callable[[], object], error: Any) -> None:
    """Checks that the call raises exactly this error and leaves the accumulator unchanged."""
    before = accumulator.state_dict()
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).split("\n")[0] == f"HessianAccumulator: expected {message}"
    after = accumulator.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# A refused call


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    ("shape", "index"), [((2, 2), (1, 0)), ((3, 5, 2), (2, 4, 1)), ((2,), (1,)), ((4, 2), (0, 0)), ((9, 2), (8, 1))]
)
def test_a_batch_that_is_not_finite_changes_nothing(
    halves: bool, shape: tuple[int, ...], index: tuple[int, ...]
) -> None:
    """The batch of the report: the first half of it is good."""
    accumulator = HessianAccumulator(2, halves=halves)
    accumulator.update(torch.ones(1, 2))
    for value, shown in ((NAN, "nan"), (INF, "inf"), (-INF, "-inf")):
        batch = with_one(torch.ones(shape), value, *index)
        message = f"inputs to be finite, but got {shown} at {list(index)}"
        assert_refused(accumulator, message, partial(accumulator.update, batch), ValueError)
    assert accumulator.tokens == 1


def test_products_that_overflow_change_nothing() -> None:
    accumulator = HessianAccumulator(3, halves=True)
    accumulator.update(torch.ones(2, 3))
    batch = with_one(torch.ones(4, 3), 1e30, 3, 1)
    message = (
        "inputs whose products keep the sums finite in float32 (float64 sums have a larger range), "
        "but got 1e+30 at [3, 1]"
    )
    assert_refused(accumulator, message, lambda: accumulator.update(batch), ValueError)
    wide = accumulated(batch.double())
    assert wide.hessian().isfinite().all()
    assert_refused(
        wide,
        "inputs whose products keep the sums finite in float64, but got 1e+200 at [0, 0]",
        lambda: wide.update(torch.full((1, 3), 1e200, dtype=torch.float64)),
        ValueError,
    )


def test_a_sum_overflows_by_many_batches_only_when_it_does() -> None:
    accumulator = HessianAccumulator(1)
    batch = torch.full((1, 1), 1e19)  # 1e38: three fit in float32, a fourth does not
    for _ in range(3):
        accumulator.update(batch)
    with pytest.raises(ValueError, match="inputs whose products keep the sums finite in float32"):
        accumulator.update(batch)
    assert accumulator.tokens == 3
    assert accumulator.hessian().item() == pytest.approx(1e38)


def test_hessian_update_refuses_before_it_changes() -> None:
    hessian = torch.eye(2)
    with pytest.raises(
        ValueError, match=r"hessian_update_: expected inputs whose products.* but got 1e\+20 at \[1, 0\]"
    ):
        miniquant.hessian_update_(hessian, with_one(torch.ones(2, 2), 1e20, 1, 0))
    assert torch.equal(hessian, torch.eye(2))
    with pytest.raises(
        ValueError, match=r"hessian_update_: expected the diagonal of hessian to be finite, but got inf"
    ):
        miniquant.hessian_update_(torch.full((2, 2), INF), torch.ones(2, 2))


def test_inference_mode() -> None:
    """An accumulator made in inference mode can be updated outside, and the other way round."""
    with torch.inference_mode():
        inside = HessianAccumulator(2)
        inside.update(torch.ones(3, 2))
    inside.update(torch.ones(3, 2))
    with torch.inference_mode():
        inside.update(torch.ones(3, 2))
        loaded = HessianAccumulator(2)
        loaded.load_state_dict(inside.state_dict())
    loaded.update(torch.ones(1, 2))
    assert (inside.tokens, loaded.tokens) == (9, 10)
    assert torch.equal(inside.hessian(), torch.ones(2, 2))
    with torch.inference_mode():
        hessian = torch.zeros(2, 2)
        miniquant.hessian_update_(hessian, torch.ones(3, 2))
    with pytest.raises(ValueError, match="expected hessian to be a normal tensor outside inference mode"):
        miniquant.hessian_update_(hessian, torch.ones(3, 2))
    assert torch.equal(hessian, torch.full((2, 2), 3.0))


# Masks and weights


@pytest.mark.parametrize("halves", [False, True])
def test_a_mask_leaves_padding_out(halves: bool) -> None:
    """Right-padded texts, with arbitrary values in the padding."""
    inputs = tokens_of(4, 6, 5)
    lengths = torch.tensor([6, 3, 1, 0])
    mask = torch.arange(6) < lengths[:, None]
    padded = inputs.masked_fill(~mask[..., None], NAN)
    accumulator = accumulated(padded, halves=halves, mask=mask)
    expected = accumulated(inputs[mask], halves=halves)
    assert accumulator.tokens == 10
    assert torch.equal(accumulator.hessian(), expected.hessian())
    torch.testing.assert_close(accumulator.hessian(), hessian_of(inputs[mask]), rtol=1e-13, atol=1e-14)


def test_positions_are_those_of_the_batch_with_its_padding() -> None:
    mask = torch.tensor([[False, True, True]])
    batch = with_one(with_one(torch.ones(1, 3, 2), NAN, 0, 0, 0), NAN, 0, 2, 1)
    accumulator = HessianAccumulator(2)
    message = "inputs to be finite, but got nan at [0, 2, 1]"
    assert_refused(accumulator, message, lambda: accumulator.update(batch, mask=mask), ValueError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("halves", [False, True])
def test_weights(dtype: torch.dtype, halves: bool) -> None:
    # More than one pass of the product takes.
    inputs, weights = tokens_of(1500, 17, dtype=dtype), torch.rand(1500, dtype=dtype)
    weights[5] = 0
    accumulator = accumulated(inputs, halves=halves, token_weights=weights)
    wide, w = inputs.double(), weights.double()
    expected = (wide * w[:, None]).T @ wide / w.sum()
    tolerance = 50 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(accumulator.hessian().double(), expected, rtol=0.0, atol=tolerance)
    assert accumulator.tokens == 1499
    assert accumulator.effective_tokens == pytest.approx(float(w.sum() ** 2 / w.square().sum()), rel=1e-12)
    if halves:
        total = sum(accumulator.half(i).double() * w[kept].sum() for i, kept in enumerate(halves_of(w > 0)))
        torch.testing.assert_close(total / w.sum(), expected, rtol=0.0, atol=tolerance)


def halves_of(counted: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of one batch that an accumulator puts in either half."""
    kept = counted.nonzero().squeeze(1)
    cut = (len(kept) + 1) // 2
    return kept[:cut], kept[cut:]


def test_weights_of_one_are_no_weights() -> None:
    inputs = tokens_of(3, 7, 5)
    weighted = accumulated(inputs, token_weights=torch.ones(3, 7))
    assert torch.equal(weighted.hessian(), accumulated(inputs).hessian())
    assert weighted.effective_tokens == weighted.tokens == 21


def test_mask_and_weights_together() -> None:
    inputs, mask = tokens_of(3, 5), torch.tensor([True, False, True])
    weights = torch.tensor([2.0, NAN, 1.0])  # that of a masked token is not looked at
    accumulator = accumulated(inputs, mask=mask, token_weights=weights)
    expected = accumulated(inputs[mask], token_weights=weights[mask])
    assert torch.equal(accumulator.hessian(), expected.hessian())


def test_only_masked_tokens_count_nothing() -> None:
    accumulator = accumulated(tokens_of(3, 4), mask=torch.zeros(3, dtype=torch.bool))
    accumulator.update(tokens_of(3, 4), token_weights=torch.zeros(3))
    assert (accumulator.tokens, accumulator.effective_tokens) == (0, 0)


BAD_UPDATES: list[tuple[dict[str, Any], str, Any]] = [
    (
        {"mask": torch.ones(2, dtype=torch.int64)},
        "mask to be bool, true for tokens that count, but got int64",
        TypeError,
    ),
    (
        {"mask": torch.ones(3, dtype=torch.bool)},
        "mask to have the shape of the tokens, [2] for inputs of shape [2, 4], but got shape [3]",
        ValueError,
    ),
    (
        {"token_weights": torch.ones(2, dtype=torch.int64)},
        "token_weights to be floating point, but got int64",
        TypeError,
    ),
    (
        {"token_weights": torch.ones(2, 1)},
        "token_weights to have the shape of the tokens, [2] for inputs of shape [2, 4], but got shape [2, 1]",
        ValueError,
    ),
    (
        {"token_weights": torch.tensor([1, -0.5])},
        "token_weights to be finite and not negative, but got -0.5 at [1]",
        ValueError,
    ),
    (
        {"token_weights": torch.tensor([NAN, 1])},
        "token_weights to be finite and not negative, but got nan at [0]",
        ValueError,
    ),
    ({"inputs": torch.ones(2, 3)}, "inputs to have shape [..., K] = [..., 4], but got shape [2, 3]", ValueError),
    ({"inputs": torch.tensor(1.0)}, "inputs to have shape [..., K] = [..., 4], but got shape []", ValueError),
    (
        {"inputs": torch.ones(2, 4, dtype=torch.int32)},
        "inputs to be float32, float64, bfloat16 or float16, but got int32",
        TypeError,
    ),
]


@pytest.mark.parametrize(
    ("changes", "message", "error"), BAD_UPDATES, ids=[message[:40] for _, message, _ in BAD_UPDATES]
)
def test_bad_updates(changes: dict[str, Any], message: str, error: Any) -> None:
    accumulator = accumulated(torch.ones(3, 4))
    arguments = {"inputs": torch.ones(2, 4), **changes}
    assert_refused(accumulator, message, lambda: accumulator.update(**arguments), error)


# Precision


@pytest.mark.parametrize("halves", [False, True])
def test_three_products_of_bfloat16_values_are_near_those_of_float32(halves: bool) -> None:
    inputs, weights = tokens_of(300, 40, dtype=torch.float32), torch.rand(300, dtype=torch.float64)
    accumulator = HessianAccumulator(40, halves=halves, precision="bf16x3")
    assert accumulator.precision == "bf16x3"
    accumulator.update(inputs, token_weights=weights)
    wide, magnitudes = inputs.double(), inputs.double().abs()
    error = (accumulator.hessian().double() - wide.T @ (weights[:, None] * wide) / weights.sum()).abs()
    assert (error <= 1.3e-4 * magnitudes.T @ (weights[:, None] * magnitudes) / weights.sum()).all()
    hessian = torch.zeros(40, 40)
    miniquant.hessian_update_(hessian, inputs, precision="bf16x3")
    again = HessianAccumulator(40, precision="bf16x3")
    again.update(inputs)
    assert torch.equal(hessian / 300, again.hessian())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_inputs_of_other_dtypes_are_not_touched_by_it(dtype: torch.dtype) -> None:
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = tokens_of(300, 40).to(dtype)
    one, other = HessianAccumulator(40, sums), HessianAccumulator(40, sums, precision="bf16x3")
    one.update(inputs)
    other.update(inputs)
    assert torch.equal(one.hessian(), other.hessian())


def test_another_precision_is_refused() -> None:
    with pytest.raises(
        ValueError, match="HessianAccumulator: expected precision to be 'full' or 'bf16x3', but got 'b'"
    ):
        HessianAccumulator(4, precision="b")  # type: ignore[arg-type]
    hessian = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="hessian_update_: expected precision to be 'full' or 'bf16x3', but got 'b'"):
        miniquant.hessian_update_(hessian, tokens_of(3, 4), precision="b")  # type: ignore[arg-type]
    assert torch.equal(hessian, torch.zeros(4, 4))


# Merging, saving, going on


@pytest.mark.parametrize("halves", [False, True])
def test_merge_is_the_sum(halves: bool) -> None:
    inputs, weights = tokens_of(30, 6), torch.rand(30, dtype=torch.float64)
    first = accumulated(inputs[:11], halves=halves, token_weights=weights[:11])
    second = accumulated(inputs[11:], halves=halves, token_weights=weights[11:])
    first.merge(second)
    expected = accumulated(inputs, token_weights=weights)
    torch.testing.assert_close(first.hessian(), expected.hessian(), rtol=1e-13, atol=1e-14)
    assert first.tokens == 30
    assert first.effective_tokens == pytest.approx(expected.effective_tokens)
    assert second.tokens == 19
    if halves:
        assert [first.half_tokens(0), first.half_tokens(1)] == [6 + 10, 5 + 9]
    first.merge(first)
    assert first.tokens == 60
    torch.testing.assert_close(first.hessian(), expected.hessian(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("columns", [1, 40, 256, 300, 600])
@pytest.mark.parametrize("halves", [False, True])
def test_a_sum_over_processes_is_that_of_the_whole_sums(columns: int, halves: bool) -> None:
    mine, other = (accumulated(tokens_of(50, columns, seed=seed), halves=halves) for seed in (1, 2))
    expected = accumulated(tokens_of(50, columns, seed=1), halves=halves)
    expected.merge(other)
    theirs: list[Tensor] = []
    other.merge_over(lambda *tensors: theirs.extend(tensor.clone() for tensor in tensors))

    def total(*tensors: Tensor) -> None:
        for one, two in zip(tensors, theirs, strict=True):
            one.add_(two)

    mine.merge_over(total)
    for one, two in zip(mine.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert theirs[0].numel() <= (1 + halves) * columns * (columns + 256) / 2  # not both triangles


def test_what_cannot_be_merged() -> None:
    accumulator = accumulated(torch.ones(3, 4))
    for other, message in (
        (HessianAccumulator(5), "[1, 4, 4] (in_features, and halves kept apart or not), but got shape [1, 5, 5]"),
        (
            HessianAccumulator(4, halves=True),
            "[1, 4, 4] (in_features, and halves kept apart or not), but got shape [2, 4, 4]",
        ),
    ):
        expected = f"other sums to have the shape of the sums {message}"
        assert_refused(accumulator, expected, partial(accumulator.merge, other), ValueError)
    assert_refused(
        accumulator,
        "other sums to have the dtype of the sums (float32), but got float64",
        lambda: accumulator.merge(HessianAccumulator(4, torch.float64)),
        TypeError,
    )
    assert_refused(
        accumulator,
        "other to be a HessianAccumulator, but got Tensor",
        lambda: accumulator.merge(torch.eye(4)),  # type: ignore[arg-type]
        TypeError,
    )
    large = accumulated(torch.full((1, 1), 1.5e19))
    assert_refused(
        large,
        "other sums to be finite when added, but got 4.5e+38 at [0]",
        lambda: large.merge(accumulated(torch.full((1, 1), 1.5e19))),
        ValueError,
    )


@pytest.mark.parametrize("halves", [False, True])
def test_the_state_goes_through_a_file(halves: bool, tmp_path: Path) -> None:
    inputs = tokens_of(20, 4, dtype=torch.float32)
    accumulator = accumulated(inputs[:9], halves=halves)
    torch.save(accumulator.state_dict(), tmp_path / "state.pt")
    loaded = HessianAccumulator(4, halves=halves)
    loaded.update(tokens_of(3, 4, seed=1))  # replaced
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (accumulator, loaded):
        one.update(inputs[9:])
    assert torch.equal(loaded.hessian(), accumulator.hessian())
    assert loaded.tokens == 20


def test_a_state_is_a_copy_and_copies_are_apart() -> None:
    accumulator = accumulated(torch.ones(3, 4))
    state, deep, pickled = accumulator.state_dict(), copy.deepcopy(accumulator), pickle.dumps(accumulator)
    accumulator.update(torch.zeros(3, 4))
    assert int(state["tokens"]) == deep.tokens == pickle.loads(pickled).tokens == 3  # noqa: S301
    assert torch.equal(state["sums"][0], torch.full((4, 4), 3.0))


BAD_STATES: list[tuple[dict[str, Any], str, Any]] = [
    ({"sums": None}, "a state of sums, tokens, weights, but got tokens, weights", ValueError),
    ({"more": torch.ones(1)}, "a state of sums, tokens, weights, but got sums, tokens, weights, more", ValueError),
    ({"tokens": 3}, "tokens of the state to be a Tensor, but got int", TypeError),
    ({"tokens": torch.tensor([3.0])}, "other tokens to be int64, but got float32", TypeError),
    ({"tokens": torch.tensor([-1])}, "other tokens to be not negative, but got -1 at [0]", ValueError),
    (
        {"tokens": torch.tensor([3, 4])},
        "other tokens to have shape [1], one for each sum, but got shape [2]",
        ValueError,
    ),
    ({"weights": torch.ones(2, 1)}, "other weights to be float64, but got float32", TypeError),
    (
        {"weights": torch.zeros(2, 1, dtype=torch.float64)},
        "other weights to be finite, and positive where there are tokens, but got 0 at [0, 0]",
        ValueError,
    ),
    ({"sums": torch.full((1, 4, 4), NAN)}, "other sums to be finite, but got nan at [0, 0, 0]", ValueError),
    (
        {"sums": torch.ones(4, 4)},
        "other sums to have shape [1, K, K], or [2, K, K] where halves are kept apart, but got shape [4, 4]",
        ValueError,
    ),
]


@pytest.mark.parametrize(
    ("changes", "message", "error"), BAD_STATES, ids=[message[:45] for _, message, _ in BAD_STATES]
)
def test_bad_states(changes: dict[str, Any], message: str, error: Any) -> None:
    accumulator = accumulated(torch.ones(3, 4))
    state: dict[str, Any] = {**accumulator.state_dict(), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    assert_refused(accumulator, message, lambda: accumulator.load_state_dict(state), error)


def test_goes_on_from_sums() -> None:
    inputs = tokens_of(20, 4)
    whole = HessianAccumulator.from_sums(inputs[:9].T @ inputs[:9], 9)
    whole.update(inputs[9:])
    torch.testing.assert_close(whole.hessian(), hessian_of(inputs), rtol=1e-13, atol=1e-14)
    apart = HessianAccumulator.from_sums(torch.stack([x.T @ x for x in inputs.split(10)]), [10, 10])
    torch.testing.assert_close(apart.half(1), hessian_of(inputs[10:]), rtol=1e-13, atol=1e-14)
    assert (apart.tokens, apart.half_tokens(0), apart.halves, apart.in_features) == (20, 10, True, 4)
    with pytest.raises(ValueError, match=r"expected tokens to have shape \[1\], one for each sum"):
        HessianAccumulator.from_sums(torch.eye(4), [1, 2])
    with pytest.raises(TypeError, match="expected sums to be a Tensor, but got list"):
        HessianAccumulator.from_sums([[1.0]], 1)  # type: ignore[arg-type]


def test_halves_in_proportion_take_less_memory() -> None:
    inputs, weights = tokens_of(20, 4), torch.ones(20)
    accumulator = HessianAccumulator(4, torch.float64, halves=True)
    with pytest.raises(ValueError, match="at least one token in each half, but got 0 in total"):
        accumulator.proportional_halves()
    accumulator.update(inputs[:1])
    with pytest.raises(ValueError, match="at least one token in each half, but got 1 in total"):
        accumulator.proportional_halves()
    accumulator.update(inputs[1:2])
    first, second = accumulator.proportional_halves()
    accumulator.update(inputs[2:3])
    accumulator.update(inputs[3:4])
    torch.testing.assert_close(first, 2 * accumulator.half(0))  # they are what updates add to
    torch.testing.assert_close(second, 2 * accumulator.half(1))
    weights[4:] = 3.0
    accumulator.update(inputs[4:9], token_weights=weights[4:9])
    first, second = accumulator.proportional_halves()
    total = [accumulator.state_dict()["weights"][0, half] for half in range(2)]
    assert total[0] != total[1]
    for one, half in ((first, 0), (second, 1)):
        torch.testing.assert_close(one, total[0] * accumulator.half(half))
    with pytest.raises(ValueError, match="halves that are kept apart"):
        accumulated(inputs).proportional_halves()


# Threads


@pytest.mark.parametrize("halves", [False, True])
def test_threads_may_share_an_accumulator(halves: bool) -> None:
    threads, batches, shape = 8, 40, (7, 48)
    inputs = tokens_of(*shape).round()  # sums of integers are exact in any order
    accumulator = HessianAccumulator(48, torch.float64, halves=halves)
    total = HessianAccumulator(48, torch.float64, halves=halves)
    hessian = torch.zeros(48, 48, dtype=torch.float64)
    mine = [HessianAccumulator(48, torch.float64, halves=halves) for _ in range(threads)]
    start = threading.Barrier(threads)

    def work(own: HessianAccumulator) -> None:
        start.wait()
        for _ in range(batches):
            accumulator.update(inputs)
            own.update(inputs)
            miniquant.hessian_update_(hessian, inputs)
            read = accumulator.hessian()  # of whole batches alone
            assert torch.equal(read, inputs.T @ inputs / 7)
        total.merge(own)

    workers = [threading.Thread(target=work, args=(own,)) for own in mine]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert accumulator.tokens == total.tokens == threads * batches * 7
    expected = inputs.T @ inputs
    assert torch.equal(accumulator.state_dict()["sums"].sum(0), threads * batches * expected)
    assert torch.equal(total.state_dict()["sums"].sum(0), threads * batches * expected)
    assert torch.equal(hessian, threads * batches * expected)


# The operators


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("op", ACCUMULATOR_OPS)
def test_opcheck(op: str, halves: bool) -> None:
    state = accumulated(tokens_of(9, 4), halves=halves).state_dict()
    other = accumulated(tokens_of(5, 4), halves=halves).state_dict()
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "accumulator_update_": [
            ((tokens_of(3, 4),), {}),
            ((tokens_of(2, 3, 4),), {"mask": torch.rand(2, 3) > 0.5, "token_weights": torch.rand(2, 3)}),
            ((tokens_of(3, 4),), {"precision": "bf16x3"}),
        ],
        "accumulator_merge_": [(tuple(other.values()), {})],
        "accumulator_hessian": [((), {}), *([((), {"half": 1})] if halves else [])],
        "accumulator_tokens": [((), {}), *([((), {"half": 0})] if halves else [])],
    }
    for arguments, options in calls[op]:
        fresh = tuple(tensor.clone() for tensor in state.values())
        torch.library.opcheck(getattr(torch.ops.miniquant, op).default, (*fresh, *arguments), options)


def test_updates_inside_a_compiled_function() -> None:
    accumulator = HessianAccumulator(4, torch.float64, halves=True)
    torch.compiler.reset()

    def layer(inputs: Tensor) -> Tensor:
        accumulator.update(inputs)
        return inputs * 2

    inputs = tokens_of(9, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(inputs), inputs * 2)
    expected = accumulated(inputs, halves=True)
    expected.update(inputs)
    assert accumulator.tokens == 18
    assert torch.equal(accumulator.hessian(), expected.hessian())


def test_autograd_sees_updates_and_records_none() -> None:
    accumulator = HessianAccumulator(4)
    versions = [tensor._version for tensor in accumulator._state]
    accumulator.update(torch.ones(3, 4, requires_grad=True))
    assert not accumulator.hessian().requires_grad
    assert all(tensor._version > version for tensor, version in zip(accumulator._state, versions, strict=True))
