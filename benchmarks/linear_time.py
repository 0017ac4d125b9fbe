"""Attention in linear time against fused softmax attention from 128 to 16,384 tokens: times of the forward pass and of
both passes, peak memory, bidirectional and causal, and the error of FAVOR+; a JSON file and the plot for the README.

python -m benchmarks.linear_time            # measure and plot; long: softmax at 16,384 tokens takes seconds a pass
python -m benchmarks.linear_time --plot     # plot what was measured
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F

from benchmarks.harness import PEER, RESULTS, _rounded, compare, environment, peak_memory
from benchmarks.linear_attention import (
    FEATURES,
    HEADS,
    WIDTH,
    both_passes,
    favor,
    favor_errors,
    forward_pass,
    heads,
    linear,
)


LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FOLDER = RESULTS / "linear_time"
KINDS = ("forward", "both passes", "memory")


def variants(causal: bool) -> dict:
    """What is compared, by name; the peer is fused softmax attention."""
    return {
        PEER: lambda *inputs: F.scaled_dot_product_attention(*inputs, is_causal=causal),
        "elu + 1": linear("elu", causal),
        "two softmaxes": linear("double_softmax", causal),
        "FAVOR+ ReLU": favor(causal=causal, attention_kernel="generalized_relu", use_projection=True),
        "FAVOR+ softmax": favor(causal=causal),
    }


def measure(lengths=LENGTHS, pairs: int = 5, keep: Callable[[dict], None] | None = None) -> dict:
    """All numbers: direction -> kind -> length -> variant -> times or memory. Fewer rounds at the longest lengths.

    `keep` gets what there is after every length.
    """
    results: dict = {name: {kind: {} for kind in KINDS} for name in ("bidirectional", "causal")}
    for length in lengths:
        for causal in (False, True):
            found = results["causal" if causal else "bidirectional"]
            inputs = heads(length)
            rounds = {8192: min(pairs, 2), 16384: 1}.get(length, pairs)
            passes = {name: both_passes(attend, inputs) for name, attend in variants(causal).items()}
            alone = {name: forward_pass(attend, inputs) for name, attend in variants(causal).items()}
            found["forward"][length] = compare(alone, rounds, warmup=int(rounds > 1))
            found["both passes"][length] = compare(passes, rounds, warmup=int(rounds > 1))
            peaks = {name: peak_memory(run) / 2**20 for name, run in passes.items()}
            found["memory"][length] = {name: {"mb": peak, "ratio": peak / peaks[PEER]} for name, peak in peaks.items()}
            ratios = {name: round(each.get("ratio", 1), 3) for name, each in found["both passes"][length].items()}
            print("causal" if causal else "bidirectional", length, ratios, flush=True)
        if keep is not None:
            keep(results)
    return results


def crossovers(results: dict) -> dict:
    """First length, interpolated on a logarithmic scale, from which a variant needs less time than softmax."""
    found: dict = {}
    for direction, kinds in results.items():
        for kind in KINDS[:2]:
            lengths = sorted(kinds[kind], key=int)
            for name in (name for name in kinds[kind][lengths[0]] if name != PEER):
                ratios = [kinds[kind][length][name]["ratio"] for length in lengths]
                where = next((i for i, ratio in enumerate(ratios) if ratio < 1), None)
                if where is None:
                    crossing = None
                elif where == 0:
                    crossing = f"below {lengths[0]}"
                else:
                    (low, high), (above, below) = (
                        map(int, lengths[where - 1 : where + 1]),
                        ratios[where - 1 : where + 1],
                    )
                    share = (above - 1) / (above - below)
                    crossing = round(low * (high / low) ** share)
                found.setdefault(direction, {}).setdefault(kind, {})[name] = crossing
    return found


def plot(record: dict, path: Path) -> None:
    """Ratios of time over length in both directions, and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    panels = [("bidirectional", "both passes"), ("causal", "both passes"), ("bidirectional", "memory")]
    for axis, (direction, kind) in zip(axes, panels):
        table = record["results"][direction][kind]
        lengths = sorted(table, key=int)
        for name in table[lengths[0]]:
            if kind == "memory":
                values = [table[length][name]["mb"] for length in lengths]
            else:
                values = [table[length][name].get("ratio", 1.0) for length in lengths]
            style = {"color": "black", "linestyle": "--"} if name == PEER else {"marker": "o", "markersize": 3}
            label = "softmax (fused)" if name == PEER else name
            axis.plot([int(length) for length in lengths], values, label=label, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.set_title(f"{direction}, forward and backward" + (", peak MB" if kind == "memory" else ""), fontsize=10)
        axis.set_ylabel("MB" if kind == "memory" else "time / softmax's time")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{HEADS} heads of {WIDTH}, {FEATURES} random features, {record['cpu']}, 1 thread", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Linear-time attention against fused softmax, by length.")
    parser.add_argument("--plot", action="store_true", help="only draw what was measured")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved rounds; 2 at 8,192 tokens, 1 at 16,384")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="stop at this length")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    file = options.folder / "results.json"
    if not options.plot:
        errors = favor_errors()

        def write(results: dict) -> None:
            record = {
                "command": f"python -m benchmarks.linear_time --pairs {options.pairs} --longest {options.longest}",
                "peer": "fused scaled_dot_product_attention",
                "crossover, tokens": crossovers(results),
                "error of FAVOR+ softmax, share of the largest result, by deviation of queries and keys": errors,
                "results": results,
            }
            file.write_text(json.dumps(_rounded(record | environment()), indent=1) + "\n")

        options.folder.mkdir(parents=True, exist_ok=True)
        measure(tuple(length for length in LENGTHS if length <= options.longest), options.pairs, write)
    plot(json.loads(file.read_text()), options.folder / "linear_time.png")


if __name__ == "__main__":
    main()
