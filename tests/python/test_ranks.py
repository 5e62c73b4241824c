"""Runs of several processes: equal layers for any number of ranks, and an end on all where one is lost or differs."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

import ranked_run
import small_models
from format_layers import same
from miniquant import LayerOptions, dequantize
from miniquant.batches import share_of
from miniquant.correction import Errors
from miniquant.layer_hessians import LayerHessians
from miniquant.ranks import Ranks
from miniquant.state import kept_layers, state_folder
from model_folder import QUICK, make_folder
from quantized_folders import stored_layers

if TYPE_CHECKING:
    from miniquant import QuantizedWeight

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranked_run.save(tmp_path_factory.mktemp("ranks") / "float")


@pytest.fixture(scope="module")
def alone(source: Path) -> dict[str, QuantizedWeight]:
    """The layers of one process."""
    output = source.with_name("alone")
    ranked_run.run(source, output)
    return stored_layers(output)


def check_layers(folder: Path, expected: dict[str, QuantizedWeight]) -> None:
    """Equal codes, and scales but for rounding."""
    found = stored_layers(folder)
    assert list(found) == list(expected)
    for name, layer in found.items():
        assert torch.equal(layer.codes, expected[name].codes), name
        torch.testing.assert_close(layer.scales, expected[name].scales, rtol=1e-9, atol=0)
        torch.testing.assert_close(dequantize(layer), dequantize(expected[name]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("count", [2, 3])
def test_layers_do_not_depend_on_the_number_of_ranks(
    count: int, source: Path, alone: dict[str, QuantizedWeight], tmp_path: Path
) -> None:
    said = ranked_run.ended(ranked_run.start(count, source, tmp_path / "out"), tmp_path / "out")
    assert said == [f"done: {len(alone)} layers"] * count
    check_layers(tmp_path / "out", alone)
    assert not state_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Mixtral", {"preset": "fast", "min_tokens": 2, "unseen": "rtn"}),
        ("Mixtral", {"preset": "best", "min_tokens": 20, "unseen": "siblings"}),
        ("Qwen2Moe", {"preset": "best", "min_tokens": 20, "unseen": "rtn"}),
    ],
    ids=["own tokens", "tokens of siblings", "rounded to nearest"],
)
def test_experts_do_not_depend_on_the_number_of_ranks(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1 has one batch of eight tokens, which come to no more than eight of the experts."""
    of_family = {
        "Mixtral": {"num_local_experts": 12},
        "Qwen2Moe": {"num_experts": 12, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    }[family]
    model = small_models.decoder(family, num_hidden_layers=1, num_experts_per_tok=1, **of_family)
    folder = ranked_run.save(tmp_path / "float", model)
    recipe = LayerOptions(**{**ranked_run.OPTIONS, **options})
    calibration = ranked_run.calibration(batches=4, shortest=3)
    given: dict[str, Any] = {"recipe": recipe, "calibration": calibration, "held_out": 0.0}
    alone = ranked_run.run(folder, tmp_path / "alone", **given).result
    assert sum(layer.tokens > 0 and "experts.down" in name for name, layer in alone.layers.items()) > 8
    said = ranked_run.ended(ranked_run.start(3, folder, tmp_path / "out", **given), tmp_path / "out")
    assert said == [f"done: {len(alone.layers)} layers"] * 3
    check_layers(tmp_path / "out", stored_layers(tmp_path / "alone"))


def test_float32_has_the_same_bits_each_time(tmp_path: Path) -> None:
    folder = ranked_run.save(tmp_path / "float", dtype=torch.float32)
    for name in ("one", "two"):
        ranked_run.ended(ranked_run.start(3, folder, tmp_path / name, dtype=torch.float32), tmp_path / name)
    one, two = stored_layers(tmp_path / "one"), stored_layers(tmp_path / "two")
    assert all(same(one[name], two[name]) for name in one)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_killed_rank_ends_the_run_which_goes_on_with_another_number(
    lost: int, source: Path, alone: dict[str, QuantizedWeight], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    processes = ranked_run.start(3, source, output, slow=0.15)
    while not kept_layers(state_folder(output)):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1))  # noqa: S311
    processes[lost].kill()
    before = time.monotonic()
    said = ranked_run.ended(processes, output)
    assert time.monotonic() - before < 30
    assert all(process.exitcode != 0 for process in processes)
    told = [text for number, text in enumerate(said) if number != lost]
    # Without torchrun rank 0 has the store: who ends after it may know no more than that it is gone.
    assert all(f"rank {lost}" in text or "ranks' store" in text for text in told), told
    assert lost == 0 or any(f"rank {lost}" in text for text in told), told
    kept = len(kept_layers(state_folder(output)))
    assert 0 < kept < len(alone)
    said = ranked_run.ended(ranked_run.start(2, source, output, resume=True), output)
    assert said[:2] == [f"done: {len(alone)} layers"] * 2
    check_layers(output, alone)


