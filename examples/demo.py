"""Load a pre-trained checkpoint in a fresh process and try it on real sentences.

    python examples/demo.py runs/electra_tiny
    python examples/demo.py runs/electra_tiny --text "The president [MASK] the congress."

Whatever the paper: a masked language model fills the [MASK]s; a pre-training model that scores every token marks the
words that it takes for replaced ones.
"""

import argparse

import torch
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

import bestiary  # noqa: F401  registers the auto classes


MASKED = "The president of the united [MASK] spoke to the congress about the [MASK] of the nation."
CORRUPTED = "The president of the united banana spoke to the congress about the peace of the nation."


def fill_masks(folder: str, text: str) -> None:
    """Print the most probable words at every [MASK]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    encoded = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        probabilities = model(**encoded).logits[0].softmax(-1)  # (T, V)
    print(f"\n{type(model).__name__}: {text}")
    for position in (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten():
        best = probabilities[position].topk(5)
        words = zip(tokenizer.convert_ids_to_tokens(best.indices), best.values.tolist())
        print("  [MASK] = " + ", ".join(f"{word} {100 * share:.1f} %" for word, share in words))


def mark_replaced(folder: str, text: str) -> None:
    """Print every word with the probability that it was replaced, if the checkpoint's pre-training model gives one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForPreTraining.from_pretrained(folder).eval()
    encoded = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**encoded)
    scores = outputs.get("logits")
    if scores is None or scores.shape != encoded["input_ids"].shape:
        return
    shares = scores[0].sigmoid().tolist()
    words = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    print(f"\n{type(model).__name__}: probability that a word was replaced")
    for word, share in list(zip(words, shares))[1:-1]:
        print(f"  {word:>14} {share:5.2f} {'#' * round(40 * share)}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub name")
    parser.add_argument("--text", default=MASKED, help="text with [MASK] in it")
    parser.add_argument("--corrupted", default=CORRUPTED, help="text in which a word was replaced")
    arguments = parser.parse_args()
    fill_masks(arguments.checkpoint, arguments.text)
    mark_replaced(arguments.checkpoint, arguments.corrupted)


if __name__ == "__main__":
    main()
