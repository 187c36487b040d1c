"""Engine zero3 beside engine none: the same numbers on any number of ranks, a share of the base on each, our checkpoints."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.checkpoint.manifest import TensorSpec, read_manifest
from dist_lora.checkpoint.read import load_pieces
from dist_lora.checkpoint.write import save_checkpoint
from dist_lora.data.loader import EvalBatches, Loader
from dist_lora.engines.zero3 import _load_deepspeed
from dist_lora.errors import ConfigError
from dist_lora.evaluation.evaluate import held_out_loss
from dist_lora.evaluation.generate import base_fits_whole, generate
from dist_lora.layout.choices import Layout
from dist_lora.train.build import Trainee, describe_trained
from dist_lora.train.schedule import lr_at
from dist_lora.world.world import World
from tests import turns
from tests.ranks.tiny import accumulate, config_of, documents, trainee_of
from tests.ranks.wire import Wire

LENGTHS = [40, 3, 17, 29, 5, 61, 2, 11, 33, 8, 21, 55, 4, 13, 9, 26]
CLIPPED = {
    "optim": {"max_grad_norm": 0.05, "lr": 1e-2, "warmup_steps": 0,
              "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
}  # fmt: skip
RECOMPUTED = {"train": {"activation_checkpointing": True}}
FIRST_RECOMPUTED = {"train": {"activation_checkpointing": 1}}
ZERO3 = {"parallel": {"engine": "zero3"}}


def loader_of(world: World) -> Loader:
    """Seven sequences a step: two or three ranks do not divide them, and a rank has passes without any target."""
    return Loader(
        documents(seed=0, lengths=LENGTHS),
        sequence_length=64,
        packing=False,
        global_batch=7,
        micro_batch=1,
        seed=0,
        world_rank=world.world_rank,
        world_size=world.world_size,
    )


def with_b(trainee: Trainee) -> None:
    """B off zero, so that A has a gradient from the first step on."""
    generator = torch.Generator().manual_seed(1)
    for tensor in trainee.adapters.tensors:
        if tensor.attribute == "lora_B":
            drawn = torch.randn(trainee.adapters.shapes[tensor.name], generator=generator) * 0.02
            trainee.adapters.load([(tensor.name, drawn)])


def one_step(trainee: Trainee, loader: Loader, step: int, config: Any, num_steps: int) -> tuple[float, float]:
    """Loss and gradient norm of one optimizer step."""
    loss = accumulate(trainee, loader.batch(step - 1))
    return loss, float(trainee.adapters.step(lr_at(step, section=config.optim, num_steps=num_steps)))


def train(
    world: World,
    folder: str,
    settings: dict,
    *,
    num_steps: int = 5,
    save: tuple[str, int] | None = None,
    resume: str | None = None,
) -> dict:
    """Some steps on a rank: losses, norms and its share of the state after them.

    ``save`` is a folder and the step after which to save there, ``resume`` a checkpoint to go on from.
    """
    config = config_of(folder, **settings)
    trainee = trainee_of(config, world)
    with_b(trainee)
    adapters = trainee.adapters
    adapters.start_training(config.optim)
    first = 1
    if resume is not None:
        manifest = read_manifest(Path(resume))
        adapters.restore(load_pieces(Path(resume), manifest, adapters.pieces()), num_steps=manifest.step)
        first = manifest.step + 1
    loader = loader_of(world)
    losses, norms = [], []
    for step in range(first, num_steps + 1):
        loss, norm = one_step(trainee, loader, step, config, num_steps)
        losses.append(loss)
        norms.append(norm)
        if save is not None and save[1] == step:
            saved(trainee, Path(save[0]), step=step, world=world)
    trainee.check_base()
    return {"losses": losses, "norms": norms, "share": share_of(trainee)}


def share_of(trainee: Trainee) -> dict[tuple[str, str, int, int], np.ndarray]:
    share = trainee.adapters.share()
    return {(piece.name, piece.kind, piece.start, piece.stop): values.numpy() for piece, values in share.items()}


def saved(trainee: Trainee, root: Path, *, step: int, world: World) -> Path:
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": list(config_of(root).lora.target_names()),
            "layers": [0, 1], "num_layers": 2}  # fmt: skip
    return save_checkpoint(
        root,
        step=step,
        share=trainee.adapters.share(),
        specs=tuple(TensorSpec(name, shape) for name, shape in trainee.adapters.shapes.items()),
        world=world,
        progress={},
        config="run: test\n",
        base=dataclasses.asdict(trainee.base.identity),
        adapter=lora,
    )


def whole(results: list[dict], kind: str = "adapter") -> dict[str, np.ndarray]:
    """All ranks' shares put together: every element of each tensor once."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for result in results:
        for (name, of_kind, start, stop), values in result["share"].items():
            assert len(values) == stop - start
            if of_kind == kind:
                assert start not in parts.setdefault(name, {}), f"{name} from {start} has two holders"
                parts[name][start] = values
    for name, found in parts.items():
        ends = [start + len(found[start]) for start in sorted(found)]
        assert [0, *ends[:-1]] == sorted(found), f"{name} has gaps: {sorted(found)}, {ends}"
    return {name: np.concatenate([found[start] for start in sorted(found)]) for name, found in parts.items()}


