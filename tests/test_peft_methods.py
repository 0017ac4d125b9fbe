"""Bottleneck adapters inside PEFT: registration without importing it, every layout of encoder, files, several
adapters, half precision, what must be refused.
"""

import copy
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from test_adapters import BASE, ENCODERS, LARGE, TINY, batch, stir, stock, wrap
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
)

import bestiary
from bestiary import BottleneckAdapterConfig, adapters_off
from bestiary.modeling import modeling_adapters as ours
from bestiary.modeling.layers.bottleneck import Bottleneck
from bestiary.peft_methods import BottleneckAdapterModel, BottleneckLayer, BottleneckNormLayer, register_peft_method


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks

TASKS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, ours.AdaptersForSequenceClassification),
    "TOKEN_CLS": (AutoModelForTokenClassification, ours.AdaptersForTokenClassification),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, ours.AdaptersForQuestionAnswering),
}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    """Configuration of a tiny encoder of every layout."""
    return ENCODERS[request.param]()


@pytest.fixture
def base(tmp_path):
    """Folder of a plain tiny BERT, and its logits on `batch()`."""
    model = stock(BertConfig(**TINY))
    model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def settings(**more):
    return BottleneckAdapterConfig(**{"task_type": "SEQ_CLS", "adapter_size": 5} | more)


def adapted(model, **more):
    torch.manual_seed(1)
    return stir(get_peft_model(model, settings(**more))).eval()


def load(folder, auto_class=AutoModelForSequenceClassification, **more):
    return auto_class.from_pretrained(folder, **more)


@torch.no_grad()
def outputs(model, inputs=None):
    inputs = {name: value for name, value in (inputs or batch()).items() if name != "labels"}
    return model(**inputs)[0]


# -------------------------------------------------------------------------------------------------------- registration


START = """
import sys
{first}
names = {{"peft" in sys.modules}}
{second}
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({folder!r})
import torch
print(names, model(torch.arange(5, 12)[None]).logits.tolist(), any("Bottleneck" in str(m) for m in model.modules()))
import peft, importlib.util
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert "BOTTLENECK" in PEFT_TYPE_TO_CONFIG_MAPPING
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_AfterImport"], "the finder is still there"
assert type(peft.__loader__).__module__ == "_frozen_importlib_external" and "exec_module" not in vars(peft.__loader__)
assert peft.__spec__.loader is peft.__loader__
"""


