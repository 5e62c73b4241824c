"""Perplexity, KL divergence, top tokens and embeddings, held against plain float64 computations."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import miniquant
from miniquant.calibration import load_calibration
from miniquant.evaluate import Estimate, Reference, compare_embeddings, evaluate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VOCABULARY, LENGTH = 97, 12
near: Any = pytest.approx


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config: Any = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    return model.eval()


def disturbed(model: Any, size: float = 0.05) -> Any:
    """A copy whose Linear weights have noise, as quantized ones have."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, nn.Linear):
                module.weight += size * torch.randn_like(module.weight) * module.weight.std()
    return other


class Fixed(nn.Module):
    """A model that looks its logits up: those of token t follow token t."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", logits)
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls += 1
        table: Any = self.table
        return table[input_ids]  # type: ignore[no-any-return]


def log_softmax(logits: Sequence[float]) -> list[float]:
    """In plain floats."""
    top = max(logits)
    total = math.fsum(math.exp(value - top) for value in logits)
    return [value - top - math.log(total) for value in logits]


def plain(rows: Sequence[tuple[list[int], Any, Any]]) -> list[dict[str, list[float]]]:
    """What each window's predictions give, a number at a time; a row is its tokens and both models' logits [L, V]."""
    windows = []
    for tokens, of_model, of_reference in rows:
        window: dict[str, list[float]] = {"loss": [], "kl": [], "same": [], "reference_loss": []}
        for position in range(len(tokens) - 1):
            ln_q, ln_p = log_softmax(of_model[position]), log_softmax(of_reference[position])
            window["loss"].append(-ln_q[tokens[position + 1]])
            window["reference_loss"].append(-ln_p[tokens[position + 1]])
            window["kl"].append(math.fsum(math.exp(p) * (p - q) for p, q in zip(ln_p, ln_q, strict=True)))
            window["same"].append(float(ln_p.index(max(ln_p)) == ln_q.index(max(ln_q))))
        windows.append(window)
    return windows


def mean(windows: Sequence[dict[str, list[float]]], name: str) -> float:
    return float(np.mean(np.concatenate([window[name] for window in windows])))


def jackknife(windows: Sequence[dict[str, list[float]]], name: str) -> float:
    """The standard error by leaving out a window at a time."""
    without = [mean([*windows[:left_out], *windows[left_out + 1 :]], name) for left_out in range(len(windows))]
    return float(np.sqrt((len(windows) - 1) * np.var(without)))


def logits_of(model: Any, tokens: Sequence[int]) -> list[list[float]]:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0].double().tolist()  # type: ignore[no-any-return]


def padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 3), torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(list(row)), 1
    return {"input_ids": ids, "attention_mask": mask}


def random_rows(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def test_scores_are_those_of_a_plain_computation() -> None:
    model = llama()
    other = disturbed(model)
    rows = random_rows([LENGTH] * 5 + [7, 9, 2, 1])  # the last has nothing to predict
    windows = plain([(row, logits_of(other, row), logits_of(model, row)) for row in rows if len(row) > 1])
    scores = evaluate(other, [padded(rows[:2]), padded(rows[2:7]), padded(rows[7:])], reference=model)
    assert scores.windows == 8
    assert scores.predictions == 5 * 11 + 6 + 8 + 1
    assert scores.kl_divergence
    assert scores.same_top
    assert scores.reference_perplexity
    for estimate, name in ((scores.loss, "loss"), (scores.kl_divergence, "kl"), (scores.same_top, "same")):
        assert estimate.value == pytest.approx(mean(windows, name), rel=2e-5)
        # Not the same estimator, and close for so many windows.
        assert estimate.standard_error == pytest.approx(jackknife(windows, name), rel=0.1)
    assert scores.perplexity.value == pytest.approx(math.exp(mean(windows, "loss")), rel=2e-5)
    assert scores.reference_perplexity.value == pytest.approx(math.exp(mean(windows, "reference_loss")), rel=2e-5)
    assert scores.loss.standard_error
    assert scores.perplexity.standard_error == pytest.approx(scores.perplexity.value * scores.loss.standard_error)
    assert 0.01 < scores.kl_divergence.value < 1  # what is compared is neither equal nor unlike
    assert 0.2 < scores.same_top.value < 1


def test_standard_error_of_equal_windows_is_that_of_their_means() -> None:
    model = llama()
    other = disturbed(model)
    rows = random_rows([LENGTH] * 9)
    windows = plain([(row, logits_of(other, row), logits_of(model, row)) for row in rows])
    scores = evaluate(other, [padded(rows)], reference=model)
    for estimate, name in ((scores.loss, "loss"), (scores.kl_divergence, "kl"), (scores.same_top, "same")):
        assert estimate
        means = [np.mean(window[name]) for window in windows]
        assert estimate.standard_error == pytest.approx(np.std(means, ddof=1) / 3, rel=1e-4)


def test_loss_is_the_one_that_transformers_computes() -> None:
    model = llama()
    ids = torch.tensor(random_rows([LENGTH] * 4))
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert evaluate(model, [ids]).loss.value == pytest.approx(expected, rel=1e-6)
    assert evaluate(model, [ids]).kl_divergence is None
    assert evaluate(model, ids.split(1)).loss.value == pytest.approx(expected, rel=1e-6)


def test_a_fixed_case_by_hand() -> None:
    # Of two tokens, the model gives either 1/2, the reference 3/4 to token 0 after token 0, and 1/4 after token 1.
    model = Fixed(torch.zeros(2, 2))
    reference = Fixed(torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]]))
    ids = torch.tensor([[0, 0, 0, 1], [1, 0, 1, 1]])
    scores = evaluate(model, [ids], reference=reference)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert scores.loss == Estimate(near(math.log(2)), near(0, abs=1e-7))
    assert scores.perplexity.value == pytest.approx(2)
    assert scores.kl_divergence == Estimate(near(divergence), near(0, abs=1e-7))
    assert scores.reference_perplexity
    # Of six predictions three are of the same token again.
    assert scores.reference_perplexity.value == pytest.approx(
        math.exp(-(3 * math.log(3 / 4) + 3 * math.log(1 / 4)) / 6)
    )


def test_a_model_is_equal_to_itself() -> None:
    model = llama()
    scores = evaluate(model, [padded(random_rows([LENGTH, 5]))], reference=model)
    assert scores.kl_divergence == Estimate(0, 0)
    assert scores.same_top == Estimate(1, 0)
    assert scores.reference_perplexity == scores.perplexity


@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_count(*, left: bool) -> None:
    model = llama()
    rows = random_rows([LENGTH, 4, 8])
    alone = evaluate(model, [torch.tensor([row]) for row in rows])
    table = Fixed(torch.randn(VOCABULARY, VOCABULARY))
    assert evaluate(table, [padded(rows, left=left)]).loss.value == pytest.approx(
        evaluate(table, [torch.tensor([row]) for row in rows]).loss.value
    )
    if not left:  # transformers' models count positions from the left
        together = evaluate(model, [padded(rows)])
        assert together.predictions == alone.predictions == 21
        assert together.loss.value == pytest.approx(alone.loss.value, rel=1e-5)
        assert together.loss.standard_error == pytest.approx(alone.loss.standard_error, rel=1e-4)


def test_predictions_from_or_of_padding_do_not_count() -> None:
    table = torch.zeros(4, 4)
    table[3] = torch.tensor([float("nan")] * 4)  # of padding, whatever it is
    batch = {"input_ids": torch.tensor([[0, 1, 3, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}
    scores = evaluate(Fixed(table), [batch])
    assert scores.predictions == 2
    assert scores.loss == Estimate(near(math.log(4)), None)


@pytest.mark.parametrize("chunk", [1, VOCABULARY, 5 * VOCABULARY])
def test_pieces_of_a_window_make_no_difference(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    model, other = llama(), llama(1)
    batches = [padded(random_rows([LENGTH, 6]))]
    whole = evaluate(other, batches, reference=model)
    monkeypatch.setattr(importlib.import_module("miniquant.evaluate"), "_CHUNK", chunk)
    pieces = evaluate(other, batches, reference=model)
    assert whole.kl_divergence
    assert pieces.kl_divergence
    assert pieces.kl_divergence.value == pytest.approx(whole.kl_divergence.value, rel=1e-6)
    assert pieces.loss.value == pytest.approx(whole.loss.value, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_widened_first(dtype: torch.dtype) -> None:
    logits = torch.randn(VOCABULARY, VOCABULARY).to(dtype)
    other = (logits.float() + 0.1 * torch.randn(VOCABULARY, VOCABULARY)).to(dtype)
    rows = random_rows([LENGTH] * 3)
    windows = plain([(row, other[row].double().tolist(), logits[row].double().tolist()) for row in rows])
    scores = evaluate(Fixed(other), [torch.tensor(rows)], reference=Fixed(logits))
    assert scores.kl_divergence
    assert scores.kl_divergence.value == pytest.approx(mean(windows, "kl"), rel=1e-4)
    assert scores.loss.value == pytest.approx(mean(windows, "loss"), rel=1e-6)


def test_tokens_that_cannot_come() -> None:
    never = torch.zeros(3, 3)
    never[:, 2] = -math.inf
    ids = torch.tensor([[0, 1, 0, 1]])
    same = evaluate(Fixed(never), [ids], reference=Fixed(never))
    assert same.kl_divergence == Estimate(0, None)
    assert same.loss.value == pytest.approx(math.log(2))
    # A token that the reference allows and the model does not is infinitely far; a token that comes so, too.
    assert evaluate(Fixed(never), [ids], reference=Fixed(torch.zeros(3, 3))).kl_divergence == Estimate(math.inf, None)
    assert evaluate(Fixed(never), [torch.tensor([[0, 2]])]).perplexity == Estimate(math.inf, None)
    rows = torch.tensor([[0, 2], [0, 1]])
    assert evaluate(Fixed(never), [rows]).loss == evaluate(Fixed(never), [rows]).perplexity == Estimate(math.inf, None)
    large = torch.zeros(2, 2)
    large[:, 0] = 2000
    assert evaluate(Fixed(large), [torch.tensor([[0, 1]])]).perplexity == Estimate(math.inf, None)


def test_reference_is_computed_once_within_its_bound() -> None:
    table = Fixed(torch.randn(VOCABULARY, VOCABULARY))
    model = Fixed(torch.randn(VOCABULARY, VOCABULARY))
    batches = [torch.tensor(random_rows([LENGTH] * 2)) + number for number in range(3)]
    batches = [batch % VOCABULARY for batch in batches]
    bytes_of_a_batch = 2 * (LENGTH - 1) * VOCABULARY * 4
    expected = evaluate(model, batches, reference=table)
    assert table.calls == 3
    for kept in (0, 1, 2, 3):
        reference = Reference(table, max_bytes=kept * bytes_of_a_batch + 5)
        table.calls = 0
        assert evaluate(model, iter(batches), reference=reference) == expected
        assert table.calls == 3
        assert reference.kept_bytes == kept * bytes_of_a_batch
        assert evaluate(model, batches[::-1], reference=reference).predictions == expected.predictions
        assert table.calls == 3 + (3 - kept)


def test_reference_that_keeps_all_lets_go_of_the_model() -> None:
    model = llama()
    batches: list[Any] = [padded(random_rows([LENGTH, 4])), torch.tensor(random_rows([5]))]
    before, after = copy.deepcopy(model), disturbed(model)
    expected = evaluate(after, batches, reference=before)
    reference = Reference(model)
    reference.keep(batches)
    assert reference.model is None
    model.load_state_dict(after.state_dict())  # in place, as quantizing is
    assert evaluate(model, batches, reference=reference) == expected
    with pytest.raises(
        ValueError, match="batch 1: expected a batch whose logits the reference has kept, but got another"
    ):
        evaluate(model, [torch.tensor([[1, 2, 3]])], reference=reference)
    changed = {**padded(random_rows([LENGTH, 4])), "attention_mask": torch.ones(2, LENGTH)}
    with pytest.raises(ValueError, match="but got another"):
        evaluate(model, [changed], reference=reference)
    with pytest.raises(ValueError, match="Reference: batch 2: expected logits of at most 9000 bytes, but got more"):
        Reference(before, max_bytes=9000).keep([torch.tensor(random_rows([LENGTH] * 2)), torch.tensor([[4, 5, 6]] * 2)])


def test_modes_are_left_as_they_were() -> None:
    dropout = nn.Dropout(0.9)
    model = nn.ModuleDict({"table": Fixed(torch.randn(5, 5)), "dropout": dropout, "frozen": nn.Dropout()})

    def forward(**batch: Tensor) -> Tensor:
        result: Tensor = dropout(model["table"](**batch))
        return result

    model.forward = forward
    model.train()
    model["frozen"].eval()
    ids = torch.tensor([[0, 1, 2, 3, 4]])
    assert evaluate(model, [ids]) == evaluate(model, [ids])  # no dropout
    assert [module.training for module in (model, dropout, model["frozen"])] == [True, True, False]
    with pytest.raises(ValueError, match="expected"):
        evaluate(model, [ids, ids.float()])
    assert dropout.training


def test_scores_go_into_json() -> None:
    scores = evaluate(llama(), [padded(random_rows([LENGTH, 4]))], reference=llama(1))
    document = json.loads(json.dumps(scores.to_dict()))
    assert document["windows"] == 2
    assert document["kl_divergence"] == {
        "value": scores.kl_divergence and scores.kl_divergence.value,
        "standard_error": scores.kl_divergence and scores.kl_divergence.standard_error,
    }


class Gives(nn.Module):
    """A model whose output is a function of its ids."""

    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.output = output

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.output(input_ids)


def zeros(ids: Tensor, size: int = 9) -> Tensor:
    return torch.zeros(*ids.shape, size)


def infinite(ids: Tensor) -> Tensor:
    return torch.where((ids == 4)[..., None], math.inf, zeros(ids))


MODEL, REFERENCE = "batch 1: the model:", "batch 1: the reference:"
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
GOOD = Gives(zeros)


@pytest.mark.parametrize(
    "output",
    [
        zeros,
        lambda ids: (zeros(ids), None),
        lambda ids: {"loss": None, "logits": zeros(ids)},
        lambda ids: transformers.modeling_outputs.CausalLMOutput(logits=zeros(ids)),
        lambda ids: type("Output", (), {"logits": zeros(ids)})(),
    ],
)
def test_outputs_of_every_form_are_taken(output: Any) -> None:
    assert evaluate(Gives(output), [IDS]).loss.value == pytest.approx(math.log(9))


@pytest.mark.parametrize(
    ("model", "batches", "reference", "message"),
    [
        (
            Gives(lambda ids: zeros(ids) * math.nan),
            [IDS],
            None,
            f"{MODEL} expected logits of row 1 to be numbers, but got nan or infinity",
        ),
        (Gives(infinite), [IDS], None, f"{MODEL} expected logits of row 2 to be numbers, but got nan or infinity"),
        (GOOD, [IDS], Gives(lambda ids: zeros(ids) * math.nan), f"{REFERENCE} expected logits of row 1 to be numbers"),
        (
            GOOD,
            [IDS],
            Gives(lambda ids: zeros(ids, 8)),
            "batch 1: expected model and reference to have one vocabulary, but got 9 and 8 logits",
        ),
        (
            GOOD,
            [IDS, IDS + 4],
            None,
            "batch 2: expected token ids less than 9, the number of the model's logits, but got 10",
        ),
        (
            Gives(lambda ids: zeros(ids)[:, 0]),
            [IDS],
            None,
            f"{MODEL} expected logits to have shape [2, 3, vocabulary], but got shape [2, 9]",
        ),
        (
            Gives(lambda ids: zeros(ids)[:, 1:]),
            [IDS],
            None,
            f"{MODEL} expected logits to have shape [2, 3, vocabulary], but got shape [2, 2, 9]",
        ),
        (
            Gives(lambda ids: {"last_hidden_state": zeros(ids)}),
            [IDS],
            None,
            f"{MODEL} expected an output logits, but got last_hidden_state",
        ),
        (Gives(lambda ids: None), [IDS], None, f"{MODEL} expected an output logits, but got NoneType"),
        (GOOD, [IDS[:, :1]], None, "expected a window of at least two tokens, but got none"),
        (GOOD, [], None, "expected a window of at least two tokens, but got none"),
        (GOOD, [IDS.float()], None, "batch 1: expected token ids to be integers, but got float32"),
        (GOOD, [IDS - 2], None, "batch 1: expected token ids to be at least 0, but got -1 to 4"),
        (GOOD, [{"pixel_values": torch.ones(2, 3)}], None, "batch 1: expected input_ids, but got pixel_values"),
        (
            GOOD,
            ["text"],
            None,
            "batch 1: expected a tensor of token ids or a mapping of a model's arguments, but got 'text'",
        ),
        ("model", [IDS], None, "expected model to be a torch.nn.Module, but got str"),
        (GOOD, [IDS], "model", "expected reference to be a torch.nn.Module or a Reference, but got str"),
    ],
)
def test_what_cannot_be_evaluated_is_named(model: Any, batches: Any, reference: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        evaluate(model, batches, reference=reference)
    assert str(error.value).startswith(f"evaluate: {message}")


def test_bad_references_are_named() -> None:
    of_text: Any = "model"
    with pytest.raises(TypeError, match=r"Reference: expected model to be a torch\.nn\.Module, but got str"):
        Reference(of_text)
    with pytest.raises(ValueError, match="Reference: expected max_bytes to be at least 0, but got -1"):
        Reference(GOOD, max_bytes=-1)


def bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        initializer_range=0.3,
    )
    model: Any = transformers.BertModel(config, add_pooling_layer=False)
    return model.eval()


def test_embeddings_are_compared_window_by_window() -> None:
    model = bert()
    other = disturbed(model, 0.1)
    rows = random_rows([LENGTH, 5, 1, 9])

    def embedding(of: Any, row: list[int]) -> Any:
        with torch.no_grad():
            hidden = of(input_ids=torch.tensor([row])).last_hidden_state[0].double().numpy()
        return hidden.mean(axis=0)

    cosines = []
    for row in rows:
        got, expected = embedding(other, row), embedding(model, row)
        cosines.append(got @ expected / np.linalg.norm(got) / np.linalg.norm(expected))
    scores = compare_embeddings(other, [padded(rows[:2]), padded(rows[2:])], reference=model)
    assert scores.windows == 4
    assert scores.cosine.value == pytest.approx(np.mean(cosines), abs=1e-6)
    assert scores.cosine.standard_error == pytest.approx(np.std(cosines, ddof=1) / 2, rel=1e-3)
    assert scores.least_cosine == pytest.approx(min(cosines), abs=1e-6)
    assert 0.5 < min(cosines) < 0.999
    itself = compare_embeddings(model, [padded(rows)], reference=model)
    assert itself.cosine.value == pytest.approx(1, abs=1e-6)
    assert json.loads(json.dumps(itself.to_dict()))["windows"] == 4


def test_hidden_states_of_padding_may_be_anything() -> None:
    def hidden(ids: Tensor) -> Tensor:
        states = torch.stack([ids.float(), ids.float() ** 2], dim=-1)
        return torch.where((ids == 3)[..., None], math.nan, states)

    ids = torch.tensor([[1, 2, 3]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0]])}
    scores = compare_embeddings(
        Gives(hidden), [batch], reference=Gives(lambda ids: zeros(ids, 2) + torch.tensor([1.0, 0.0]))
    )
    assert scores.cosine == Estimate(near(1.5 / math.hypot(1.5, 2.5)), None)
    with pytest.raises(ValueError, match=f"{MODEL} expected last_hidden_state to be finite"):
        compare_embeddings(Gives(hidden), [ids], reference=GOOD)


@pytest.mark.parametrize(
    ("model", "reference", "batches", "message"),
    [
        (
            GOOD,
            Gives(lambda ids: zeros(ids, 8)),
            [IDS],
            "batch 1: expected model and reference to have embeddings of one length, but got 9 and 8",
        ),
        (
            Gives(lambda ids: zeros(ids)[:, 1:]),
            GOOD,
            [IDS],
            f"{MODEL} expected last_hidden_state to have shape [2, 3, features], but got shape [2, 2, 9]",
        ),
        (
            Gives(lambda ids: {"logits": zeros(ids)}),
            GOOD,
            [IDS],
            f"{MODEL} expected an output last_hidden_state, but got logits",
        ),
        (GOOD, GOOD, [], "expected a window, but got none"),
        (GOOD, None, [IDS], "expected reference to be a torch.nn.Module, but got NoneType"),
        (3, GOOD, [IDS], "expected model to be a torch.nn.Module, but got int"),
    ],
)
def test_embeddings_that_cannot_be_compared_are_named(model: Any, reference: Any, batches: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        compare_embeddings(model, batches, reference=reference)
    assert str(error.value).startswith(f"compare_embeddings: {message}")


@pytest.mark.nightly
def test_a_language_model_rounded_to_fewer_bits_is_further_off() -> None:
    smollm2 = importlib.import_module("scripts.smollm2")
    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    text = load_calibration(None, tokenizer, tokens=1024, sequence_length=256)
    reference = Reference(model)
    reference.keep(text.batches)
    original = evaluate(model, text.batches, reference=reference)
    assert 5 < original.perplexity.value < 40  # text of its own kind, never seen
    assert original.kl_divergence
    assert original.kl_divergence.value == pytest.approx(0, abs=1e-9)
    before, scores = 0.0, original
    for bits in (8, 4, 3):
        rounded = copy.deepcopy(model)
        with torch.no_grad():
            for name, module in rounded.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    module.weight.copy_(miniquant.dequantize(miniquant.rtn(module.weight, bits=bits)))
        scores = evaluate(rounded, text.batches, reference=reference)
        assert scores.kl_divergence
        assert scores.same_top
        assert scores.kl_divergence.value > 3 * before
        before = scores.kl_divergence.value
    assert scores.same_top
    assert scores.same_top.value < 0.8
    assert scores.perplexity.value > 1.2 * original.perplexity.value
