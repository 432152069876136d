# pyright: reportMissingImports=false
"""Expert parallelism of transformers through moequant: on several ranks the bits of one, in every layout of meshes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

pytest.importorskip("transformers", "5.23")

from hf_experts import ExpertsClass, make, quantize, run, scan, tokens
from hf_models import build, prompt

from examples import generate
from moequant import reference
from moequant.integrations.transformers import MoEQuantConfig, configure
from moequant.integrations.transformers.expert_parallel import MoEQuantEP
from moequant.ops import on_cpu
from moequant.testing import run_ranks

EXPERTS, RANKS = 12, 4
CLASSES = {"Qwen3MoeExperts": ("none", "fp8_e4m3fn"), "GptOssExperts": ("int8",)}
# the ranks that share experts, and those that hold the same rows, of all four
LAYOUTS: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "one batch": ([[0, 1, 2, 3]], [[0, 1, 2, 3]]),
    "batches of their own": ([[0, 1, 2, 3]], [[0], [1], [2], [3]]),
    "a batch for two ranks": ([[0, 1, 2, 3]], [[0, 1], [2, 3]]),
    "experts twice": ([[0, 1], [2, 3]], [[0], [1], [2], [3]]),
    "experts twice, one batch for each": ([[0, 1], [2, 3]], [[0, 1], [2, 3]]),
}


def mesh_of(groups: list[list[int]], device: str = "cpu") -> DeviceMesh:
    """This rank's group, as a mesh of one dimension."""
    return DeviceMesh(device, groups, mesh_dim_names=("others", "mine"))["mine"]


def split(module: Any, mesh: DeviceMesh) -> Any:
    """This rank's experts, as transformers splits them."""
    mine, local = copy.deepcopy(module), EXPERTS // mesh.size()
    first = mesh.get_local_rank() * local
    for name, parameter in module.named_parameters():
        setattr(mine, name, nn.Parameter(parameter[first : first + local].clone(), requires_grad=False))
    mine.num_experts, mine._is_expert_parallel = local, True
    return mine


def exact_product(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    num_tokens: Tensor | None,
    expert_start: Tensor | None,
    out: Tensor,
    segments: int,
    batch_invariant: bool = False,
) -> None:
    """The CPU's grouped product, in float64: of float32 a row may have other bits with other rows beside it. So batch_invariant, with
    which they have not, changes nothing."""
    for expert, place in enumerate(reference.expert_places(out, num_tokens, expert_start)):
        left, right = a[place].double(), b[expert].double()
        if a_scales is not None and b_scales is not None:
            left *= on_cpu.spread(a_scales[place], a.shape[-1])
            blocks = right.unflatten(0, (segments, -1))
            rows = b_scales[expert].unflatten(0, (segments, -1)).repeat_interleave(on_cpu.BLOCK, 1)[:, : blocks.shape[1]]
            blocks *= on_cpu.spread(rows, a.shape[-1])
        out[place] = (left @ right.T).to(out.dtype)


def run_all(rank: int, ranks: int, classes: dict[ExpertsClass, tuple[str, ...]]) -> tuple[list[str], tuple[bool, bool, str] | None]:
    """What was wrong, and what came of three ranks."""
    return wrong_layouts(classes), of_three(rank, next(iter(classes)))


def wrong_layouts(classes: dict[ExpertsClass, tuple[str, ...]]) -> list[str]:
    """What was wrong: names of layouts, classes and numbers of tokens."""
    on_cpu.grouped_gemm_blockscale = exact_product
    configure(max_tokens=8)
    wrong: list[str] = []
    meshes = {name: (mesh_of(ep), mesh_of(tp)) for name, (ep, tp) in LAYOUTS.items()}
    for which, quants in classes.items():
        for quant in quants:
            module = make(which, EXPERTS)
            module.config._experts_implementation_internal = "moequant"
            if quant != "none":
                quantize(module, quant)
            for layout, (ep_mesh, tp_mesh) in meshes.items():
                implementation = MoEQuantEP(split(module, ep_mesh), ep_mesh, tp_mesh)
                batch = min(dist.get_process_group_ranks(tp_mesh.get_group()))
                # other numbers on each, more than go at once; fewer than ranks
                for count in (7 + 9 * batch, 1):
                    inputs = tokens(count, experts=EXPERTS, seed=batch)
                    with torch.no_grad():
                        found = implementation(*inputs)
                    if not torch.equal(found, run(module, "moequant", *inputs)):
                        wrong.append(f"{which.name} {quant} {layout} {count}")
    return wrong