@pytest.mark.parametrize(
    ("first", "second", "early"),
    [
        ("import bestiary", "", False),  # transformers imports PEFT, when it finds the adapter
        ("import peft", "import bestiary", True),
        ("import bestiary", "import peft", False),
        ("import bestiary", "from peft import PeftModel", False),
        ("import bestiary", "import peft.tuners", False),
        ("import bestiary", "bestiary.BottleneckAdapterConfig()", False),
        ("import bestiary, importlib.util; assert importlib.util.find_spec('peft')", "import peft", False),
    ],
)
def test_registered_in_a_new_process(first, second, early, base, tmp_path):
    model = adapted(load(base))
    model.save_pretrained(tmp_path / "adapter")
    code = START.format(first=first, second=second, folder=str(tmp_path / "adapter"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    start = run.stdout.strip().split(" ", 1)[0]
    assert start == ("{True}" if early else "{False}") and run.stdout.strip().endswith("True")
    logits = torch.tensor(json.loads(run.stdout.split(" ", 1)[1].rsplit(" ", 1)[0]))
    assert_close(logits, outputs(model, {"input_ids": torch.arange(5, 12)[None]}))


def test_a_failed_import_leaves_the_hook(tmp_path):
    """The first import of PEFT breaks in the middle; the next one registers."""
    code = """
import sys, bestiary
sys.modules["peft.auto"] = None
try:
    import peft
except ImportError:
    pass
else:
    raise SystemExit("no error")
assert "bestiary.peft_methods" not in sys.modules
for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
    del sys.modules[name]
import peft
assert "BOTTLENECK" in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


@dataclass
class ProbeConfig(BottleneckAdapterConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PROBE


class ProbeModel(BottleneckAdapterModel):
    prefix = "probe_"


PROBE = "PROBE"


def test_registering_a_method_of_ones_own(monkeypatch):
    from bestiary import peft_methods

    for name in ("CONFIG", "TUNER", "PREFIX"):
        table = getattr(peft_methods, f"PEFT_TYPE_TO_{name}_MAPPING")
        for key in ("PROBE", "OTHER"):
            monkeypatch.setitem(table, key, None)  # puts the tables back afterwards
            del table[key]
    key = register_peft_method("PROBE", ProbeConfig, ProbeModel)
    assert key == key.value == key.name == "PROBE" and json.dumps(key) == '"PROBE"' and copy.deepcopy(key) == key
    with pytest.raises(ValueError, match="PEFT has a method 'PROBE'"):
        register_peft_method("PROBE", ProbeConfig, ProbeModel)
    for name, model in (
        ("LORA", ProbeModel),
        ("OTHER", ProbeModel),
        ("OTHER", type("M", (BaseTuner,), {"prefix": "x_"})),
    ):
        with pytest.raises(ValueError, match="register_peft_method"):
            register_peft_method(name, ProbeConfig, model)


# ------------------------------------------------------------------------------------------------------ every layout


@pytest.mark.parametrize("task", TASKS)
def test_round_trip_in_every_layout(encoder, task, tmp_path):
    """Trained tensors alone are saved, and give the outputs back on a fresh base, by every way of loading, here and in
    our own classes."""
    auto_class, own_class = TASKS[task]
    torch.manual_seed(0)
    plain = stir(auto_class.from_config(encoder))
    plain.save_pretrained(tmp_path / "base")
    plain = load(tmp_path / "base", auto_class)
    before = outputs(plain)
    model = adapted(plain, task_type=task)
    expected = outputs(model)
    assert not torch.allclose(expected, before)
    with model.disable_adapter():
        assert torch.equal(outputs(model), before)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert sum(value.numel() for value in saved.values()) == sum(value.numel() for value in trained.values())
    assert len(saved) == len(trained)

    ways = [
        load(tmp_path / "adapter", auto_class),
        PeftModel.from_pretrained(load(tmp_path / "base", auto_class), tmp_path / "adapter").eval(),
        PeftModel.from_pretrained(
            load(tmp_path / "base", auto_class), tmp_path / "adapter", low_cpu_mem_usage=True
        ).eval(),
    ]
    for way in ways:
        assert torch.equal(outputs(way), expected)
    own = bestiary.load_adapter(own_class, tmp_path / "adapter")
    assert type(own) is own_class and not own.training
    assert_close(outputs(own), expected)
    assert sum(part.numel() for part in own.parameters() if part.requires_grad) == sum(
        map(torch.numel, saved.values())
    )
    bestiary.save_adapter(own, tmp_path / "again")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert_close(again, saved, rtol=0, atol=0)
    assert torch.equal(outputs(load(tmp_path / "again", auto_class)), expected)


def test_the_key_names_of_a_file(base, tmp_path):
    model = adapted(load(base))
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    layer = "base_model.model.bert.encoder.layer.0.attention.output"
    assert {
        f"{layer}.dropout.bottleneck_down.weight",
        f"{layer}.dropout.bottleneck_up.bias",
        f"{layer}.LayerNorm.bottleneck_norm.weight",
        "base_model.model.bert.embeddings.LayerNorm.bottleneck_norm.bias",
        "base_model.model.classifier.weight",
    } <= names
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["peft_type"] == "BOTTLENECK" and written["base_model_name_or_path"] == base
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(outputs(auto), outputs(model))


def test_what_is_trained(encoder):
    """The same parameters as in our classes: adapters, LayerNorms, the whole head, and no pooler of the encoder."""
    model = get_peft_model(stock(encoder), settings())
    own = wrap(stock(encoder))
    names = {name.removeprefix("model.") for name, parameter in own.named_parameters() if parameter.requires_grad}
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".bottleneck_norm.default", "")
            name = name.replace("bottleneck_down.default", "adapter.down").replace(
                "bottleneck_up.default", "adapter.up"
            )
            found.add(name.replace(".modules_to_save.default", ""))
    assert found == names
    if encoder.model_type == "bert":
        assert not any("pooler" in name for name in names)


@pytest.mark.parametrize(
    ("sizes", "trained"),
    [(BASE, 2_379_264 + 38_400 + 1_538), (LARGE, 6_343_680 + 100_352 + 2_050)],  # adapters, LayerNorms, head
)
def test_the_numbers_of_bert(sizes, trained):
    with torch.device("meta"):
        plain = AutoModelForSequenceClassification.from_config(BertConfig(**sizes))
        model = get_peft_model(plain, BottleneckAdapterConfig(task_type="SEQ_CLS", adapter_size=64))
    assert model.get_nb_trainable_parameters()[0] == trained


def test_settings_reach_the_model():
    model = get_peft_model(
        stock(BertConfig(**TINY)),
        settings(adapter_size=7, adapter_act="relu", adapter_locations=["output"], train_layer_norm=False),
    )
    layers = {name: part for name, part in model.named_modules() if isinstance(part, BottleneckLayer)}
    assert [name.split("layer.")[1] for name in layers] == [f"{number}.output.dropout" for number in range(3)]
    assert not any(isinstance(part, BottleneckNormLayer) for part in model.modules())
    for part in layers.values():
        assert part.bottleneck_down["default"].out_features == 7
        assert isinstance(part.bottleneck_act["default"], torch.nn.ReLU)
        assert part.bottleneck_down["default"].weight.abs().max() <= 2e-2
    chosen = get_peft_model(
        stock(BertConfig(**TINY)), settings(target_modules=["0.output.dropout", "2.attention.output.dropout"])
    )
    names = [name.split("layer.")[1] for name, part in chosen.named_modules() if isinstance(part, BottleneckLayer)]
    assert names == ["0.output.dropout", "2.attention.output.dropout"]
    for wrong, message in (
        ({"adapter_size": 0}, "BottleneckAdapterConfig.adapter_size must be at least 1"),
        ({"adapter_locations": ["ffn"]}, "adapter_locations must be one or both"),
        ({"adapter_act": "step"}, "adapter_act must be one of"),
        ({"adapter_act": ["relu"]}, "adapter_act must be one of"),
        ({"adapter_size": "8"}, "adapter_size must be a whole number; got '8'"),
        ({"adapter_init_std": "small"}, "adapter_init_std must be a finite number above 0.*got 'small'"),
        ({"adapter_init_std": float("inf")}, "adapter_init_std must be a finite number above 0"),
        ({"adapter_locations": 3}, "adapter_locations must be one or both"),
        ({"adapter_locations": [["output"]]}, "adapter_locations must be one or both"),
        ({"train_layer_norm": "no"}, "BottleneckAdapterConfig.train_layer_norm must be true or false; got 'no'"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**wrong)
    with pytest.raises(ValueError, match="go into models of transformers, not into a Sequential"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), settings(task_type=None))


def test_without_a_task_there_is_no_head(base):
    model = AutoModel.from_pretrained(base)
    model.add_adapter(BottleneckAdapterConfig(adapter_size=4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("bottleneck" in name for name in trained)
    before = outputs(stir(model).eval())
    model.disable_adapters()
    assert not torch.allclose(outputs(model), before)
    model.enable_adapters()
    assert torch.equal(outputs(model), before)
    model.delete_adapter("default")
    assert not any("bottleneck" in name for name, _ in model.named_parameters())


def test_a_head_that_peft_has_no_task_for(tmp_path):
    torch.manual_seed(0)
    plain = AutoModelForMultipleChoice.from_config(BertConfig(**TINY))
    plain.save_pretrained(tmp_path / "base")
    model = stir(ours.AdaptersForMultipleChoice.from_encoder(tmp_path / "base", adapter_size=4)).eval()
    bestiary.save_adapter(model, tmp_path / "adapter")
    inputs = {"input_ids": batch()["input_ids"].unflatten(0, (2, 2))}
    assert_close(outputs(load(tmp_path / "adapter", AutoModelForMultipleChoice), inputs), outputs(model, inputs))


# ------------------------------------------------------------------------------------------------- several, off, out


def test_several_adapters(base, tmp_path):
    model = adapted(load(base))
    first = outputs(model)
    torch.manual_seed(9)
    model.add_adapter("other", settings(adapter_size=3))
    assert torch.equal(outputs(model), first), "adding one switched to it"
    model.set_adapter("other")
    stir(model, 0.2)
    second = outputs(model)
    assert not torch.allclose(first, second)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".other." in name for name in trained)
    model.set_adapter("default")
    assert torch.equal(outputs(model), first)
    model.save_pretrained(tmp_path / "both")
    assert torch.equal(outputs(load(tmp_path / "both")), first)
    assert torch.equal(outputs(load(tmp_path / "both/other")), second)
    fresh = PeftModel.from_pretrained(load(base), tmp_path / "both").eval()
    fresh.load_adapter(tmp_path / "both/other", "named")
    fresh.set_adapter("named")
    assert torch.equal(outputs(fresh), second)
    model.delete_adapter("other")
    assert torch.equal(outputs(model), first) and not any(".other." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["query"]))


def test_off_by_layer_and_all_at_once(encoder):
    """`adapters_off` leaves trained LayerNorms and head, `disable_adapter` gives the original ones back."""
    plain = stock(encoder)
    before = outputs(plain)
    model = adapted(plain)
    everything = outputs(model)
    own = wrap(copy.deepcopy(stock(encoder)))
    with torch.no_grad():
        wanted = {name: value for name, value in own.named_parameters() if value.requires_grad}
        given = [value for value in model.parameters() if value.requires_grad]
        assert sum(map(torch.numel, wanted.values())) == sum(map(torch.numel, given))
    for layers in (range(3), range(2), [2], None):
        with adapters_off(model, layers):
            off = outputs(model)
        assert not torch.allclose(off, everything) and not torch.allclose(off, before)
        other = copy.deepcopy(model)
        for name, part in other.named_modules():
            if isinstance(part, BottleneckLayer) and (layers is None or int(re.search(r"\d+", name)[0]) in layers):
                torch.nn.init.zeros_(part.bottleneck_up["default"].weight)
                torch.nn.init.zeros_(part.bottleneck_up["default"].bias)
        assert_close(off, outputs(other))
    assert torch.equal(outputs(model), everything)
    with model.disable_adapter():
        assert torch.equal(outputs(model), before)
    with pytest.raises(ValueError, match="no layer 7"), adapters_off(model, [7]):
        pass


def test_no_merging_but_unloading(base):
    model = adapted(load(base))
    for call in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="bottleneck adapters cannot be merged.*unload"):
            call()
    expected = outputs(load(base).bert)
    plain = model.unload()
    assert list(plain.state_dict()) == list(load(base).state_dict())
    assert [type(part) for part in plain.modules()] == [type(part) for part in load(base).modules()]
    assert torch.equal(outputs(plain.bert), expected)


# ------------------------------------------------------------------------------- precision, checkpointing, compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weights_are_float32_over_half_precision(encoder, dtype):
    torch.manual_seed(0)
    model = get_peft_model(stock(encoder).to(dtype), settings())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype), name
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss = model.train()(**batch()).loss
    loss.backward()
    optimizer.step()
    unused = ("rel_embeddings",)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved is parameter.requires_grad or any(part in name for part in unused), name
    full = get_peft_model(stock(encoder).to(dtype), settings(), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in full.parameters()} == {dtype}
    assert outputs(full.eval()).dtype == dtype


def test_float32_norms_under_bfloat16_states(base):
    """Outputs are those of the float32 model, but for the rounding of states to bfloat16."""
    exact = adapted(load(base))
    model = get_peft_model(load(base, dtype=torch.bfloat16), settings()).eval()
    model.load_state_dict({name: value for name, value in exact.state_dict().items()})
    assert_close(outputs(model).float(), outputs(exact), rtol=0.1, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(outputs(exact).float(), outputs(model).float(), rtol=0.1, atol=0.05)


def test_gradients_are_those_of_our_classes_also_under_checkpointing(encoder, tmp_path):
    stock(encoder).save_pretrained(tmp_path / "base")
    own = stir(wrap(load(tmp_path / "base"))).eval()
    bestiary.save_adapter(own, tmp_path / "adapter")
    inputs = batch()
    own(**inputs).loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in own.parameters() if p.grad is not None])
    for checkpointing in (False, True):
        model = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter", is_trainable=True)
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable()
            model.train()
            for part in model.modules():  # checkpointing is for training, in which dropout is on
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
                if hasattr(part, "dropout_prob"):
                    part.dropout_prob = 0.0
            for name in ("attention_probs_dropout_prob", "attention_dropout"):
                if name in model.config.to_dict():
                    setattr(model.config, name, 0.0)
        else:
            model.eval()
        model(**inputs).loss.backward()
        found = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert_close(found, norm, rtol=1e-4, atol=1e-5)


def test_compiled_into_one_graph(base):
    model = adapted(load(base))
    expected = outputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(outputs(compiled), expected)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_files_that_do_not_fit(tmp_path):
    base = str(tmp_path / "encoder")
    stock(BertConfig(**TINY)).bert.save_pretrained(base)
    model = adapted(load(base, num_labels=4))
    model.save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="does not fit .*classifier.bias.*give num_labels"):
        bestiary.load_adapter(ours.AdaptersForSequenceClassification, tmp_path / "four")
    labels = {0: "a", 1: "b", 2: "c", 3: "d"}
    own = bestiary.load_adapter(ours.AdaptersForSequenceClassification, tmp_path / "four", id2label=labels)
    assert_close(outputs(own), outputs(model))
    assert own.config.id2label == own.wrapped.config.id2label == labels
    loaded = load(tmp_path / "four", id2label=labels)
    assert torch.equal(outputs(loaded), outputs(model)) and loaded.config.id2label == labels
    get_peft_model(load(base), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ValueError, match="holds an adapter of the method .*LORA"):
        bestiary.load_adapter(ours.AdaptersForSequenceClassification, tmp_path / "lora")


def test_an_adapter_needs_to_know_its_encoder(tmp_path):
    model = wrap(stock(BertConfig(**TINY)))
    with pytest.raises(ValueError, match="was not made from a checkpoint.*base_model"):
        bestiary.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert sum(isinstance(part, Bottleneck) for part in model.modules()) == 6


def test_one_adapter_at_a_time():
    model = get_peft_model(AutoModel.from_config(BertConfig(**TINY)), settings(task_type=None))
    model.add_adapter("other", settings(task_type=None))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="default, other are active.*one at a time"):
        outputs(model)


@pytest.mark.parametrize("in_peft", [False, True])
def test_a_pooler_that_the_checkpoint_lacked_is_trained_and_saved(in_peft, tmp_path):
    """Each loading of a masked language model as a classifier draws another pooler."""
    torch.manual_seed(0)
    encoder = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    base = str(tmp_path / "base")
    BertForMaskedLM(encoder).save_pretrained(base)
    folder = tmp_path / "adapter"
    if in_peft:
        config = BottleneckAdapterConfig(adapter_size=4, task_type="SEQ_CLS")
        model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config).eval()
        model.save_pretrained(folder)
    else:
        model = ours.AdaptersForSequenceClassification.from_encoder(base, adapter_size=4)
        bestiary.save_adapter(model, folder)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert any("pooler" in name for name in trained)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        assert_close(loaded(input_ids=ids).logits, expected)
        assert_close(
            bestiary.load_adapter(ours.AdaptersForSequenceClassification, folder)(input_ids=ids).logits, expected
        )
    if not in_peft:  # the other classes have another prefix, or no pooler
        model.save_pretrained(tmp_path / "pair")
        for other in (ours.AdaptersModel, ours.AdaptersForTokenClassification):
            other.from_pretrained(tmp_path / "pair")


def test_target_modules_that_nothing_has():
    """LayerNorms are found all the same, which must not pass for adapters."""
    model = AutoModelForSequenceClassification.from_config(BertConfig(**TINY))
    with pytest.raises(ValueError, match="target_modules={'nonsense'} names no module of a BertForSequenceClass"):
        get_peft_model(model, BottleneckAdapterConfig(target_modules=["nonsense"], task_type="SEQ_CLS"))


def test_adapters_are_as_wide_as_the_output_that_they_follow(tmp_path):
    """Linear maps and embeddings of any width, behind which the encoder's width would be wrong."""
    base = ElectraConfig(**TINY, embedding_size=16)
    stock(base).save_pretrained(tmp_path / "base")
    chosen = ["intermediate.dense", "word_embeddings", "attention.output.dense"]
    model = adapted(load(tmp_path / "base"), target_modules=chosen)
    widths = {
        name.split("electra.")[1]: part.bottleneck_down["default"].in_features
        for name, part in model.named_modules()
        if isinstance(part, BottleneckLayer)
    }
    wide = {"intermediate.dense": 40, "attention.output.dense": 24}
    assert widths == {"embeddings.word_embeddings": 16} | {
        f"encoder.layer.{number}.{name}": width for number in range(3) for name, width in wide.items()
    }
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(load(tmp_path / "adapter")), outputs(model))
    model.add_adapter("other", settings(target_modules=chosen))
    model.set_adapter("other")
    outputs(model)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("embeddings.dropout", "electra.embeddings.dropout, a Dropout, is for states 24 wide, but .* is 16 wide"),
        ("intermediate_act_fn", "layer.0.intermediate.intermediate_act_fn, a GELU.* 24 wide, but .* is 40 wide"),
        ("attention.self", "layer.0.attention.self, a ElectraSelfAttention, .* is no single tensor"),
    ],
)
def test_places_whose_output_has_another_shape(place, message):
    """Only running them shows it."""
    model = get_peft_model(stock(ElectraConfig(**TINY, embedding_size=16)), settings(target_modules=[place]))
    with pytest.raises(ValueError, match=f"target_modules: the adapter behind .*{message}"):
        outputs(model)


