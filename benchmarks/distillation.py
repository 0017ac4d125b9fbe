"""Rows of MiniLMv2: the relation loss, and a whole distillation step, against the naive formulation."""

import copy
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from bestiary.configuration.configuration_minilmv2 import MiniLMv2Config
from bestiary.modeling.layers.relations import relation_losses
from bestiary.modeling.modeling_minilmv2 import MiniLMv2ForPreTraining

from .harness import compare, compare_memory, row, with_target
from .models import NO_DROPOUT, agree


HEADS = 48
Vectors = list[torch.Tensor]


def naive_loss(teacher: Vectors, student: Vectors) -> torch.Tensor:
    """Softmax, log-softmax and kl_div of all heads' scores, summed over the relations: ()."""

    def scores(vectors: torch.Tensor) -> torch.Tensor:
        heads = vectors.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, A, N, d)
        return heads @ heads.mT / heads.shape[-1] ** 0.5

    total = torch.zeros(())
    for theirs, ours in zip(teacher, student):
        target = scores(theirs).softmax(-1)
        divergence = F.kl_div(scores(ours).log_softmax(-1), target, reduction="none")
        total = total + divergence.sum(-1).mean()
    return total


def our_loss(teacher: Vectors, student: Vectors) -> torch.Tensor:
    """The same by our kernel."""
    pairs = zip(teacher, student)
    return sum(
        (relation_losses((theirs, theirs), (ours, ours), HEADS).mean() for theirs, ours in pairs), torch.zeros(())
    )


@row("relation_loss_128")
def relation_loss_128(pairs: int) -> dict:
    return relation_loss(pairs, 8, 128, {})


@row("relation_loss_512")
def relation_loss_512(pairs: int) -> dict:
    return relation_loss(pairs, 2, 512, {"time": 0.22, "memory": 0.06})


def relation_loss(pairs: int, batch: int, length: int, targets: dict[str, float]) -> dict:
    draw = torch.Generator().manual_seed(0)
    teacher = [torch.randn(batch, length, 768, generator=draw) for _ in range(3)]
    student = [torch.randn(batch, length, 384, generator=draw, requires_grad=True) for _ in range(3)]
    agree("relation_loss", {"peer": naive_loss(teacher, student), "ours": our_loss(teacher, student)})

    def both(loss: Callable[[Vectors, Vectors], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(teacher, student), student)

    functions = {"peer": both(naive_loss), "ours": both(our_loss)}
    metrics = {"time": compare(functions, pairs), "memory": compare_memory(functions)}
    for name, target in targets.items():
        metrics[name]["ours"] = with_target(metrics[name]["ours"], target)
    return {
        "description": (
            f"loss and gradients, 3 relations of {HEADS} heads, widths 768 and 384, batch {batch} x {length}"
        ),
        "peer": "softmax, log_softmax and kl_div of all scores",
        "metrics": metrics,
    }


@row("minilmv2_step_128")
def minilmv2_step_128(pairs: int) -> dict:
    return minilmv2_step(pairs, 8, 128)


@row("minilmv2_step_512")
def minilmv2_step_512(pairs: int) -> dict:
    return minilmv2_step(pairs, 2, 512)


def minilmv2_step(pairs: int, batch: int, length: int, layers: int = 12, width: int = 768) -> dict:
    """Teacher forward, student forward and backward. The peer runs both models whole, with hooks on their last
    projections.
    """
    torch.manual_seed(0)
    size = {"num_attention_heads": 12, **NO_DROPOUT}
    stock = BertModel(
        BertConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width, **size)
    ).eval()
    encoder = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, **size}
    model = MiniLMv2ForPreTraining.from_teacher(stock, encoder_config=encoder, num_relation_heads=HEADS).train()
    low = MiniLMv2ForPreTraining(copy.deepcopy(model.config), model.wrapped).train()
    low.attach_teacher(stock, dtype=torch.bfloat16)
    student = BertModel(MiniLMv2Config.from_teacher(stock.config, encoder).encoder_config).train()
    student.load_state_dict(model.wrapped.state_dict())
    ids = torch.randint(1000, 30_000, (batch, length), generator=torch.Generator().manual_seed(1))
    found: dict[str, Vectors] = {"teacher": [], "student": []}
    for name, each in (("teacher", stock), ("student", student)):
        attention = each.encoder.layer[-1].attention.self
        for linear in (attention.query, attention.key, attention.value):
            linear.register_forward_hook(lambda module, args, output, name=name: found[name].append(output))

    def peer_loss() -> torch.Tensor:
        for vectors in found.values():
            vectors.clear()
        with torch.no_grad():
            stock(ids)
        student(ids)
        return naive_loss(found["teacher"], found["student"])

    with torch.no_grad():
        agree("minilmv2_step", {"peer": peer_loss(), "ours": model(ids).loss})

    def step(loss: Callable[[], torch.Tensor], trained: BertModel) -> Callable[[], None]:
        def run() -> None:
            loss().backward()
            trained.zero_grad()

        return run

    functions = {
        "peer": step(peer_loss, student),
        "ours": step(lambda: model(ids).loss, model.wrapped),
        "ours, teacher in bf16": step(lambda: low(ids).loss, low.wrapped),
    }
    return {
        "description": (
            f"distillation step, {layers} x {width} into 6 x 384, batch {batch} x {length}, forward and backward"
        ),
        "peer": "both models whole, hooks, softmax, log_softmax and kl_div",
        "metrics": {"time": compare(functions, pairs), "peak memory": compare_memory(functions)},
    }