def of_three(rank: int, which: ExpertsClass) -> tuple[bool, bool, str] | None:
    """Equal bits in inference, compiled too, and under grad, with one batch and batches of their own; whether gradients came; what is
    said of too many tokens."""
    three, alone = DeviceMesh("cpu", [[0, 1, 2]], mesh_dim_names=("others", "mine")), mesh_of([[0], [1], [2], [3]])
    if rank == 3:
        return None
    mesh = three["mine"]
    module = make(which, EXPERTS)
    module.config._experts_implementation_internal = "moequant"
    mine = split(module, mesh)
    implementation = MoEQuantEP(mine, mesh, alone)
    # rank 0 has no tokens
    hidden, ids, weights = tokens(5 * rank, experts=EXPERTS, seed=rank)
    with torch.no_grad():
        found, expected = implementation(hidden, ids, weights), run(module, "moequant", hidden, ids, weights)
    equal = torch.equal(found, expected)
    for layout, inputs in ((alone, (hidden, ids, weights)), (mesh, tokens(7, experts=EXPERTS))):
        tried = MoEQuantEP(mine, mesh, layout)
        with torch.no_grad():
            expected_here = run(module, "moequant", *inputs)
            compiled = torch.compile(lambda *given, tried=tried: tried(*given), fullgraph=True, backend="eager")
            equal &= torch.equal(tried(*inputs), expected_here) and torch.equal(compiled(*inputs), expected_here)
    mine.requires_grad_(True)
    under_grad = implementation(hidden.requires_grad_(), ids, weights)
    under_grad.float().sum().backward()
    equal &= torch.equal(under_grad.detach(), expected)
    configure(agree=False, max_tokens=4)
    try:
        with torch.no_grad():
            implementation(*tokens(5, experts=EXPERTS))
        said = ""
    except ValueError as raised:
        said = str(raised)
    return equal, bool(mine.down_proj.grad.any()), said


def test_ranks_have_the_bits_of_one_rank_in_every_layout_and_under_grad():
    results = run_ranks(run_all, RANKS, {scan()[name]: quants for name, quants in CLASSES.items()})
    assert [wrong for wrong, _ in results] == [[]] * RANKS
    for three in [three for _, three in results][:3]:
        assert three is not None
        equal, came, said = three
        assert equal and came
        assert said == "5 tokens of a rank are more than max_tokens=4; configure(max_tokens=) or agree=True"


Recorded = list[tuple[tuple[Tensor, ...], Tensor]]


def run_model(rank: int, ranks: int, folder: str, quant: str, sizes: tuple[int, int]) -> bool:
    """Whether the experts of a model that transformers has split are, to the bit, those of the whole model given the same inputs."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    on_cpu.grouped_gemm_blockscale = exact_product
    tp, fsdp = sizes
    settings: dict[str, Any] = {"dtype": torch.bfloat16}
    if quant != "none":
        settings["quantization_config"] = MoEQuantConfig(quant)
    layout = DistributedConfig(tp_size=tp, fsdp_size=fsdp, ep_size=ranks, ep_implementation="moequant")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=layout, **settings)
    whole = AutoModelForCausalLM.from_pretrained(folder, **{"experts_implementation": "moequant"} | settings)
    recorded: Recorded = []
    experts = [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]
    for _, module in experts:
        module.register_forward_hook(lambda module, inputs, output: recorded.append((inputs, output.clone())))
    ids = prompt(length=11 if tp > 1 else 9 + rank)
    with torch.no_grad():
        model(ids)
        equal = [
            torch.equal(whole.get_submodule(name)(*inputs), output)
            for (name, _), (inputs, output) in zip(experts, recorded, strict=True)
        ]
        # decoding too; every rank as long as the others
        model.generate(ids, max_new_tokens=3, do_sample=False)
    return len(equal) == 2 and all(equal)


MODELS = {"qwen3_moe": ("fp8_e4m3fn", (1, 2)), "gpt_oss": ("none", (2, 1))}


def run_models(rank: int, ranks: int, folder: str) -> list[bool]:
    generate.main(["--new-tokens", "2", "--batch", "1", "--ways", "moequant"])
    return [run_model(rank, ranks, f"{folder}/{family}", *how) for family, how in MODELS.items()]


def test_models_that_transformers_splits_and_the_example_on_two_ranks(tmp_path, monkeypatch):
    # which transformers would take, whatever the group is
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for family in MODELS:
        build(family).save_pretrained(tmp_path / family)
    assert run_ranks(run_models, 2, str(tmp_path)) == [[True] * len(MODELS)] * 2