def test_places_inside_each_other():
    message = "names bert.encoder.layer.0.output, a BertOutput, in which bert.encoder.layer.0.output.LayerNorm gets"
    with pytest.raises(ValueError, match=message):
        get_peft_model(stock(BertConfig(**TINY)), settings(target_modules=["0.output"]))
    model = get_peft_model(stock(BertConfig(**TINY)), settings(target_modules=["0.output"], train_layer_norm=False))
    outputs(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_place_beside_no_parameters(dtype):
    """The module that holds it has none whose device and type an adapter could take."""
    plain = stock(BertConfig(**TINY)).to(dtype)
    for layer in plain.bert.encoder.layer:
        layer.output.dropout = torch.nn.Sequential(layer.output.dropout)
    model = get_peft_model(plain, settings(target_modules=["output.dropout.0"]), autocast_adapter_dtype=False)
    assert {part.dtype for part in model.parameters()} == {dtype}
    outputs(model)


# ---------------------------------------------------------------------------------------------------- another encoder


@pytest.fixture
def with_pooler(tmp_path):
    """Folders of one encoder: as a masked language model, and alone with a pooler."""
    model = stock(BertConfig(**TINY))
    model.bert.save_pretrained(tmp_path / "encoder")
    masked = BertForMaskedLM(model.config)
    masked.bert.load_state_dict(model.bert.state_dict(), strict=False)
    masked.save_pretrained(tmp_path / "masked")
    return str(tmp_path / "masked"), str(tmp_path / "encoder")


def test_the_encoder_can_be_another_than_the_file_names(with_pooler, tmp_path):
    """With the file's pooler over an encoder that has one of its own."""
    masked, encoder = with_pooler
    model = stir(ours.AdaptersForSequenceClassification.from_encoder(masked, adapter_size=4)).eval()
    bestiary.save_adapter(model, tmp_path / "adapter")
    moved = tmp_path / "moved"
    Path(masked).rename(moved)
    for place in (moved, encoder):
        own = bestiary.load_adapter(ours.AdaptersForSequenceClassification, tmp_path / "adapter", base_model=place)
        assert own.config.new_modules == ["pooler"] and not hasattr(own.config, "base_model")
        assert torch.equal(outputs(own), outputs(model))
        trained = {name for name, part in own.named_parameters() if part.requires_grad}
        assert trained == {name for name, part in model.named_parameters() if part.requires_grad}
        bestiary.save_adapter(own, tmp_path / "again")
        written = json.loads((tmp_path / "again/adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(place)
        for loaded in (
            load(tmp_path / "again"),
            PeftModel.from_pretrained(load(place), tmp_path / "adapter").eval(),
        ):
            assert_close(outputs(loaded), outputs(model))


def test_a_pooler_that_nobody_has(with_pooler, tmp_path):
    masked, encoder = with_pooler
    model = ours.AdaptersForSequenceClassification.from_encoder(encoder, adapter_size=4)
    bestiary.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=f"over {masked}; missing.*pooler.dense.weight"):
        bestiary.load_adapter(ours.AdaptersForSequenceClassification, tmp_path, base_model=masked)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which encoder it is for; give base_model"):
        bestiary.load_adapter(ours.AdaptersForSequenceClassification, tmp_path)