def distance(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Relative L2 of all tensors together."""
    assert found.keys() == wanted.keys()
    squares = sum(float(((found[name] - wanted[name]) ** 2).sum()) for name in wanted)
    return (squares / sum(float((values**2).sum()) for values in wanted.values())) ** 0.5


def assert_same_run(results: list[dict], wanted: dict) -> None:
    for found in results:
        assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
        assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
    for kind in ("adapter", "exp_avg"):
        assert distance(whole(results, kind), whole([wanted], kind)) < 1e-4


@pytest.fixture(scope="module")
def plain(tiny_llama) -> dict[tuple[str, str], dict]:
    """Engine none on one process, by the shape and by how its linears are kept: what all is compared with."""
    return {
        (shape, quant): {"folder": str(tiny_llama(shape))}
        | train(World.alone(), str(tiny_llama(shape)), CLIPPED | {"model": {"quant": quant}})
        for shape, quant in [("llama31", "none"), ("llama31", "nf4"), ("llama32", "none")]
    }


def run_train(world: World, folder: str, settings: dict, options: dict) -> dict:
    return train(world, folder, settings, **options)


@pytest.mark.parametrize(
    "size",
    [pytest.param(2, marks=pytest.mark.slow), *(pytest.param(size, marks=pytest.mark.turn(of=2)) for size in (1, 3))],
)
@pytest.mark.parametrize(
    "recompute", [{}, FIRST_RECOMPUTED, RECOMPUTED], ids=["kept", "first recomputed", "recomputed"]
)
@pytest.mark.parametrize("shape, quant", [("llama31", "none"), ("llama32", "none"), ("llama31", "nf4")])
def test_any_number_of_ranks_trains_the_adapters_of_one_process(ranks, plain, size, recompute, shape, quant) -> None:
    wanted = plain[shape, quant]
    assert min(wanted["norms"]) > 0.05, "clipping is to bite"
    settings = CLIPPED | ZERO3 | recompute | {"model": {"quant": quant}}
    assert_same_run(ranks(size).run(run_train, wanted["folder"], settings, {}), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [{}, RECOMPUTED], ids=["kept", "recomputed"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_in_bf16_as_in_fp32_any_number_of_ranks_trains_the_adapters_of_one_process(
    ranks, tiny_llama, quant, recompute
) -> None:
    folder = str(tiny_llama("llama31"))
    settings = CLIPPED | {"model": {"quant": quant, "dtype": "bf16"}}
    wanted = train(World.alone(), folder, settings)
    results = ranks(2).run(run_train, folder, settings | ZERO3 | recompute, {})
    for found in results:
        # A loss is summed in fp32 over sequences whose products are the same; the adapters, updated in fp32, differ by
        # the order of that sum, and seldom so much that one of them is rounded to another number of 8 bits.
        assert found["losses"] == pytest.approx(wanted["losses"], rel=2e-3)
        assert found["losses"][0] == pytest.approx(wanted["losses"][0], rel=1e-6)
        assert found["norms"] == pytest.approx(wanted["norms"], rel=2e-2)
    assert distance(whole(results), whole([wanted])) < 2e-2


class Untouched(dict):
    """DeepSpeed's table of operators, which tries them all out when one is written."""

    def __setitem__(self, name: str, value: object) -> None:
        raise AssertionError(f"{name} was written")


def load_beside_gpus(world: World) -> str:
    """Load DeepSpeed as a rank with a GPU does, its table of operators being one that nobody may write."""
    import deepspeed

    table = deepspeed.ops.__compatible_ops__
    deepspeed.ops.__compatible_ops__ = Untouched()
    try:
        _load_deepspeed(dataclasses.replace(world, device=torch.device("cuda", 0)))
        with pytest.raises(AssertionError, match="deepspeed_shm_comm was written"):
            _load_deepspeed(world)
    finally:
        deepspeed.ops.__compatible_ops__ = table
    return "loaded"


def test_on_a_gpu_no_operator_of_deepspeed_is_tried_out(ranks) -> None:
    assert ranks(2).run(load_beside_gpus) == ["loaded", "loaded"]


def counted(world: World, folder: str, free_bytes: int) -> tuple[dict[str, int], bool]:
    """What a run says of its size, and whether a base is held to fit whole where so much host memory is free."""
    import psutil

    trainee = trainee_of(config_of(folder, **ZERO3), world)
    real = psutil.virtual_memory
    psutil.virtual_memory = lambda: SimpleNamespace(available=free_bytes * world.local_size)
    try:
        return describe_trained(trainee), base_fits_whole(trainee.model, world)
    finally:
        psutil.virtual_memory = real


def test_a_base_in_shares_is_still_counted_whole(ranks, tiny_llama) -> None:
    folder = str(tiny_llama("llama31"))
    alone = trainee_of(config_of(folder), World.alone())
    frozen = sum(p.numel() for p in alone.model.base_parameters().values())
    for free_bytes, fits in ((4 * 4 * frozen, True), (4 * 4 * frozen - 1, False)):
        for counts, told in ranks(2).run(counted, folder, free_bytes):
            assert counts == {"trainable": alone.adapters.num_elements, "frozen": frozen}
            assert told is fits


def shares_against_disk(world: World, folder: str, quant: str) -> dict[str, list]:
    """What this rank keeps of each base parameter beside the same elements of engine none's."""
    trainee = trainee_of(config_of(folder, model={"quant": quant}, **ZERO3), world)
    alone = trainee_of(config_of(folder, model={"quant": quant}), World.alone())
    wrong = {}
    for slot, (name, parameter) in zip(
        trainee.engine.slots(trainee.model), alone.model.base_parameters().items(), strict=True
    ):
        wanted = parameter.detach().reshape(-1)[slot.first : slot.stop]
        same = slot.shape == tuple(parameter.shape) and torch.equal(slot.destination, wanted)
        if not same or slot.destination.dtype != parameter.dtype:
            wrong[name] = [slot.destination.tolist()[:4], wanted.tolist()[:4]]
    return wrong


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_every_element_of_a_share_is_the_one_on_disk_in_its_own_type(ranks, tiny_llama, quant) -> None:
    # Three ranks divide no tensor here: every last share ends in padding.
    assert ranks(3).run(shares_against_disk, str(tiny_llama("llama31")), quant) == [{}, {}, {}]


def saved_by_a_forward(world: World, folder: str) -> tuple[int, int]:
    """Bytes of the blocks' weights, and how many of them a forward's graph still holds after it."""
    config = config_of(folder, **ZERO3)
    trainee = trainee_of(config, world)
    trainee.adapters.start_training(config.optim)
    frozen = [
        p for block in trainee.model.blocks() for p in block.parameters() if not p.requires_grad and p.ds_numel > 64
    ]
    shapes = {tuple(p.ds_shape) for p in frozen} | {tuple(reversed(p.ds_shape)) for p in frozen}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainee.run(loader_of(world).batch(0).micro_batches[0])
    alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if tuple(t.shape) in shapes}
    return sum(p.ds_numel * p.element_size() for p in frozen), sum(alive.values())


