"""Residency: where the numbers really are, what a move costs, and what it leaves behind."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layouts import tiny_releases, write_diffusers, write_official
from step1x_edit.channel import GIGA, Memory
from step1x_edit.checkpoints.arena import Block
from step1x_edit.checkpoints.memory_plan import with_share
from step1x_edit.checkpoints.read import Wanted, open_checkpoint, write_demo
from step1x_edit.errors import CheckpointError
from step1x_edit.model.blocks import Layout
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.worker.page_lock import PageLock
from step1x_edit.worker.residency import Residency, allocate_slab
from tiny import a_picture, final_picture, location, tiny_pipeline

REQUEST = NetworkRequest(a_picture(), "make it night", num_steps=2, size_level=64)
STAND_IN = torch.device("cpu")
LABELS = ("night", "unknown")

MakeResidency = Callable[..., Residency]


class StopError(Exception):
    """What a check raises to stop."""


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return tiny_pipeline(LABELS)


@pytest.fixture(scope="module")
def folder(pipeline: EditPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, pipeline)
    return folder


@pytest.fixture
def residency(folder: Path) -> Residency:
    """With the stand-in for a GPU."""
    return Residency(partial(open_checkpoint, folder), STAND_IN)


def network(residency: Residency) -> dict[str, nn.Module]:
    assert residency.checkpoint is not None
    return residency.checkpoint.pipeline.modules


def tensors(residency: Residency) -> list[Tensor]:
    """All parameters and buffers."""
    return [
        tensor
        for module in network(residency).values()
        for tensor in itertools.chain(module.parameters(), module.buffers())
    ]


def offset_of(block: Block) -> int:
    assert block.offset is not None
    return block.offset


def storages(residency: Residency) -> set[int]:
    """The addresses of the memory that the parameters and buffers lie in."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(residency)}


def picture(residency: Residency) -> bytes:
    with residency.on_device() as checkpoint:
        return final_picture(checkpoint.pipeline, REQUEST).tobytes()


def stop_after(calls: int) -> Callable[[], None]:
    """A check that raises after this many calls."""
    counter = itertools.count()

    def check() -> None:
        if next(counter) == calls:
            raise StopError

    return check


def count_checks(act: Callable[[Callable[[], None]], None]) -> int:
    counter = itertools.count()

    def check() -> None:
        next(counter)

    act(check)
    return next(counter)


def test_each_move_changes_where_the_numbers_lie(residency: Residency) -> None:
    assert location(residency) == "Unloaded"

    residency.load()
    arena = storages(residency)
    assert location(residency) == "CPU"
    assert len(arena) == 1

    residency.onload()
    slabs = storages(residency)
    assert location(residency) == "GPU"
    assert not slabs & arena

    residency.offload()
    assert location(residency) == "CPU"
    assert storages(residency) == arena

    residency.release()
    assert location(residency) == "Unloaded"
    assert residency.checkpoint is None
    assert residency.blocks == ()


def test_the_location_is_measured_rather_than_remembered(residency: Residency) -> None:
    residency.onload()

    parameter = tensors(residency)[0]
    parameter.data = parameter.data.clone()

    assert location(residency) == "CPU"


def test_onloading_an_unloaded_model_loads_it(residency: Residency) -> None:
    residency.onload()

    assert location(residency) == "GPU"


def test_each_move_is_done_once(residency: Residency) -> None:
    residency.offload()
    residency.release()
    assert location(residency) == "Unloaded"

    residency.load()
    arena = storages(residency)
    residency.load()
    residency.offload()
    assert storages(residency) == arena

    residency.onload()
    slabs = storages(residency)
    residency.onload()
    residency.load()
    assert storages(residency) == slabs
    assert location(residency) == "GPU"

    residency.release()
    residency.release()
    assert location(residency) == "Unloaded"


def test_an_edit_is_the_same_wherever_the_model_is(
    folder: Path, residency: Residency, pipeline: EditPipeline
) -> None:
    expected = final_picture(pipeline, REQUEST)
    host = Residency(partial(open_checkpoint, folder), None)
    host.onload()
    residency.onload()
    pictures = [expected.tobytes(), picture(host), picture(residency)]

    residency.offload()
    residency.onload()
    pictures.append(picture(residency))
    residency.release()
    residency.onload()
    pictures.append(picture(residency))

    assert len(set(pictures)) == 1