def test_a_silent_rank_is_named(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    processes = ranked_run.start(2, source, output, slow=0.15, silence=5)
    while not kept_layers(state_folder(output)):
        time.sleep(0.01)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].join(20)
    assert processes[0].exitcode == 1
    processes[1].kill()
    assert ranked_run.said(output, 0) == "miniquant: rank 0 ends: rank 1 has not been heard of for 5 seconds"
    assert kept_layers(state_folder(output))


def test_a_rank_that_fails_is_named_with_its_reason(source: Path, tmp_path: Path) -> None:
    wrong = ranked_run.calibration()
    embedding = {"inputs_embeds": torch.full((2, 12, 32), torch.nan, dtype=torch.float64)}
    output = tmp_path / "out"
    broken = [*wrong.batches[:1], embedding, *wrong.batches[2:]]
    given: dict[str, Any] = {"calibration": type(wrong)(**{**vars(wrong), "batches": broken})}
    said = ranked_run.ended(ranked_run.start(2, source, output, **given), output)
    assert "expected inputs to be finite" in said[1]
    assert "rank 1 failed: " in said[0]
    assert "expected inputs to be finite" in said[0]


def check_refused(said: list[str], message: str) -> None:
    """Ranks say why, or that another one failed and why; after rank 0 has ended, maybe only that its store is gone."""
    assert message in said[0], said
    assert all(message in text or "ranks' store" in text for text in said), said


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"recipe": LayerOptions(bits=8, group_size=16)},
            'expected rank 1 to have the recipe of rank 0, {"defaults": ',
        ),
        ({"dtype": torch.float32}, "dtype"),
        ({"held_out": 0.1}, "expected rank 1 to have the calibration of rank 0, "),
        ({"format": "compressed-tensors"}, 'expected rank 1 to have the format of rank 0, "miniquant", but got "comp'),
    ],
    ids=["recipe", "dtype", "calibration", "format"],
)
def test_ranks_that_differ_are_refused(other: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    said = ranked_run.ended(ranked_run.start(2, source, output, of_rank={1: other}), output)
    if "dtype" in other:  # it is rank 0's to say
        assert said == ["done: 14 layers"] * 2
        return
    check_refused(said, message)
    assert not output.exists()


def test_fewer_batches_than_ranks_are_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    few: dict[str, Any] = {"calibration": ranked_run.calibration(2), "held_out": 0.0}
    said = ranked_run.ended(ranked_run.start(3, source, output, **few), output)
    check_refused(said, "quantize_model: expected a calibration batch for each of 3 ranks, but got 2")
    assert not output.exists()


def rank_of(rank: int, count: int) -> Ranks:
    return cast("Ranks", SimpleNamespace(rank=rank, count=count))


@pytest.mark.parametrize(("calibration", "held_out", "count"), [(17, 1, 2), (16, 1, 2), (5, 4, 3), (3, 0, 3)])
def test_batches_are_shared_evenly_with_those_held_out_last(calibration: int, held_out: int, count: int) -> None:
    batches = list(range(calibration + held_out))
    shares = []
    for rank in range(count):
        mine, kept, masks = share_of(rank_of(rank, count), batches, held_out, None)
        assert masks is None
        assert [number >= calibration for number in mine] == [False] * (len(mine) - kept) + [True] * kept
        shares.append(mine)
    assert sorted(number for share in shares for number in share) == batches
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("has_masks", [False, True])
def test_what_is_left_of_held_out_batches_is_cut(has_masks: bool) -> None:
    """Six batches of three sequences, two of them held out, for four ranks: those two are cut."""
    ids = [torch.arange(12).view(3, 4) + 100 * number for number in range(6)]
    batches = [{"input_ids": one, "attention_mask": one % 2} for one in ids]
    given = [one % 3 for one in ids] if has_masks else None
    found: list[list[torch.Tensor]] = []
    for rank in range(4):
        mine, kept, masks = share_of(rank_of(rank, 4), batches, 2, given)
        assert kept == (2 if rank < 3 else 0)  # rank 3 has none of three sequences
        for number, batch in enumerate(mine):
            assert torch.equal(batch["attention_mask"], batch["input_ids"] % 2)
            if masks is not None:
                mask = masks[number]
                assert mask is not None
                assert torch.equal(mask, batch["input_ids"] % 3)
        assert (masks is not None) == has_masks
        found.append([batch["input_ids"] for batch in mine])
    assert [torch.equal(mine[0], ids[rank]) for rank, mine in enumerate(found)] == [True] * 4
    for number in (4, 5):
        assert torch.equal(torch.cat([mine[number - 3] for mine in found[:3]]), ids[number])


def test_batches_of_anything_else_stay_whole() -> None:
    ids = torch.zeros(4, 3, dtype=torch.long)
    others: list[Any] = [
        {"input_ids": ids, "pixel_values": torch.zeros(4, 3)},
        {"input_ids": ids, "attention_mask": torch.ones(1, 3)},
        {"input_ids": torch.zeros(2, 4, 3, dtype=torch.long)},
        {"attention_mask": ids},
        (ids,),
    ]
    for other in others:
        shares = [share_of(rank_of(rank, 2), [ids, ids, other], 1, None) for rank in range(2)]
        assert [(len(mine), kept) for mine, kept, _ in shares] == [(2, 1), (1, 0)]
        assert shares[0][0][1] is other


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.joined() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert Ranks.joined() is None


@pytest.mark.slow
def test_torchrun_runs_the_command(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "float", small_models.decoder("Llama", vocab_size=300))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word {i * i % 97}" for i in range(4000)))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "miniquant"),
        *("quantize", str(folder), str(tmp_path / "out"), "--calibration", str(text), *QUICK, "--tokens", "8192"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written: ") == 1
    assert stored_layers(tmp_path / "out")
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode != 0
    assert "to be new or empty" in again.stderr or "expected" in again.stderr


RANK_OF_TWO = """
import sys, ranked_run
from pathlib import Path
number, interface, source = sys.argv[1:]
options = {"address": "10.231.0.1", "interface": interface}
ranked_run.rank(int(number), 2, 29511, Path(source), Path("out").resolve(), options)
"""


def can_make_namespaces() -> bool:
    """Whether this process may make network namespaces, as root outside of most containers."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", "miniquant-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "miniquant-probe"], capture_output=True, check=False)
    return made.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_make_namespaces(), reason="network namespaces need root, and ip")
def test_hosts_with_networks_of_their_own(source: Path, alone: dict[str, QuantizedWeight], tmp_path: Path) -> None:
    """Two ranks that see each other through one cable and nothing else."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    names = ("miniquant-a", "miniquant-b")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "mqa", "type", "veth", "peer", "name", "mqb")
        for name, interface, address in zip(names, ("mqa", "mqb"), ("10.231.0.1", "10.231.0.2"), strict=True):
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-c", RANK_OF_TWO, str(number), interface, str(source)],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
                cwd=tmp_path,
            )
            for number, (name, interface) in enumerate(zip(names, ("mqa", "mqb"), strict=True))
        ]
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    check_layers(tmp_path / "out", alone)


