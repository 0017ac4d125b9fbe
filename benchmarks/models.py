"""Rows for whole training steps against the stock models of transformers. Both sides hold the same weights, and a step
is timed only after their losses were seen to agree.
"""

from collections.abc import Callable

import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.modeling.modeling_bert import BertPretrainingForMaskedLM
from bestiary.modeling.modeling_electra import ElectraJointForPreTraining

from .harness import compare, compare_memory, row, with_target


WIDTH = 128
LENGTHS = {
    4: (26, 42, 57, 84),
    16: (17, 24, 28, 32, 36, 40, 43, 47, 51, 55, 59, 64, 70, 78, 90, 118),
}
"""Quantiles of real lengths: pairs of consecutive sentences of English novels in BERT's word pieces, cut at 128. At
width 128 that is 58-59 % padding."""

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def masked_batch(batch: int, vocabulary: int, padded: bool) -> dict[str, torch.Tensor]:
    """Random tokens at real lengths (or full rows), 15 % of the real ones masked and labelled."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS[batch] if padded else (WIDTH,) * batch)
    real = torch.arange(WIDTH) < lengths[:, None]  # (B, T)
    tokens = torch.randint(1000, vocabulary, real.shape, generator=draw)
    masked = real & (torch.rand(real.shape, generator=draw) < 0.15)
    return {
        "input_ids": tokens.masked_fill(masked, 103) * real,
        "attention_mask": real.long(),
        "labels": tokens.masked_fill(~masked, -100),
    }


def agree(name: str, losses: dict[str, torch.Tensor]) -> None:
    """Refuse to time models that do not compute the same loss."""
    values = {variant: loss.item() for variant, loss in losses.items()}
    if max(values.values()) - min(values.values()) > 1e-4:
        raise RuntimeError(f"benchmark {name}: the losses differ, so the times mean nothing: {values}")


def training_step(model: PreTrainedModel, batch: dict, bf16: bool = False, **adamw) -> Callable[[], None]:
    """Forward, backward, AdamW and release of the gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, **adamw)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@row("mlm_step_small")
def mlm_step_small(pairs: int) -> dict:
    return mlm_step(
        pairs, 16, hidden=256, heads=4, targets={"ours": 0.50, "packed": 0.28, "packed, bf16": 0.18}, memory=True
    )


@row("mlm_step_base")
def mlm_step_base(pairs: int) -> dict:
    return mlm_step(pairs, 4, hidden=768, heads=12, targets={"ours": 0.82, "packed": 0.48, "packed, bf16": 0.30})