def test_without_a_device_the_model_computes_in_host_memory(folder: Path) -> None:
    residency = Residency(partial(open_checkpoint, folder), None)

    residency.onload()

    assert location(residency) == "CPU"
    assert residency.memory() == Memory()
    with residency.on_device() as checkpoint:
        assert checkpoint.name == "demo"


def test_memory_is_that_of_the_slabs(residency: Residency) -> None:
    residency.load()
    assert residency.memory() == Memory()

    residency.onload()
    size = sum(block.size for block in residency.blocks)
    assert residency.memory() == Memory(size / GIGA, size / GIGA)

    residency.offload()
    assert residency.memory() == Memory()


def test_a_model_that_streams_says_so_and_what_it_needs(folder: Path) -> None:
    plan = partial(with_share, core_share=0.5)
    residency = Residency(partial(open_checkpoint, folder), STAND_IN, plan=plan)
    assert residency.placement() is None

    residency.onload()
    told = residency.placement()

    assert told is not None
    assert told.streaming
    assert told.slots == 2
    assert 0 < told.resident_share <= 0.5
    assert f"{100 * told.resident_share:.0f} % of the core" in told.reason
    assert told.measured_peak_gb is None  # no edit has begun
    assert told.host_gb == pytest.approx(sum(block.size for block in residency.blocks) / GIGA)
    residency.release()
    assert residency.placement() is None


def test_offloading_copies_nothing_and_frees_the_device(folder: Path) -> None:
    slabs: list[weakref.ref[Tensor]] = []

    def allocate(size: int, device: torch.device) -> Tensor:
        slab = allocate_slab(size, device)
        slabs.append(weakref.ref(slab))
        return slab

    residency = Residency(partial(open_checkpoint, folder), STAND_IN, allocate)
    residency.load()
    on_host = tensors(residency)[0].data
    residency.onload()
    for tensor in tensors(residency):
        tensor.data.fill_(7)  # what would be copied back would be seen

    residency.offload()

    assert slabs
    assert all(slab() is None for slab in slabs)
    assert tensors(residency)[0].data_ptr() == on_host.data_ptr()
    assert not any(bool((tensor == 7).all()) for tensor in tensors(residency))


@pytest.mark.parametrize("leave", [Residency.offload, Residency.release])
def test_what_an_edit_keeps_on_the_device_leaves_with_the_model(
    residency: Residency, leave: Callable[[Residency], None]
) -> None:
    tables: list[weakref.ref[torch.UntypedStorage]] = []
    residency.onload()
    with residency.on_device() as checkpoint:
        transformer = checkpoint.pipeline.transformer
        tabulate = transformer.rope

        def watched(*arguments: Any, **named: Any) -> Tensor:
            table = tabulate(*arguments, **named)
            tables.append(weakref.ref(table.untyped_storage()))
            return table

        transformer.rope = watched  # type: ignore[method-assign]  # to watch it
        list(checkpoint.pipeline.edit(REQUEST))
        list(checkpoint.pipeline.edit(REQUEST))
    assert [table() is not None for table in tables] == [True]  # kept for the second edit

    leave(residency)

    assert tables[0]() is None


def test_releasing_gives_the_memory_back_even_if_somebody_keeps_the_network(
    residency: Residency,
) -> None:
    residency.load()
    kept = network(residency)
    memory = [weakref.ref(tensor.untyped_storage()) for tensor in tensors(residency)]
    residency.onload()
    memory += [weakref.ref(tensor.untyped_storage()) for tensor in tensors(residency)]
    assert all(storage() is not None for storage in memory)

    residency.release()

    assert all(storage() is None for storage in memory)
    parameters = [parameter for module in kept.values() for parameter in module.parameters()]
    assert {parameter.untyped_storage().nbytes() for parameter in parameters} == {0}


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_loading_can_be_stopped_between_pieces(
    folder: Path, residency: Residency, share: float
) -> None:
    pieces = count_checks(Residency(partial(open_checkpoint, folder), None).load)

    with pytest.raises(StopError):
        residency.load(stop_after(int(share * pieces)))

    assert location(residency) == "Unloaded"
    assert residency.checkpoint is None
    residency.onload()
    assert location(residency) == "GPU"


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_onloading_can_be_stopped_between_pieces(residency: Residency, share: float) -> None:
    residency.load()
    pieces = count_checks(residency.onload)
    expected = picture(residency)
    residency.offload()

    with pytest.raises(StopError):
        residency.onload(stop_after(int(share * pieces)))

    assert location(residency) == "CPU"
    assert residency.memory() == Memory()
    residency.onload()
    assert picture(residency) == expected