def test_between_forward_and_backward_no_gathered_weight_stays_in_memory(ranks, tiny_llama) -> None:
    for all_bytes, alive in ranks(2).run(saved_by_a_forward, str(tiny_llama("llama31", num_layers=6))):
        assert alive <= all_bytes / 6, "of six blocks the last, whose backward is next, may stay"


def sent_in_a_step(world: World, folder: str, recompute: bool) -> tuple[int, dict[str, int], dict[str, int]]:
    """Micro-batches, bytes gathered and bytes reduced, by type, in the third step of this rank."""
    settings = {"model": {"quant": "nf4"}, "train": {"activation_checkpointing": recompute}, **CLIPPED, **ZERO3}
    config = config_of(folder, **settings)
    trainee = trainee_of(config, world)
    trainee.adapters.start_training(config.optim)
    loader = loader_of(world)
    for step in (1, 2):
        one_step(trainee, loader, step, config, 5)
    with Wire() as wire:
        one_step(trainee, loader, 3, config, 5)
    found: list[dict[str, int]] = [{}, {}]
    for kinds, by_type in zip((("_allgather_base_",), ("_reduce_scatter_base_",)), found, strict=True):
        for sent in wire.sent:
            if sent.kind in kinds:
                name = str(sent.dtype).removeprefix("torch.")
                by_type[name] = by_type.get(name, 0) + sent.num_bytes
    return len(loader.batch(2).micro_batches), *found


