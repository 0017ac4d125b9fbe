"""Similarity of sentences by the mean states of an encoder, without any training on pairs.

    python examples/similarity.py runs/tta_tiny
    python examples/similarity.py runs/tta_tiny --pairs stsb.jsonl
    python examples/similarity.py runs/bert_mlm_tiny --pairs stsb.jsonl --mask_each_token

A line of the file is `{"sentence1": "...", "sentence2": "...", "score": 3.2}`; with scores the correlation with them
is printed too. `--mask_each_token` takes every token's state from a pass in which it is masked, which makes a masked
language model comparable to one that leaves tokens out of their own states by itself, at a pass for every token.
"""

import argparse

import numpy as np
from transformers import AutoModelForMaskedLM, AutoTokenizer

import bestiary  # noqa: F401  registers the auto classes
from bestiary.scoring import read_rows, sentence_similarity


EXAMPLES = [
    ("The president spoke to the congress.", "The congress heard the president speak."),
    ("The president spoke to the congress.", "There are twelve ships in the harbour."),
    ("He built a house of stone.", "They made houses out of wood and stone."),
]


def main(argv: list[str] | None = None) -> np.ndarray:
    """Compare and print; returns the similarities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub name")
    parser.add_argument("--pairs", help="JSONL file with sentence1, sentence2 and perhaps score")
    parser.add_argument("--mask_each_token", action="store_true", help="one pass for every token")
    options = parser.parse_args(argv)
    rows = [{"sentence1": first, "sentence2": second} for first, second in EXAMPLES]
    if options.pairs:
        rows = read_rows(options.pairs, "sentence1", "sentence2")
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForMaskedLM.from_pretrained(options.checkpoint)
    columns = [[row[name] for row in rows] for name in ("sentence1", "sentence2")]
    found = sentence_similarity(model, tokenizer, *columns, mask_each_token=options.mask_each_token)
    for value, first, second in list(zip(found, *columns))[:10]:
        print(f"{value:6.3f}  {first}  |  {second}")
    if all("score" in row for row in rows) and len(rows) > 1:
        correlation = np.corrcoef(found, [row["score"] for row in rows])[0, 1]
        print(f"Pearson correlation with the scores of {len(rows)} pairs: {100 * correlation:.2f}")
    return found


if __name__ == "__main__":
    main()
