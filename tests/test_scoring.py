"""Likelihood of sentences, n-best lists and similarity: one pass against one row a token, sums and means by hand."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from bestiary import compare as comparing
from bestiary import scores
from bestiary.configuration.configuration_tta import TtaConfig
from bestiary.modeling.modeling_bert import BertPretrainingConfig, BertPretrainingForMaskedLM
from bestiary.modeling.modeling_tta import TtaForMaskedLM
from bestiary.scoring import (
    choose_weight,
    mean_states,
    rescore_nbest,
    sentence_log_likelihoods,
    sentence_similarity,
    sentence_vectors,
    word_errors,
)


ROOT = Path(__file__).parents[1]
WORDS = "the a cat dog bird sees hears likes big small red house tree river stone runs sleeps under over near".split()
SIZES = {
    "vocab_size": 25,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "initializer_range": 0.5,
}
SENTENCES = ["the cat sees the big red dog", "a bird", "under the river a stone sleeps near", "dog"]


@pytest.fixture(scope="module")
def tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: number for number, word in enumerate([*special, *WORDS])})


@pytest.fixture(params=[1, 20])
def batched(request, monkeypatch):
    """Scores are the same however sentences are batched: one at a time, or several with padding."""
    monkeypatch.setattr(scores, "TOKENS_PER_BATCH", request.param)


def make(model_class, config_class, **fields):
    torch.manual_seed(0)
    names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    sizes = {names.get(name, name): value for name, value in SIZES.items()} if "Distil" in str(config_class) else SIZES
    return model_class(config_class(**sizes | fields)).train()  # scoring must switch dropout off


def t_ta(**fields):
    return make(TtaForMaskedLM, TtaConfig, **fields)


MASKED = {
    "bestiary-bert": lambda: make(BertPretrainingForMaskedLM, BertPretrainingConfig),
    "bert": lambda: make(BertForMaskedLM, BertConfig),
    "electra": lambda: make(ElectraForMaskedLM, ElectraConfig, embedding_size=8),
    "distilbert": lambda: make(DistilBertForMaskedLM, DistilBertConfig, hidden_dim=32),
    "roberta": lambda: make(RobertaForMaskedLM, RobertaConfig, pad_token_id=0),
}


# ---- likelihoods


@pytest.mark.parametrize("special_tokens", [None, True, False])
def test_t_ta_scores_sentences_in_one_pass(tokenizer, batched, special_tokens):
    model = t_ta()
    expected = []
    model.eval()
    for sentence in SENTENCES:
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        with torch.no_grad():
            each = model(ids).logits.log_softmax(-1).gather(-1, ids[..., None])[0, :, 0].double()
        expected.append(each[1:-1].sum().item() if special_tokens is False else each.sum().item())
    model.train()
    rows = []
    model.bert.register_forward_hook(lambda m, a, k, o: rows.append(k["input_ids"].shape[0]), with_kwargs=True)
    found = sentence_log_likelihoods(model, tokenizer, SENTENCES, special_tokens=special_tokens)
    assert found.sums == pytest.approx(expected, rel=1e-5)
    assert found.counts.tolist() == [7 + 2 * (special_tokens is not False), *(found.counts[1:].tolist())]
    assert sum(rows) == len(SENTENCES), "one row a sentence"
    assert model.training


def test_likelihoods_of_t_ta_are_those_with_the_token_masked(tokenizer):
    """The token does not enter, so that a mask in its place gives the same number."""
    model = t_ta()
    one_pass = sentence_log_likelihoods(model, tokenizer, SENTENCES, special_tokens=False)
    model.sees_own_token = True  # score it as a masked language model
    masked = sentence_log_likelihoods(model, tokenizer, SENTENCES, special_tokens=False)
    assert one_pass.sums == pytest.approx(masked.sums, rel=1e-5)


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("special_tokens", [None, True])
def test_other_models_score_by_masking_each_token(tokenizer, batched, kind, special_tokens):
    model = MASKED[kind]().eval()
    expected, counts = [], []
    for sentence in SENTENCES:
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        places = range(ids.shape[1]) if special_tokens else range(1, ids.shape[1] - 1)
        total = 0.0
        for place in places:
            masked = ids.clone()
            masked[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                logits = model(masked, attention_mask=torch.ones_like(ids)).logits
            total += logits[0, place].log_softmax(-1)[ids[0, place]].item()
        expected.append(total)
        counts.append(len(places))
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:-1]))
    found = sentence_log_likelihoods(model.train(), tokenizer, SENTENCES, special_tokens=special_tokens)
    hook.remove()
    assert found.sums == pytest.approx(expected, rel=1e-4) and found.counts.tolist() == counts
    assert sum(shape.numel() for shape in seen) == sum(counts), "logits of more than the masked rows"
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert model.training


def test_the_whole_head_runs_at_masked_rows_only(tokenizer):
    model = MASKED["bert"]()
    rows = []
    model.cls.predictions.transform.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[:-1].numel()))
    found = sentence_log_likelihoods(model, tokenizer, SENTENCES)
    assert sum(rows) == found.counts.sum()


def test_sentences_are_cut_at_the_models_length(tokenizer):
    model = t_ta()
    text = " ".join(WORDS * 3)
    assert sentence_log_likelihoods(model, tokenizer, [text]).counts.tolist() == [24]
    assert sentence_log_likelihoods(model, tokenizer, [text], max_length=9).counts.tolist() == [9]
    assert sentence_log_likelihoods(model, tokenizer, [""], special_tokens=False).sums.tolist() == [0]
    assert len(sentence_log_likelihoods(model, tokenizer, []).sums) == 0


def test_mistakes_in_scoring(tokenizer):
    model = t_ta()
    with pytest.raises(ValueError, match="sentences must be a list, got the single string 'a cat'"):
        sentence_log_likelihoods(model, tokenizer, "a cat")
    without = BertTokenizer(vocab=tokenizer.get_vocab())
    without.mask_token = None
    with pytest.raises(ValueError, match="BertForMaskedLM scores by masking tokens, but .* has no mask_token"):
        sentence_log_likelihoods(MASKED["bert"](), without, SENTENCES)
    assert sentence_log_likelihoods(model, without, SENTENCES).sums.all()  # needs no mask


# ---- comparisons of recipes


def test_comparisons_score_t_ta_in_one_pass_and_over_the_same_tokens(tokenizer, tmp_path):
    """`bestiary compare` sees a masked language model, whose special tokens do not count."""
    t_ta().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pairs = [scores.MinimalPair("the cat sees the dog", "the cat sees sees dog")]
    settings = comparing.Settings(recipes=("tta_tiny",), seeds=(0,), output_dir=tmp_path)
    scorer = comparing.Scorer(settings, SENTENCES, pairs, 16)
    found = scorer(tmp_path, torch.device("cpu"), 0, True)
    own = sentence_log_likelihoods(t_ta(), tokenizer, SENTENCES, special_tokens=False)
    assert own.counts.tolist() == [7, 2, 7, 1]
    assert found["pseudo_perplexity"] == pytest.approx(own.perplexity, rel=1e-5)
    assert found["minimal_pairs_masked_lm"] in (0, 1) and "minimal_pairs_detector" not in found
    assert scorer.networks["masked_lm"].startswith("TtaForMaskedLM, ")


@pytest.mark.slow
def test_t_ta_beside_bert(tokenizer, tmp_path):
    """A whole comparison at equal tokens: both are trained, and scored on the same sentences and pairs."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rng = np.random.default_rng(0)
    lines = ["\n".join(" ".join(rng.choice(WORDS, 7)) + "." for _ in range(5)) for _ in range(6)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"sentence_good": "the cat runs", "sentence_bad": "cat the runs"})
    )
    options = f"--train_file {tmp_path / 'text.txt'} --validation_fraction 0.3 --tokenizer {tmp_path / 'tokenizer'}"
    settings = comparing.Settings(
        recipes=("bert_mlm_tiny", "tta_tiny"),
        seeds=(0,),
        output_dir=tmp_path / "results",
        equal="tokens",
        budget="2",
        checkpoints=1,
        held_out_sequences=2,
        minimal_pairs=str(tmp_path / "pairs.jsonl"),
        overrides=(*options.split(), "--dataset", "null", "--max_length", "16"),
    )
    results = comparing.compare(settings)
    kinds = [set(run["scores"]) for run in results["runs"]]
    assert kinds == [{"minimal_pairs_masked_lm", "pseudo_perplexity"}] * 2
    costs = [results["plan"]["recipes"][name]["cost"] for name in settings.names]
    assert costs[0]["tokens"] == costs[1]["tokens"] and 0 < costs[0]["flops"] < costs[1]["flops"]  # all are predicted
    assert "TtaForMaskedLM" in results["runs"][1]["networks"]["masked_lm"]


