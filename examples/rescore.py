"""Rescore the n-best lists of a recogniser or translator with a masked language model.

    python examples/rescore.py runs/tta_tiny
    python examples/rescore.py runs/tta_tiny --nbest test.jsonl --weight 0.3
    python examples/rescore.py runs/tta_tiny --nbest test.jsonl --development dev.jsonl

A line of a file is `{"hypotheses": [...], "scores": [...], "reference": "..."}`; higher scores are better. Without
`--weight` it is chosen on `--development`, by word errors against the references; these are also what the word error
rate of `--nbest` is measured with. Without files it shows one list of its own.
"""

import argparse

import numpy as np
from transformers import AutoModelForMaskedLM, AutoTokenizer

import bestiary  # noqa: F401  registers the auto classes
from bestiary.scoring import choose_weight, read_rows, rescore_nbest, word_errors


EXAMPLE = {
    "hypotheses": [
        "the president of the united steaks spoke to the congress",
        "the president of the united states spoke to the congress",
        "the resident of the united states spoke two the congress",
    ],
    "scores": [-40.2, -40.9, -42.5],
    "reference": "the president of the united states spoke to the congress",
}


def main(argv: list[str] | None = None) -> list:
    """Rescore and print; returns the rescored lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub name")
    parser.add_argument("--nbest", help="JSONL file of lists to rescore")
    parser.add_argument("--development", help="JSONL file of lists with references, to choose the weight on")
    parser.add_argument("--weight", type=float, help="of the language model, 0 to 1 (default: 0.5)")
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForMaskedLM.from_pretrained(options.checkpoint)
    rows = read_rows(options.nbest, "hypotheses", "scores") if options.nbest else [EXAMPLE]

    def rescored(lists: list[dict], weight: float) -> list:
        columns = ([row[name] for row in lists] for name in ("hypotheses", "scores"))
        return rescore_nbest(model, tokenizer, *columns, weight=weight)

    def errors(lists: list[dict]) -> list[list[int]]:
        return [[word_errors(row["reference"], text) for text in row["hypotheses"]] for row in lists]

    weight = options.weight
    if weight is None and options.development:
        lists = read_rows(options.development, "hypotheses", "scores", "reference")
        likelihoods = [each.likelihoods for each in rescored(lists, 0.0)]
        weight, wrong = choose_weight([row["scores"] for row in lists], likelihoods, errors(lists))
        print(f"weight {weight:.2f}: {wrong:.0f} word errors on {options.development}")
    results = rescored(rows, 0.5 if weight is None else weight)
    for row, result in zip(rows, results):
        print(row["hypotheses"][result.best])
        if not options.nbest:
            for text, score, likelihood in zip(row["hypotheses"], row["scores"], result.likelihoods):
                print(f"  {score:8.2f} recogniser {likelihood:9.2f} language model  {text}")
    if all("reference" in row for row in rows):
        words = sum(len(row["reference"].split()) for row in rows)
        wrong = errors(rows)
        firsts = (int(np.argmax(row["scores"])) for row in rows)
        before = sum(counts[first] for counts, first in zip(wrong, firsts))
        after = sum(counts[result.best] for counts, result in zip(wrong, results))
        print(f"word error rate {100 * before / words:.2f} % -> {100 * after / words:.2f} %")
    return results


if __name__ == "__main__":
    main()