@pytest.mark.parametrize("recompute", turns.in_suite(True, of=[False, True]))
def test_a_block_crosses_the_wire_as_it_is_stored_twice_a_pass_recomputed_or_not(ranks, tiny_llama, recompute) -> None:
    folder = str(tiny_llama("llama31", num_layers=6))
    alone = trainee_of(config_of(folder, model={"quant": "nf4"}), World.alone()).model
    codes = sum(p.nbytes for block in alone.blocks() for p in block.parameters() if p.dtype == torch.uint8)
    rest = sum(p.nbytes for block in alone.blocks() for p in block.parameters() if p.dtype == torch.float32)
    trained = sum(p.nbytes for p in alone.parameters() if p.requires_grad)
    ends = sum(p.nbytes for p in (alone.lm_head.weight, alone.model.embed_tokens.weight, alone.model.norm.weight))
    for passes, gathered, reduced in ranks(2).run(sent_in_a_step, folder, recompute):
        assert gathered["uint8"] == passes * 2 * codes
        assert gathered["float32"] == passes * (2 * rest + ends)  # both ends once: their backward follows, or is none
        assert set(gathered) == {"uint8", "float32"}
        assert reduced == {"float32": passes * trained}


def gradients_found(world: World, folder: str, settings: dict) -> tuple[list[str], list[str], int]:
    """The tensors that the first step's gradient did not reach: A's and B's, and how many there are of each."""
    config = config_of(folder, **settings)
    trainee = trainee_of(config, world)
    adapters = trainee.adapters
    adapters.start_training(config.optim)
    batch = loader_of(world).batch(0)
    adapters.begin_step()
    for i, micro in enumerate(batch.micro_batches):
        adapters.backward(trainee.run(micro) / batch.target_tokens, is_last=i == len(batch.micro_batches) - 1)
    if world.world_rank == 1:
        for gradient in adapters.gradients():
            gradient.zero_()  # another rank's part is not zero: the tensor has a gradient
    return adapters.without_gradient("lora_A"), adapters.without_gradient("lora_B"), len(adapters.tensors) // 2


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("layers", ["all", [1]])
def test_at_the_first_step_every_b_has_a_gradient_and_no_a(ranks, tiny_llama, offload, layers) -> None:
    settings = {"parallel": {"engine": "zero3", "offload": offload}, "lora": {"rank": 4, "alpha": 8, "layers": layers}}
    for without_a, without_b, count in ranks(2).run(gradients_found, str(tiny_llama("llama31")), settings):
        assert len(without_a) == count == (14 if layers == "all" else 7)
        assert without_b == []