# ---- n-best lists


LISTS = [["the cat sees the dog", "the cat sees a dog", "cat the sees dog the"], ["a bird", "a river"]]
GIVEN = [[-3.0, -2.5, -4.0], [-1.0, -1.5]]


def test_rescoring_combines_linearly(tokenizer, batched):
    model = t_ta()
    likelihoods = [sentence_log_likelihoods(model, tokenizer, texts).sums for texts in LISTS]
    for weight in (0.0, 0.3, 1.0):
        for found, given, likely in zip(rescore_nbest(model, tokenizer, LISTS, GIVEN, weight), GIVEN, likelihoods):
            combined = (1 - weight) * np.array(given) + weight * likely
            assert found.likelihoods == pytest.approx(likely, rel=1e-5)
            assert found.combined == pytest.approx(combined, rel=1e-5) and found.best == combined.argmax()
    orders = [found.combined.argsort().tolist() for found in rescore_nbest(model, tokenizer, LISTS, GIVEN, 0.0)]
    assert orders == [np.argsort(given).tolist() for given in GIVEN]
    orders = [found.combined.argsort().tolist() for found in rescore_nbest(model, tokenizer, LISTS, GIVEN, 1.0)]
    assert orders == [likely.argsort().tolist() for likely in likelihoods]


def test_mistakes_in_lists(tokenizer):
    model = t_ta()
    for lists, given, weight, message in (
        (LISTS, GIVEN, 1.5, r"weight must be in \[0, 1\], got 1.5"),
        (LISTS, [[-3.0, -2.5], [-1.0, -1.5]], 0.5, r"\[3, 2\] hypotheses, but there are \[2, 2\] scores"),
        ([["a bird"], []], [[1.0], []], 0.5, "n-best list 1 is empty"),
        ("a bird", GIVEN, 0.5, "hypotheses must be a list"),
        (LISTS, [[-3.0, -np.inf, -4.0], [-1.0, -1.5]], 1.0, r"scores must be finite, got \[-3.0, -inf, -4.0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            rescore_nbest(model, tokenizer, lists, given, weight)
    assert rescore_nbest(model, tokenizer, [], [], 0.5) == []


def test_weight_with_the_fewest_errors():
    given, likely = [[0.0, -1.0], [0.0, -3.0]], [[-5.0, -1.0], [-1.0, -9.0]]
    # list 0 changes to its second hypothesis at weight 0.2, list 1 never does
    assert choose_weight(given, likely, [[2, 0], [0, 1]]) == (0.21, 0.0)
    assert choose_weight(given, likely, [[0, 2], [0, 1]]) == (0.0, 0.0)
    assert choose_weight(given, likely, [[1, 0], [3, 0]], weights=[0.9, 0.5]) == (0.5, 3.0)
    with pytest.raises(ValueError, match="errors"):
        choose_weight(given, likely, [[1], [2]])


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "a c", 1),
        ("a b c", "x a b c", 1),
        ("a b", "b a", 2),
        ("", "a b", 2),
        ("a", "", 1),
    ],
)
def test_word_errors(reference, hypothesis, errors):
    assert word_errors(reference, hypothesis) == errors