def mlm_step(pairs: int, batch: int, hidden: int, heads: int, targets: dict[str, float], memory: bool = False) -> dict:
    size = {
        "hidden_size": hidden,
        "num_hidden_layers": 12,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    inputs = masked_batch(batch, BertConfig().vocab_size, padded=True)

    def stock(**dropout) -> BertForMaskedLM:
        torch.manual_seed(0)
        return BertForMaskedLM(BertConfig(**size, **dropout))

    peer = stock(**NO_DROPOUT)
    models = {"peer": peer}
    for name, threshold in (("ours", None), ("packed", 0.1)):
        models[name] = BertPretrainingForMaskedLM(
            BertPretrainingConfig(**size, **NO_DROPOUT, unpad_threshold=threshold)
        )
        models[name].load_state_dict(peer.state_dict())
    with torch.no_grad():
        agree("mlm_step", {name: model.train()(**inputs).loss for name, model in models.items()})
    metrics = {}

    steps = {name: training_step(model, inputs, fused=True) for name, model in models.items()}
    for name in (
        "ours",
        "packed",
    ):  # one at a time: steps of three sizes in turn would pay for a heap that keeps resizing
        times = compare({"peer": steps["peer"], name: steps[name]}, pairs)
        metrics[f"time, {name}"] = {"peer": times["peer"], name: with_target(times[name], targets[name])}
    peaks = compare_memory(steps)
    aims = {"ours": 0.42, "packed": 0.25} if memory else {}
    metrics["peak memory"] = {
        name: with_target(result, aims[name]) if name in aims else result for name, result in peaks.items()
    }

    defaults = stock().train()
    fastest = {
        "peer": training_step(defaults, inputs, foreach=False, fused=False),
        "packed, bf16": training_step(models["packed"], inputs, bf16=True, fused=True),
    }
    times = compare(fastest, pairs)
    times["packed, bf16"] = with_target(times["packed, bf16"], targets["packed, bf16"])
    metrics["time against float32, dropout 0.1, AdamW in a loop"] = times
    return {
        "description": f"masked-LM step, 12 layers of {hidden}, batch {batch} x {WIDTH}, 58 % padding, fused AdamW",
        "peer": "transformers BertForMaskedLM, sdpa",
        "metrics": metrics,
    }


@row("electra_step_small")
def electra_step_small(pairs: int) -> dict:
    return electra_step(pairs, 8, "small", target=0.45)


@row("electra_step_base")
def electra_step_base(pairs: int) -> dict:
    return electra_step(pairs, 4, "base", target=0.80)


def electra_step(pairs: int, batch: int, size: str, target: float) -> dict:
    settings = ElectraJointConfig.SIZES[size] | {"generator_size_fraction": 1 / 4}
    settings["discriminator_config"] = settings["discriminator_config"] | NO_DROPOUT
    torch.manual_seed(0)
    ours = ElectraJointForPreTraining(ElectraJointConfig(**settings, sampling="inverse_cdf")).train()
    gumbel = ElectraJointForPreTraining(ElectraJointConfig(**settings, sampling="gumbel")).train()
    gumbel.load_state_dict(ours.state_dict())
    generator, discriminator = ours.to_generator().train(), ours.to_discriminator().train()
    generator.electra.embeddings = discriminator.electra.embeddings  # shared, as in the joint model
    generator.tie_weights()
    inputs = masked_batch(batch, generator.config.vocab_size, padded=False)
    ids, labels = inputs["input_ids"], inputs["labels"]
    mask = {"attention_mask": inputs["attention_mask"]}

    def stock() -> tuple[torch.Tensor, torch.Tensor]:
        generated = generator(ids, labels=labels, **mask)
        with torch.no_grad():
            samples = torch.distributions.Categorical(logits=generated.logits).sample()
        masked = labels != -100
        corrupted = torch.where(masked, samples, ids)
        fake = (masked & (samples != labels)).long()
        return generated.loss, discriminator(corrupted, labels=fake, **mask).loss

    seeds = torch.arange(batch)
    with torch.no_grad():
        parts = ours(**inputs, sampling_seeds=seeds)
        corrupted, fake = parts.corrupted_ids, parts.is_fake.long()
        agree("electra_step, generator", {"peer": stock()[0], "ours": parts.mlm_loss})
        agree(
            "electra_step, discriminator",
            {"peer": discriminator(corrupted, labels=fake, **mask).loss, "ours": parts.discriminator_loss},
        )

    def peer_step() -> None:
        generator_loss, discriminator_loss = stock()
        (generator_loss + 50 * discriminator_loss).backward()
        generator.zero_grad()
        discriminator.zero_grad()

    def joint_step(model: ElectraJointForPreTraining) -> Callable[[], None]:
        def step() -> None:
            model(**inputs, sampling_seeds=seeds).loss.backward()
            model.zero_grad()

        return step

    steps = {"peer": peer_step, "inverse_cdf": joint_step(ours), "gumbel": joint_step(gumbel)}
    times, peaks = compare(steps, pairs), compare_memory(steps)
    times["inverse_cdf"] = with_target(times["inverse_cdf"], target)
    return {
        "description": f"joint step, ELECTRA-{size}, generator 1/4, batch {batch} x {WIDTH}, forward and backward",
        "peer": "ElectraForMaskedLM with full logits, Categorical, ElectraForPreTraining",
        "metrics": {"time": times, "peak memory": peaks},
    }
