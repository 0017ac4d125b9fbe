"""The benchmark harness: ratios, peaks, records, and that the rows' two sides compute the same."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bestiary.configuration.configuration_electra import ElectraJointConfig


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import harness, models, run  # noqa: E402


def burn(seconds):
    """Keep the processor busy for so much of its own time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_ratios_are_paired_and_threads_restored():
    seen, threads = [], torch.get_num_threads()

    def timed(name, seconds):
        return lambda: seen.append((name, torch.get_num_threads())) or burn(seconds)

    report = harness.compare({"peer": timed("peer", 0.02), "half": timed("half", 0.01)}, pairs=4, warmup=1)
    names = [name for name, _ in seen]
    assert names == ["peer", "half", "half", "peer"] * 2 + ["peer", "half"]
    assert {number for _, number in seen} == {1} and torch.get_num_threads() == threads
    assert report["half"]["ratio"] == pytest.approx(0.5, abs=0.1)
    assert report["half"]["ratio_min"] <= report["half"]["ratio"] <= report["half"]["ratio_max"]
    assert report["peer"]["ms"] == pytest.approx(20, abs=5) and "ratio" not in report["peer"]
    assert report["half"]["pairs"] == 4


def test_warm_up_does_not_count():
    calls = []
    report = harness.compare({"peer": lambda: calls.append(burn(0.0 if calls else 0.1))}, pairs=2, warmup=1)
    assert len(calls) == 3 and report["peer"]["ms_max"] < 50


@pytest.mark.parametrize("functions, pairs", [({"ours": len}, 5), ({"peer": len}, 0)])
def test_comparison_needs_a_peer_and_a_pair(functions, pairs):
    with pytest.raises(ValueError, match="named 'peer' and at least one pair"):
        harness.compare(functions, pairs)


def test_peak_memory_counts_what_is_held_at_once():
    megabyte = 2**20

    def together():
        held = torch.zeros(4 * megabyte, dtype=torch.uint8)
        return held[: 2 * megabyte].clone()

    def in_turn():
        for _ in range(3):
            torch.zeros(2 * megabyte, dtype=torch.uint8)

    report = harness.compare_memory({"peer": together, "ours": in_turn})
    assert report["peer"]["mb"] == pytest.approx(6, abs=0.1)
    assert report["ours"]["mb"] == pytest.approx(2, abs=0.1)
    assert report["ours"]["ratio"] == pytest.approx(1 / 3, abs=0.02)


@pytest.fixture
def row(monkeypatch):
    monkeypatch.setattr(harness, "ROWS", {})

    @harness.row("example")
    def example(pairs):
        times = {
            "peer": {"ms": 200.0},
            "fast": harness.with_target({"ms": 100 / 3, "ratio": 1 / 6, "ratio_min": 0.1, "ratio_max": 0.2}, 0.3),
            "slow": harness.with_target({"ms": 80.0, "ratio": 0.4}, 0.3),
            "late": harness.with_target({"ms": 201.0, "ratio": 1.005, "extra_seconds": 0.1}, 0.3, "extra_seconds"),
        }
        return {"description": f"{pairs} pairs", "peer": "the other", "metrics": {"time": times}}


def test_record_of_a_row(row, tmp_path):
    harness.run_row("example", 7, tmp_path)
    record = json.loads((tmp_path / "example.json").read_text())
    assert record["command"] == "python -m benchmarks.run example --pairs 7"
    assert record["description"] == "7 pairs"
    times = record["metrics"]["time"]
    assert times["fast"]["ms"] == 33.33 and times["fast"]["passed"] is True
    assert times["slow"]["passed"] is False and times["slow"]["target"] == 0.3
    assert times["late"]["passed"] is True
    assert record["versions"]["torch"] == torch.__version__
    assert record["cpu"] and record["threads"] == 1 and record["revision"] and record["date"].endswith("UTC")


def test_rows_are_registered_once_and_known_by_name(row):
    with pytest.raises(ValueError, match="'example' is registered twice"):
        harness.row("example")(len)
    with pytest.raises(ValueError, match="'other'; there are example"):
        harness.run_row("other", 1)


def test_table_is_written_behind_the_marker(row, tmp_path):
    harness.run_row("example", 1, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"Text.\n\n{run.START}\nold table\n")
    for _ in range(2):  # writing twice changes nothing
        run.write_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("Text.\n\n" + run.START) and "old table" not in text
    lines = text.splitlines()
    assert "| fast | 33.33 ms | 200 ms | 0.17 (0.10 - 0.20) | ratio 0.30 | yes |" in lines[-3]
    assert "| slow | 80 ms | 200 ms | 0.40 | ratio 0.30 | no |" in lines[-2]
    assert "| 1.00 | extra_seconds 0.30 | yes |" in lines[-1]


def test_command_line_runs_as_a_file_and_names_unknown_rows(capsys):
    listed = subprocess.run(
        [sys.executable, "benchmarks/run.py", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {"dropout", "sampling", "linear_cross_entropy", "mlm_step_small", "import_time"} <= set(
        listed.stdout.split()
    )
    with pytest.raises(SystemExit):
        run.main(["dropuot"])
    assert "got dropuot" in capsys.readouterr().err


def test_masked_batch_has_the_stated_padding():
    for batch, lengths in models.LENGTHS.items():
        inputs = models.masked_batch(batch, 30_522, padded=True)
        assert inputs["attention_mask"].sum(1).tolist() == list(lengths)
        assert 0.54 < 1 - inputs["attention_mask"].float().mean() < 0.61
        masked = inputs["labels"] != -100
        assert (inputs["input_ids"][masked] == 103).all() and (inputs["attention_mask"][masked] == 1).all()
        assert 0.08 < masked.sum() / sum(lengths) < 0.22


def test_models_that_disagree_are_not_timed():
    with pytest.raises(RuntimeError, match="losses differ"):
        models.agree("x", {"peer": torch.tensor(1.0), "ours": torch.tensor(1.001)})


def test_model_rows_at_a_tiny_size(monkeypatch):
    """The rows stop if the two sides' losses differ, so this checks the models too."""
    targets = dict.fromkeys(("ours", "packed", "packed, bf16"), 9.0)
    report = models.mlm_step(1, 4, hidden=16, heads=2, targets=targets)
    assert report["metrics"]["time, packed"]["packed"]["passed"]
    assert set(report["metrics"]["peak memory"]) == {"peer", "ours", "packed"}
    encoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 16,
        "embedding_size": 8,
    }
    monkeypatch.setitem(ElectraJointConfig.SIZES, "tiny", {"discriminator_config": encoder})
    report = models.electra_step(1, 4, "tiny", target=9.0)
    assert report["metrics"]["time"]["inverse_cdf"]["passed"]
