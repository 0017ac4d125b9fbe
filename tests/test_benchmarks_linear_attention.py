"""The rows of linear-time attention at tiny sizes, without the packages that they compare with."""

import json

import pytest
import torch
from torch.nn import functional as F

from benchmarks import harness, linear_attention, linear_time, run


def test_a_row_without_its_peer_is_skipped_and_keeps_its_results(monkeypatch, tmp_path, capsys):
    def missing(pairs):
        raise harness.PeerMissing("no-such-package cannot be imported")

    monkeypatch.setattr(harness, "ROWS", {"here": missing})
    monkeypatch.setattr(run, "ROWS", harness.ROWS)
    monkeypatch.setattr(run, "write_readme", lambda: None)
    run.main(["here"])
    assert capsys.readouterr().out == "here: skipped, no-such-package cannot be imported\n"
    with pytest.raises(harness.PeerMissing, match="no-such-package cannot be imported"):
        linear_attention.package("no_such_package.module")


def test_functions_that_disagree_are_not_timed():
    softmax = F.scaled_dot_product_attention
    with pytest.raises(RuntimeError, match="benchmark x, length 16: the results differ by"):
        linear_attention.against_package("x", 1, linear_attention.linear("elu"), softmax, 1.0, lengths=(16,))


def test_against_a_package_at_a_tiny_size():
    def peer(query, key, value):
        query, key = F.elu(query) + 1, F.elu(key) + 1
        scores = (query @ key.mT).tril()
        return scores / scores.sum(-1, keepdim=True) @ value

    metrics = linear_attention.against_package(
        "x", 1, linear_attention.linear("elu", causal=True), peer, 1e9, lengths=(16,)
    )
    assert metrics["both passes, 16 tokens"]["ours"]["passed"]
    assert set(metrics) == {f"{kind}, 16 tokens" for kind in ("both passes", "forward", "peak memory")}


def test_the_error_of_random_features_grows_with_the_norm():
    errors = linear_attention.favor_errors(length=64, draws=1)
    assert errors["0.1"] < 0.1 < errors["0.5"] < errors["1.0"]


def test_sweep_crossovers_and_plot(tmp_path):
    torch.manual_seed(0)
    results = linear_time.measure((16, 32), pairs=1)
    for direction in ("bidirectional", "causal"):
        assert set(results[direction]["forward"][16]) == set(linear_time.variants(False))
        assert results[direction]["memory"][32]["peer"]["mb"] > 0
    made = {"bidirectional": {kind: {} for kind in linear_time.KINDS}}
    for kind in linear_time.KINDS[:2]:
        for length, ratios in ((128, (2.0, 0.5, 3.0)), (512, (0.5, 0.2, 2.0))):
            names = dict(zip(("late", "early", "never"), ratios))
            made["bidirectional"][kind][length] = {"peer": {}} | {n: {"ratio": r} for n, r in names.items()}
    found = linear_time.crossovers(made)["bidirectional"]["forward"]
    assert found == {"late": 323, "early": "below 128", "never": None}
    record = {"results": json.loads(json.dumps(results)), "cpu": "none"}
    linear_time.plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