def test_a_device_that_is_too_small_keeps_nothing(folder: Path) -> None:
    slabs: list[weakref.ref[Tensor]] = []
    room = 2

    def allocate(size: int, device: torch.device) -> Tensor:
        if len(slabs) == room:
            raise torch.OutOfMemoryError("no room")
        slab = allocate_slab(size, device)
        slabs.append(weakref.ref(slab))
        return slab

    residency = Residency(partial(open_checkpoint, folder), STAND_IN, allocate)

    with pytest.raises(torch.OutOfMemoryError):
        residency.onload()

    # The error, which pytest still holds, keeps no slab alive.
    assert [slab() for slab in slabs] == [None] * room
    assert location(residency) == "CPU"
    room = 99
    residency.onload()
    assert location(residency) == "GPU"


@pytest.mark.parametrize("move", ["load", "onload", "offload", "release"])
def test_a_lent_model_stays_where_it_is(residency: Residency, move: str) -> None:
    residency.onload()

    with residency.on_device():
        with pytest.raises(RuntimeError, match="lent"):
            getattr(residency, move)()
        assert location(residency) == "GPU"
    residency.release()

    assert location(residency) == "Unloaded"


def test_a_model_is_lent_to_one_at_a_time(residency: Residency) -> None:
    residency.onload()

    with residency.on_device(), pytest.raises(RuntimeError, match="lent"):
        residency.on_device().__enter__()


def test_a_model_that_fails_its_borrower_comes_back(residency: Residency) -> None:
    residency.onload()

    with pytest.raises(StopError), residency.on_device():
        raise StopError
    residency.offload()

    assert location(residency) == "CPU"


@pytest.mark.parametrize("moves", [[], ["load"], ["onload", "offload"]])
def test_a_model_that_is_not_on_the_device_is_not_lent(
    residency: Residency, moves: list[str]
) -> None:
    for move in moves:
        getattr(residency, move)()

    with pytest.raises(RuntimeError, match="not on the device"):
        residency.on_device().__enter__()


def test_moving_does_not_make_compiled_blocks_compile_again(residency: Residency) -> None:
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nonlocal compilations
        compilations += 1
        return graph.forward

    residency.load()
    block = network(residency)["transformer"].get_submodule("single_blocks.0")
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    x, mod = torch.randn(1, 5, 32), torch.randn(1, 96)
    layout = Layout(torch.randn(1, 1, 5, 8, 2), text_length=2)
    results = []
    with torch.inference_mode():  # in which a careless move would make tensors of another kind
        results.append(block(x, mod, layout))
        for move in (residency.load, residency.onload, residency.offload, residency.onload):
            move()
            results.append(compiled(x, mod, layout))

    assert compilations == 1
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_blocks_cover_the_memory_in_the_order_of_execution(residency: Residency) -> None:
    residency.load()
    blocks = residency.blocks

    ends = [offset_of(block) + block.size for block in blocks]
    assert [block.offset for block in blocks] == [0, *ends[:-1]]
    assert all(offset_of(block) % 256 == 0 for block in blocks)
    assert ends[-1] == tensors(residency)[0].untyped_storage().nbytes()
    assert [name for name, _ in itertools.groupby(block.component for block in blocks)] == [
        "conditioner",
        "encoder",
        "prologue",
        "core",
        "decoder",
        "recogniser",
    ]
    assert [block.name for block in blocks if block.component == "core"] == [
        "transformer.img_in",
        "transformer.double_blocks.0",
        "transformer.single_blocks.0",
        "transformer.single_blocks.1",
        "transformer.final_layer",
    ]