def not_finite(world: World, folder: str, offload: str) -> tuple[list[float], bool, list[float]]:
    """Norms of a step whose loss is NaN on the last rank alone, whether the state kept its bytes, and the next loss."""
    config = config_of(folder, **CLIPPED, parallel={"engine": "zero3", "offload": offload})
    trainee = trainee_of(config, world)
    with_b(trainee)
    adapters = trainee.adapters
    adapters.start_training(config.optim)
    loader = loader_of(world)
    one_step(trainee, loader, 1, config, 5)
    before = share_of(trainee)
    batch = loader.batch(1)
    norms = []
    for bad in (float("nan"), float("inf")):
        adapters.begin_step()
        for i, micro in enumerate(batch.micro_batches):
            factor = bad if world.world_rank == world.world_size - 1 and i == 0 else 1.0
            adapters.backward(trainee.run(micro) * factor, is_last=i == len(batch.micro_batches) - 1)
        norms.append(float(adapters.step(1e-2)))
    after = share_of(trainee)
    unchanged = all(values.tobytes() == after[key].tobytes() for key, values in before.items())
    adapters.begin_step()  # a step that is given up after its first backward
    adapters.backward(trainee.run(batch.micro_batches[0]), is_last=False)
    return norms, unchanged, list(one_step(trainee, loader, 2, config, 5))


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_a_gradient_that_is_not_finite_is_told_on_all_ranks_and_changes_nothing(ranks, plain, offload) -> None:
    wanted = plain["llama31", "none"]
    for norms, unchanged, after in ranks(2).run(not_finite, wanted["folder"], offload):
        assert not any(np.isfinite(norms))
        assert unchanged
        assert after[0] == pytest.approx(wanted["losses"][1], abs=1e-5)
        assert after[1] == pytest.approx(wanted["norms"][1], rel=1e-5)


PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]]


def answers_and_losses(world: World, folder: str, settings: dict) -> dict:
    """An evaluation before, between and after steps; answers with the base in shares and gathered."""
    config = config_of(folder, **CLIPPED, **settings)
    trainee = trainee_of(config, world)
    with_b(trainee)
    trainee.adapters.start_training(config.optim)
    engine, model = trainee.engine, trainee.model
    # The last of several ranks has no prompt; each has as many passes all the same.
    mine = PROMPTS[world.world_rank :: world.world_size] if world.world_size < 3 or world.world_rank < 2 else []

    def held_out() -> float:
        batches = EvalBatches(documents(seed=3, lengths=[30, 12, 45, 7, 22]), micro_batch=2, sequence_length=64, packing=False,
                              world_rank=world.world_rank, world_size=world.world_size)  # fmt: skip
        return held_out_loss(model, batches, run=trainee.run, world=world).loss

    def answers() -> list[list[int]]:
        return generate(model, mine, stop_ids=frozenset(), max_new_tokens=5, world=world)

    loader = loader_of(world)
    found: dict = {"losses": [held_out()], "answers": [], "steps": []}
    for step in (1, 2, 3):
        found["steps"].append(one_step(trainee, loader, step, config, 5))
        found["losses"].append(held_out())
        engine.keep_gathered(model, step == 2 and base_fits_whole(model, world))
        found["answers"].append(answers())
        found.setdefault("alive", []).append(sum(p.data.nbytes for p in model.base_parameters().values()))
        engine.keep_gathered(model, False)
        found.setdefault("freed", []).append(sum(p.data.nbytes for p in model.base_parameters().values()))
    found["base_bytes"] = model.base_bytes
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_losses_between_steps_and_answers_are_those_of_one_process(ranks, tiny_llama, size) -> None:
    folder = str(tiny_llama("llama31"))
    wanted = answers_and_losses(World.alone(), folder, {})
    results = ranks(size).run(answers_and_losses, folder, ZERO3)
    for found in results:
        assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
        assert np.array(found["steps"]) == pytest.approx(np.array(wanted["steps"]), rel=1e-5)
        assert found["alive"][1] == found["base_bytes"] > found["alive"][0]
        assert found["freed"] == [0, 0, 0]
    for step in range(3):
        found = [results[rank]["answers"][step] for rank in range(size)]
        assert [answer for answers in found for answer in answers] == wanted["answers"][step]