# ---- similarity


def test_vectors_are_means_of_the_last_states_without_special_tokens(tokenizer, batched):
    model = t_ta().eval()
    found = sentence_vectors(model.train(), tokenizer, SENTENCES)
    model.eval()
    for sentence, vector in zip(SENTENCES, found):
        with torch.no_grad():
            states = model.bert(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        assert_close(vector, states[1:-1].mean(0), rtol=1e-4, atol=1e-5)
    assert_close(sentence_vectors(model.bert, tokenizer, SENTENCES), found)  # without its head too


def test_vectors_of_masked_tokens(tokenizer, batched):
    """Of T-TA the state of a token is the same whether it is masked or not; of BERT not."""
    model = t_ta()
    plain, masked = (sentence_vectors(model, tokenizer, SENTENCES, mask_each_token=mask) for mask in (False, True))
    assert_close(masked, plain, rtol=1e-4, atol=1e-5)
    model = make(BertModel, BertConfig).eval()
    found = sentence_vectors(model, tokenizer, SENTENCES, mask_each_token=True)
    for sentence, vector in zip(SENTENCES, found):
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        states = []
        for place in range(1, ids.shape[1] - 1):
            one = ids.clone()
            one[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                states.append(model(one).last_hidden_state[0, place])
        assert_close(vector, torch.stack(states).mean(0), rtol=1e-4, atol=1e-5)


def test_similarity_is_the_cosine(tokenizer):
    model = t_ta()
    first, second = SENTENCES[:3], [SENTENCES[0], SENTENCES[2], "a dog"]
    found = sentence_similarity(model, tokenizer, first, second)
    vectors = [sentence_vectors(model, tokenizer, texts).double().numpy() for texts in (first, second)]
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*vectors)]
    assert found == pytest.approx(expected, rel=1e-6) and found[0] == pytest.approx(1) and found[1] < 0.999
    assert len(sentence_similarity(model, tokenizer, [], [])) == 0
    with pytest.raises(ValueError, match="first has 2 sentences, second 1"):
        sentence_similarity(model, tokenizer, first[:2], second[:1])
    with pytest.raises(ValueError, match="sentence 1, '', has no tokens"):
        sentence_vectors(model, tokenizer, ["a cat", ""])
    with pytest.raises(ValueError, match="second must be a list"):
        sentence_similarity(model, tokenizer, ["a"], "a")