def test_every_tensor_lies_in_its_block(residency: Residency) -> None:
    residency.load()
    blocks = {block.name: block for block in residency.blocks}
    transformer = network(residency)["transformer"]

    for name, block_name in (
        ("double_blocks.0.img_mod.lin.weight", "transformer.double_blocks.0.img_mod"),
        ("double_blocks.0.img_mlp.0.weight", "transformer.double_blocks.0"),
        ("final_layer.adaLN_modulation.1.bias", "transformer.final_layer.adaLN_modulation"),
        ("final_layer.linear.bias", "transformer.final_layer"),
    ):
        parameter = transformer.get_parameter(name)
        offset = parameter.storage_offset() * parameter.itemsize
        begin, size = offset_of(blocks[block_name]), blocks[block_name].size
        assert begin <= offset < offset + parameter.nbytes <= begin + size


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_every_layout_and_type_on_disk_gives_the_same_parameters(
    tmp_path: Path, layout: str, stored: torch.dtype
) -> None:
    original = tiny_pipeline()
    for module in original.modules.values():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(stored)
    write = {"official": write_official, "diffusers": write_diffusers}[layout]
    write(tmp_path / layout, original)
    open_tiny = partial(
        open_checkpoint,
        tmp_path / layout,
        Wanted(dtype=torch.float32, releases=tiny_releases(original)),
    )
    residency = Residency(open_tiny, STAND_IN)

    residency.onload()

    for part, module in network(residency).items():
        expected = original.modules[part].state_dict()
        for name, parameter in module.state_dict().items():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected[name].float()), name


def test_a_file_that_changes_after_it_was_opened_is_named(folder: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    write_demo(tmp_path, pipeline)
    file = tmp_path / "model.safetensors"
    opened = open_checkpoint(tmp_path)
    residency = Residency(lambda: opened, None)

    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        residency.load()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        residency.load()

    assert location(residency) == "Unloaded"


class FakePages:
    """Locks this many pieces and refuses the next; `go` lets it begin."""

    def __init__(self, room: int = 99) -> None:
        self.room = room
        self.go = threading.Event()
        self.is_asked = threading.Event()
        self.locked: dict[int, int] = {}
        self.refused = 0

    def lock(self, address: int, size: int) -> None:
        self.is_asked.set()
        assert self.go.wait(30)
        if len(self.locked) == self.room:
            self.refused += 1
            raise RuntimeError("not allowed")
        self.locked[address] = size

    def unlock(self, address: int) -> None:
        del self.locked[address]


def wait_for_page_lock() -> None:
    for thread in threading.enumerate():
        if thread.name == "page-lock":
            thread.join(30)


def test_memory_is_page_locked_piece_by_piece_and_unlocked_again() -> None:
    memory, pages = torch.empty(1000, dtype=torch.uint8), FakePages()
    pages.go.set()

    lock = PageLock([memory], pages, at_once=300)
    wait_for_page_lock()

    start = memory.data_ptr()
    assert pages.locked == {start: 300, start + 300: 300, start + 600: 300, start + 900: 100}
    lock.undo()
    lock.undo()
    assert not pages.locked


def test_a_system_that_refuses_to_lock_pages_is_not_asked_again() -> None:
    memory, pages = torch.empty(1000, dtype=torch.uint8), FakePages(room=2)
    pages.go.set()

    lock = PageLock([memory], pages, at_once=300)
    wait_for_page_lock()

    assert pages.refused == 1
    lock.undo()
    assert not pages.locked


def test_unlocking_waits_for_the_piece_under_way_and_lets_no_other_begin() -> None:
    memory, pages = torch.empty(1000, dtype=torch.uint8), FakePages()
    lock = PageLock([memory], pages, at_once=300)
    assert pages.is_asked.wait(30)
    undoing = threading.Thread(target=lock.undo)

    undoing.start()
    assert undoing.is_alive()
    pages.go.set()
    undoing.join(30)

    assert not undoing.is_alive()
    assert not pages.locked