@pytest.fixture(scope="module")
def checkpoint(ranks, plain, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints after the third of five steps on two ranks, by engine; the runs went on as one process's did."""
    made = {}
    for engine in ("zero3", "fsdp2"):
        root = tmp_path_factory.mktemp(engine)
        wanted = plain["llama31", "none"]
        settings = CLIPPED | {"parallel": {"engine": engine}}
        results = ranks(2).run(run_train, wanted["folder"], settings, {"save": (str(root), 3)})
        assert_same_run(results, wanted)
        made[engine] = root / "step-00000003"
        made[f"{engine}-results"] = results
    return made


MOVES = [
    ("zero3", 3, "zero3"),
    ("fsdp2", 2, "zero3+all"),
    ("zero3", 1, "zero3"),
    ("zero3", 2, "fsdp2"),
    ("fsdp2", 2, "zero3"),
    ("zero3", 1, "none"),
]


@pytest.mark.parametrize("saved_under, size, engine", turns.in_suite(*MOVES[:2], of=MOVES))
def test_a_run_goes_on_on_another_number_of_ranks_and_under_another_engine(
    ranks, plain, checkpoint, saved_under, size, engine
) -> None:
    wanted = plain["llama31", "none"]
    settings = CLIPPED | {"parallel": dict(zip(("engine", "offload"), engine.split("+"), strict=False))}
    results = ranks(size).run(run_train, wanted["folder"], settings, {"resume": str(checkpoint[saved_under])})
    for found in results:
        assert found["losses"] == pytest.approx(wanted["losses"][3:], abs=1e-5)
        assert found["norms"] == pytest.approx(wanted["norms"][3:], rel=1e-5)
    for kind in ("adapter", "exp_avg", "exp_avg_sq"):
        assert distance(whole(results, kind), whole([wanted], kind)) < 1e-4


def test_a_run_that_goes_on_on_the_same_ranks_has_the_bytes_of_one_that_never_stopped(ranks, plain, checkpoint) -> None:
    again = {"resume": str(checkpoint["zero3"])}
    results = ranks(2).run(run_train, plain["llama31", "none"]["folder"], CLIPPED | ZERO3, again)
    for found, wanted in zip(results, checkpoint["zero3-results"], strict=True):
        assert found["losses"] == wanted["losses"][3:]
        assert found["norms"] == wanted["norms"][3:]
        assert {key: values.tobytes() for key, values in found["share"].items()} == {
            key: values.tobytes() for key, values in wanted["share"].items()
        }


def test_gathering_needs_neither_deepspeed_nor_a_process_group(checkpoint, tmp_path) -> None:
    script = """
import sys
import torch  # imports torch.distributed for itself

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed" or name.startswith("torch.distributed"):
            raise ImportError(f"{name} is refused here")

for name in [n for n in sys.modules if n.startswith("torch.distributed")]:
    del sys.modules[name]
del torch.distributed
sys.meta_path.insert(0, Refuse())
for name in ("deepspeed", "torch.distributed"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} could be imported")
from pathlib import Path
from dist_lora.checkpoint.gather import gather_adapter
gather_adapter(Path(sys.argv[1]), out=Path(sys.argv[2]))
"""
    out = tmp_path / "adapter"
    done = subprocess.run(
        [sys.executable, "-c", script, checkpoint["zero3"], out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with_all = gather_adapter(checkpoint["zero3"], out=tmp_path / "here")
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (with_all / name).read_bytes()


def test_the_adapters_file_has_the_tensors_of_one_process_after_a_plain_step(ranks, tiny_llama, tmp_path) -> None:
    from safetensors.torch import load_file

    folder = str(tiny_llama("llama31"))
    # With so large an eps AdamW's update is the gradient itself, which no difference of rounding can turn around.
    settings = {"optim": {"lr": 1.0, "eps": 1e3, "warmup_steps": 0, "max_grad_norm": None, "schedule": "constant"}}
    options = {"num_steps": 1, "save": (str(tmp_path / "two"), 1)}
    ranks(2).run(run_train, folder, settings | ZERO3, options)
    train(World.alone(), folder, settings, num_steps=1, save=(str(tmp_path / "one"), 1))
    files = {}
    for run in ("one", "two"):
        out = gather_adapter(tmp_path / run / "step-00000001", out=tmp_path / f"{run}-adapter")
        files[run] = load_file(out / "adapter_model.safetensors")
    assert files["one"].keys() == files["two"].keys()
    assert len(files["two"]) == 2 * 7 * 2
    for key, tensor in files["two"].items():
        rank_dim = 0 if "lora_A" in key else 1
        assert tensor.dim() == 2 and tensor.shape[rank_dim] == 4, f"{key}: {tuple(tensor.shape)}"
        torch.testing.assert_close(tensor, files["one"][key], atol=1e-6, rtol=0)


# DeepSpeed that isn't there, doesn't work or is too old


def refusal(world: World, fault: str) -> tuple[str, int]:
    """What making the engine says, and its exit code, where DeepSpeed is at fault."""
    import deepspeed

    layout = Layout("zero3", "world", "shard", base_on_host=False, optimizer_on_host=False, reasons=())
    from dist_lora.engines import zero3

    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "deepspeed"}
    version, importing = deepspeed.__version__, zero3.importlib.import_module
    try:
        if fault == "old":
            deepspeed.__version__ = "0.19.2"
        elif fault == "absent":
            sys.modules["deepspeed"] = None  # type: ignore[assignment]
        else:
            del sys.modules["deepspeed"]

            def break_down(name: str) -> Any:
                if name == "deepspeed":
                    raise (
                        ModuleNotFoundError("No module named 'hjson'", name="hjson")
                        if fault == "partial"
                        else (AttributeError("module 'torch' has no attribute 'amp'"))
                    )
                return importing(name)

            zero3.importlib = type("importlib", (), {"import_module": break_down, "util": zero3.importlib.util})  # type: ignore[attr-defined]
        with pytest.raises(ConfigError) as caught:
            zero3.Zero3(world, layout)
    finally:
        import importlib

        zero3.importlib = importlib  # type: ignore[attr-defined]
        sys.modules.update(modules)
        deepspeed.__version__ = version
    return str(caught.value), caught.value.exit_code


@pytest.mark.parametrize(
    "fault, told",
    [
        ("old", "0.19.2 is installed: before 0.19.3 activation checkpointing fails over a frozen base"),
        ("absent", "it is not installed"),
        ("partial", "the installed one lacks hjson"),
        ("broken", "can't be imported (AttributeError: module 'torch' has no attribute 'amp')"),
    ],
)
def test_deepspeed_that_cannot_be_used_is_told_with_what_was_found_and_what_to_install(ranks, fault, told) -> None:
    for text, exit_code in ranks(2).run(refusal, fault):
        assert told in text
        assert "parallel.engine: zero3 needs DeepSpeed 0.19.8 or newer" in text
        assert 'pip install "deepspeed>=0.19.8"' in text and "parallel.engine=fsdp2" in text
        assert exit_code == 2
