"""Optimizers, schedules, layer-wise rates and the arguments that select them."""

import copy
import io
import math
import sys

import pytest
import torch
from transformers import ElectraConfig, ElectraForSequenceClassification, HfArgumentParser

from bestiary.trainers.arguments import BestiaryTrainingArguments
from bestiary.trainers.optimization import (
    OPTIMIZERS,
    SCHEDULES,
    BertAdam,
    build_optimizer,
    build_schedule,
    layerwise_groups,
    parameter_depths,
)


KERNELS = [{}, {"fused": True}, {"foreach": True}, {"foreach": False}]
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.999), 1e-6, 0.01


def draw_run(dtype=torch.float64, steps=12):
    """Three weights with their decays and, per step, their gradients; every other step has none for the second."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator).to(dtype) * scale for size, scale in (((9, 7), 20), ((5,), 1))]
    weights.append(torch.zeros(3, dtype=dtype))
    gradients = [[torch.randn(w.shape, generator=generator).to(dtype) for w in weights] for _ in range(steps)]
    for step in range(1, steps, 2):
        gradients[step][1] = None
    return weights, [DECAY, 0.0, 0.0], gradients


def reference(weights, decays, gradients, ratio=lambda w, update: 1.0):
    """The official update, written out; `ratio` scales it (LAMB)."""
    weights = [w.clone() for w in weights]
    m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step in gradients:
        for i, g in enumerate(step):
            if g is None:
                continue
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g**2
            update = m[i] / (v[i].sqrt() + EPS) + decays[i] * weights[i]
            weights[i] = weights[i] - LR * ratio(weights[i], update) * update
    return weights


def parameters_and_groups(weights, decays):
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    return parameters, [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, decays)]


def run(optimizer, parameters, gradients):
    for step in gradients:
        for parameter, gradient in zip(parameters, step):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_bert_adam_is_the_official_update(kernel, dtype, tolerance):
    weights, decays, gradients = draw_run(dtype)
    parameters, groups = parameters_and_groups(weights, decays)
    run(BertAdam(groups, lr=LR, betas=BETAS, eps=EPS, **kernel), parameters, gradients)
    for parameter, expected in zip(parameters, reference(weights, decays, gradients)):
        torch.testing.assert_close(parameter.data, expected, rtol=tolerance, atol=tolerance)


def test_bert_adam_runs_the_fused_kernel_unless_told_otherwise():
    assert BertAdam([torch.nn.Parameter(torch.zeros(1))]).defaults["fused"] is True
    assert BertAdam([torch.nn.Parameter(torch.zeros(1))], foreach=True).defaults["fused"] is False
    assert BertAdam([torch.nn.Parameter(torch.zeros(1))], fused=False).defaults["fused"] is False


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_first_step_of_the_paper_notes(kernel):
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = BertAdam([weight], lr=1e-3, eps=1e-6, weight_decay=0.01, **kernel)
    weight.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
    optimizer.step()
    step = (torch.tensor([3.0, 4.0], dtype=torch.float64) - weight.detach()) / 1e-3
    assert step.tolist() == pytest.approx([3.192178, -3.122228], abs=1e-6)
    by_formula = [0.1 * g / (math.sqrt(0.001 * g * g) + 1e-6) + 0.01 * w for w, g in ((3.0, 1.0), (4.0, -2.0))]
    assert step.tolist() == pytest.approx(by_formula, abs=1e-9)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_resume_of_bert_adam_is_bit_exact(kernel):
    weights, decays, gradients = draw_run(torch.float32)
    parameters, groups = parameters_and_groups(weights, decays)
    optimizer = BertAdam(groups, lr=LR, **kernel)
    run(optimizer, parameters, gradients[:5])
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)

    resumed_parameters, resumed_groups = parameters_and_groups([p.data for p in parameters], decays)
    resumed = BertAdam(resumed_groups, lr=LR, **kernel)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    copied_parameters, copied = copy.deepcopy((parameters, optimizer))
    for some_optimizer, some_parameters in (
        (optimizer, parameters),
        (resumed, resumed_parameters),
        (copied, copied_parameters),
    ):
        run(some_optimizer, some_parameters, gradients[5:])
    for a, b, c in zip(parameters, resumed_parameters, copied_parameters):
        assert torch.equal(a, b) and torch.equal(a, c)
    expected = reference(weights, [DECAY, 0.0, 0.0], gradients)
    for parameter, value in zip(parameters, expected):
        torch.testing.assert_close(parameter.data, value, rtol=2e-6, atol=2e-6)


def test_bert_adam_skips_a_step_with_infinite_gradients_under_loss_scaling():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = BertAdam([weight], lr=1e-2, weight_decay=0.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    for gradient, moved in ((math.inf, 0.0), (1.0, 1e-2 * 0.1 / (math.sqrt(0.001) + 1e-6))):
        weight.grad = None
        scaler.scale((weight * gradient).sum()).backward()
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert (before - weight.detach()).tolist() == pytest.approx([moved, moved], abs=1e-7)
        assert optimizer.state[weight]["step"].item() == BertAdam.STEP


@pytest.mark.parametrize("foreach", [True, False])
def test_lamb_is_the_official_albert_update(foreach):
    pytest.importorskip("pytorch_optimizer")
    weights, decays, gradients = draw_run()
    parameters, groups = parameters_and_groups(weights, decays)
    groups = [group | {"foreach": foreach} for group in groups]
    run(OPTIMIZERS["lamb"](groups, LR, BETAS, EPS, DECAY), parameters, gradients)

    def ratio(weight, update):
        return weight.norm() / update.norm() if weight.norm() > 0 and update.norm() > 0 else 1.0

    assert weights[0].norm() > 100  # the library would clamp it at 10
    for parameter, expected in zip(parameters, reference(weights, decays, gradients, ratio)):
        torch.testing.assert_close(parameter.data, expected, rtol=1e-5, atol=1e-6)  # the library adds eps to |update|


def test_lamb_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r"pip install bestiary\[optimizers\]"):
        OPTIMIZERS["lamb"]([torch.nn.Parameter(torch.ones(1))], LR, BETAS, EPS, DECAY)


def test_build_optimizer_takes_all_settings_from_the_arguments(tmp_path):
    args = BestiaryTrainingArguments(
        output_dir=tmp_path, learning_rate=0.3, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-4, weight_decay=0.2
    )
    optimizer = build_optimizer("bert_adam", [{"params": [torch.nn.Parameter(torch.ones(1))]}], args)
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == [0.3, (0.8, 0.9), 1e-4, 0.2]
    with pytest.raises(ValueError, match="one of bert_adam, lamb, radam; got 'adam'"):
        build_optimizer("adam", [], args)


@pytest.mark.parametrize(
    ("name", "peak", "warmup", "total", "kwargs", "values"),
    [
        ("bert", 1e-4, 10_000, 1_000_000, {}, {0: 0, 5000: 5e-5, 9999: 9.999e-5, 10_000: 9.9e-5, 505_000: 4.95e-5}),
        ("bert", 1.0, 0, 10, {}, {0: 1, 5: 0.5, 10: 0, 11: 0}),
        ("electra", 5e-4, 10_000, 1_000_000, {}, {0: 0, 5000: 2.4875e-4, 10_000: 4.95e-4, 500_000: 2.5e-4}),
        ("electra", 1.0, 0, 10, {}, {0: 1, 5: 0.5, 10: 0, 11: 0}),
        ("inverse_square_root", 1.0, 4000, 100_000, {}, {0: 0, 1000: 0.25, 4000: 1, 16_000: 0.5}),
        ("inverse_square_root", 1.0, 4000, 9, {"constant_warmup": True}, {0: 1, 3999: 1, 4000: 1, 16_000: 0.5}),
        ("one_cycle", 1.0, 0, 1000, {}, {0: 0.25, 250: 0.5, 500: 0.75, 750: 1, 900: 0.4, 1000: 0, 1001: 0}),
        ("one_cycle", 1.0, 0, 1000, {"base": 0.0, "fall": 0.5}, {0: 0, 250: 0.5, 500: 1, 750: 0.5, 1000: 0}),
    ],
)
def test_schedule_values(name, peak, warmup, total, kwargs, values):
    for step, rate in values.items():
        assert peak * SCHEDULES[name](step, warmup, total, **kwargs) == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_one_cycle_has_the_area_of_the_note():
    steps = 10_000
    area = sum(SCHEDULES["one_cycle"](step, 0, steps) for step in range(steps)) / steps
    assert area == pytest.approx(0.59375, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "warmup", "kwargs", "message"),
    [
        ("one_cycle", 5, {}, "warmup_steps must be 0"),
        ("one_cycle", 0, {"base": 1.5}, r"base must be in \[0, 1\]"),
        ("one_cycle", 0, {"fall": 1.0}, r"fall must be in \(0, 1\)"),
        ("one_cycle", 0, {"rise": 0.5}, "no option rise; it has base, fall"),
        ("inverse_square_root", 0, {}, "warmup_steps must be at least 1"),
        ("bert", 0, {"power": 2}, "no option power; it has none"),
        ("berta", 0, {}, "one of bert, electra, .*linear.*; got 'berta'"),
        ("reduce_lr_on_plateau", 0, {}, "schedule must be one of"),
    ],
)
def test_bad_schedules_are_refused(name, warmup, kwargs, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match=message):
        build_schedule(name, optimizer, warmup, 10, **kwargs)


def test_schedule_scales_the_rate_of_each_group_and_resumes():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule = build_schedule("electra", optimizer, 2, 8)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([5 / 8, 0.5 / 8])

    saved = io.BytesIO()
    torch.save((schedule.state_dict(), optimizer.state_dict()), saved)
    saved.seek(0)
    fresh = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in (1.0, 0.1)])
    resumed = build_schedule("electra", fresh, 2, 8)
    schedule_state, optimizer_state = torch.load(saved, weights_only=True)
    fresh.load_state_dict(optimizer_state)
    resumed.load_state_dict(schedule_state)
    for some_optimizer, some_schedule in ((optimizer, schedule), (fresh, resumed)):
        some_optimizer.step()
        some_schedule.step()
    assert resumed.get_last_lr() == schedule.get_last_lr() == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize(
    ("name", "kwargs", "factor"),
    [("linear", {}, 0.5), ("constant", {}, 1.0), ("warmup_stable_decay", {"num_decay_steps": 4}, 0.5)],
)
def test_schedules_of_transformers_are_built_by_name(name, kwargs, factor):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = build_schedule(name, optimizer, 2, 10, **kwargs)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([factor])


def electra(layers=12):
    config = ElectraConfig(
        vocab_size=11,
        embedding_size=4,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    return ElectraForSequenceClassification(config)


def rates(model, **kwargs):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = layerwise_groups(model, **kwargs)
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize(("off_by_one", "shift"), [(True, 0.8), (False, 1.0)])
def test_layerwise_rates_of_the_official_code(off_by_one, shift):
    found = rates(electra(), lr=1e-4, decay=0.8, weight_decay=0.01, off_by_one=off_by_one)
    expected = {  # note: 6.4e-5, 5.4976e-6, 4.3980e-6 with the official exponent, one power less without
        "classifier.dense.weight": 1e-4,
        "electra.encoder.layer.11.output.dense.weight": 8e-5 * shift,
        "electra.encoder.layer.0.attention.self.query.weight": 5.4976e-6 * shift / 0.8,
        "electra.embeddings.word_embeddings.weight": 4.3980e-6 * shift / 0.8,
        "electra.embeddings_project.weight": 4.3980e-6 * shift / 0.8,
    }
    for name, rate in expected.items():
        assert found[name] == (pytest.approx(rate, rel=1e-4), 0.01), name


def test_no_decay_on_norms_and_biases_and_every_parameter_is_in_one_group():
    model = electra(layers=2)
    found = rates(model, lr=1.0, decay=0.5, weight_decay=0.01)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (_, decay) in found.items():
        assert decay == (0.0 if "LayerNorm" in name or name.endswith("bias") else 0.01), name
    groups = layerwise_groups(model, lr=1.0, decay=0.5, weight_decay=0.01)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (rate, decay) for rate in (1.0, 0.5, 0.25, 0.125) for decay in (0.01, 0.0)
    ]
    everything = layerwise_groups(model, lr=1.0, decay=0.5, weight_decay=0.01, no_decay_patterns=("",))
    assert {group["weight_decay"] for group in everything} == {0.0}


def test_without_decay_any_model_has_two_groups():
    model = torch.nn.Linear(3, 2)
    groups = layerwise_groups(model, lr=0.5, weight_decay=0.1)
    assert [(group["params"], group["lr"], group["weight_decay"]) for group in groups] == [
        ([model.weight], 0.5, 0.1),
        ([model.bias], 0.5, 0.0),
    ]
    with pytest.raises(ValueError, match="no parameter name holds a layer number"):
        layerwise_groups(model, lr=0.5, decay=0.9)
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\], got 1.1"):
        layerwise_groups(model, lr=0.5, decay=1.1)


def test_frozen_parameters_are_left_out_and_do_not_shift_the_depths():
    model = electra(layers=3)
    model.classifier.requires_grad_(False)
    model.electra.encoder.layer[2].requires_grad_(False)
    found = rates(model, lr=1.0, decay=0.5)
    assert not [name for name in found if name.startswith(("classifier", "electra.encoder.layer.2"))]
    assert found["electra.encoder.layer.1.output.dense.weight"][0] == 0.25
    assert rates(model.electra, lr=1.0, decay=0.5)["encoder.layer.1.output.dense.weight"][0] == 0.25


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("bert.embeddings.LayerNorm.weight", 0),
        ("electra.embeddings_project.bias", 0),
        ("bert.encoder.layer.3.output.dense.weight", 4),
        ("bert.pooler.dense.weight", 13),
        ("cls.predictions.bias", 13),
        ("model.embeddings.tok_embeddings.weight", 0),
        ("model.layers.11.mlp.Wi.weight", 12),
        ("transformer.wte.weight", 0),
        ("transformer.h.0.attn.c_attn.weight", 1),
        ("transformer.ln_f.weight", 13),
        ("shared.weight", 0),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", 3),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),
        ("encoder.albert_layers.0.weight", 13),
    ],
)
def test_parameter_depths_by_name(name, depth):
    assert parameter_depths([name], 12) == {name: depth}


def test_arguments_reject_bad_values_with_the_allowed_ones(tmp_path):
    for field, value, message in [
        ("optimizer", "adam", "BestiaryTrainingArguments.optimizer must be one of bert_adam, lamb, radam; got 'adam'"),
        ("schedule", "lin", "BestiaryTrainingArguments.schedule must be one of bert, .*linear.*; got 'lin'"),
        ("layerwise_lr_decay", 0.0, r"layerwise_lr_decay must be in \(0, 1\], got 0.0"),
        ("layerwise_lr_decay", 1.01, r"layerwise_lr_decay must be in \(0, 1\], got 1.01"),
        ("schedule_kwargs", {"base": 1}, "schedule_kwargs is set but schedule is not"),
    ]:
        with pytest.raises(ValueError, match=message):
            BestiaryTrainingArguments(output_dir=tmp_path, **{field: value})
    with pytest.raises(ValueError, match="'one_cycle' has no option peak; it has base, fall"):
        BestiaryTrainingArguments(output_dir=tmp_path, schedule="one_cycle", schedule_kwargs={"peak": 1})
    with pytest.raises(ValueError, match="must be a dict or a JSON object, got 'base'"):
        BestiaryTrainingArguments(output_dir=tmp_path, schedule="one_cycle", schedule_kwargs="base")


def test_arguments_on_the_command_line(tmp_path):
    parser = HfArgumentParser(BestiaryTrainingArguments)
    line = ["--output_dir", str(tmp_path), "--optimizer", "lamb", "--layerwise_lr_decay", "0.8"]
    line += ["--schedule", "one_cycle", "--schedule_kwargs", '{"base": 0.1}', "--layerwise_lr_decay_off_by_one"]
    (args,) = parser.parse_args_into_dataclasses(line)
    assert (args.optimizer, args.schedule, args.schedule_kwargs) == ("lamb", "one_cycle", {"base": 0.1})
    assert (args.layerwise_lr_decay, args.layerwise_lr_decay_off_by_one) == (0.8, True)
    assert "layerwise_lr_decay_off_by_one" in parser.format_help()


def test_defaults_that_differ_from_transformers(tmp_path):
    args = BestiaryTrainingArguments(output_dir=tmp_path)
    assert (args.optimizer, args.schedule, args.layerwise_lr_decay) == (None, None, 1.0)
    assert (args.adam_epsilon, args.logging_nan_inf_filter, args.logging_steps, args.save_total_limit) == (
        1e-6,
        False,
        50,
        2,
    )
    for field in ("adam_epsilon", "logging_nan_inf_filter", "logging_steps", "save_total_limit", "optimizer"):
        assert f"{field}: " in BestiaryTrainingArguments.__doc__