@pytest.mark.parametrize("knows", [(True, True), (True, False), (False, False)])
def test_ranks_that_do_not_know_the_same_of_a_stream_sum_the_same(knows: tuple[bool, bool]) -> None:
    """A rank that knows the stream sums W E where that is smaller, one that does not sums E."""
    rows, columns = 4, 12
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    barrier = threading.Barrier(2)
    parts: list[tuple[torch.Tensor, ...]] = [(), ()]
    tokens = [torch.randn(2, 30, columns, generator=torch.Generator().manual_seed(s)).double() for s in range(2)]
    streams = [torch.randn(2, 30, rows, generator=torch.Generator().manual_seed(5 + s)).double() for s in range(2)]

    def run(rank: int) -> LayerHessians:
        def total(*tensors: torch.Tensor) -> None:
            parts[rank] = tuple(one.clone() for one in tensors)
            barrier.wait(30)
            sums = [sum(of_ranks) for of_ranks in zip(*parts, strict=True)]
            barrier.wait(30)
            for one, added in zip(tensors, sums, strict=True):
                one.copy_(added)

        hessians = LayerHessians.empty(columns, torch.float64)
        y, x = tokens[rank]
        hessians.calibration.update(y)
        hessians.errors = Errors.empty(columns, torch.float64, rows if knows[rank] else None)
        hessians.errors.add_inputs(x, y, None, None, lambda: weight)
        if hessians.errors.stream is not None:
            u, v = streams[rank]
            hessians.errors.stream.update(u, v, y, None, None)
        ranks = cast("Ranks", SimpleNamespace(sum=total))
        hessians.sum_over(ranks, lambda: weight, has_held_out=False)
        return hessians

    with ThreadPoolExecutor(2) as pool:
        found = [hessians.errors for hessians in pool.map(run, range(2))]
    y, x = (torch.cat([of_rank[one] for of_rank in tokens]) for one in range(2))
    for errors in found:
        assert errors is not None
        assert (errors.stream is not None) == all(knows)
        expected = weight @ (x - y).T @ y / len(y)
        torch.testing.assert_close(errors.wanted(weight, 1.0, 0.0), expected)
        if errors.stream is not None:
            u, v = (torch.cat([of_rank[one] for of_rank in streams]) for one in range(2))
            torch.testing.assert_close(errors.wanted(weight, 1.0, 1.0), expected + (u - v).T @ y / len(y))