def test_mean_states():
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    assert mean_states(states, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]


# ---- examples


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    t_ta().save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def run(script, *arguments):
    return runpy.run_path(str(ROOT / "examples" / script))["main"]([*arguments])


def test_rescoring_example(checkpoint, tmp_path, capsys):
    assert len(run("rescore.py", checkpoint)) == 1
    assert "language model" in capsys.readouterr().out
    rows = [{"hypotheses": t, "scores": s, "reference": t[0]} for t, s in zip(LISTS, GIVEN)]
    file = tmp_path / "lists.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    results = run("rescore.py", checkpoint, "--nbest", str(file), "--development", str(file))
    printed = capsys.readouterr().out
    wrong = [word_errors(row["reference"], row["hypotheses"][r.best]) for row, r in zip(rows, results)]
    assert f"word error rate {100 * 1 / 7:.2f} % -> {100 * sum(wrong) / 7:.2f} %" in printed
    assert f"{sum(wrong)} word errors on" in printed


@pytest.mark.parametrize(
    ("script", "option"), [("rescore.py", "--nbest"), ("rescore.py", "--development"), ("similarity.py", "--pairs")]
)
def test_files_that_lack_something(script, option, checkpoint, tmp_path):
    file = tmp_path / "rows.jsonl"
    for text, message in (("", "has no rows"), ('{"hypotheses": [], "sentence1": "a"}', "row 1 has no s")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            run(script, checkpoint, option, str(file))


def test_similarity_example(checkpoint, tmp_path, capsys):
    assert len(run("similarity.py", checkpoint)) == 3
    rows = [{"sentence1": a, "sentence2": b, "score": i} for i, (a, b) in enumerate(zip(SENTENCES, SENTENCES[1:]))]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run("similarity.py", checkpoint, "--pairs", str(tmp_path / "pairs.jsonl"), "--mask_each_token")
    expected = 100 * np.corrcoef(found, range(3))[0, 1]
    assert f"Pearson correlation with the scores of 3 pairs: {expected:.2f}" in capsys.readouterr().out
