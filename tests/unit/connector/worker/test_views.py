"""Head pages in vLLM's tensors: where they lie, whose they are, and what is refused."""

import ctypes
from typing import Any

import pytest
import torch

from kvkeep.connector.identity import Unsupported
from kvkeep.connector.worker.views import EngineMemory, rank_heads
from tests.unit.connector.worker.memories import fill, make_layout, make_memory, make_tensors


def page_at(memory: EngineMemory, layer: int, block: int, head: int, num_bytes: int) -> bytes:
    """Read a page where the view says that it lies."""
    address = int(memory.layer_addresses[layer])
    address += block * memory.block_stride + head * memory.head_stride
    return ctypes.string_at(address, num_bytes)


@pytest.mark.parametrize("is_one_buffer", [True, False])
def test_a_page_is_the_bytes_of_one_head_of_one_block(is_one_buffer: bool) -> None:
    """Every address leads to exactly the elements that vLLM's view shows there."""
    layout = make_layout()
    tensors = make_tensors(2, is_one_buffer=is_one_buffer)
    fill(tensors, 1)
    memory = make_memory(tensors, layout)

    for layer, tensor in enumerate(tensors.values()):
        for block in (0, 3, 7):
            for head in (0, 1):
                expected = tensor[block, head].contiguous().view(torch.uint8).numpy().tobytes()
                assert page_at(memory, layer, block, head, layout.page_bytes) == expected


def test_layers_that_share_their_kv_count_once() -> None:
    """A tensor that vLLM names twice is one layer."""
    tensors = make_tensors(2)
    tensors["layers.9"] = tensors["layers.1"]

    assert len(make_memory(tensors, make_layout()).tensors) == 3


def test_padded_blocks_are_understood() -> None:
    """Space between blocks is stepped over."""
    layout = make_layout()
    padded = {name: torch.cat([t, t], dim=1)[:, :2] for name, t in make_tensors(2).items()}
    memory = make_memory(padded, layout)

    assert memory.block_stride == 4 * layout.page_bytes
    assert memory.head_stride == layout.page_bytes


def token_major(tensor: torch.Tensor) -> torch.Tensor:
    """Heads interleaved within a token."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda tensors: tensors.pop("layers.0"), "layers"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "layers"),
        (lambda tensors: tensors.update({n: token_major(t) for n, t in tensors.items()}), "unset"),
        (lambda tensors: tensors.update({"layers.1": tensors["layers.1"][:, :1]}), "different"),
        (lambda tensors: tensors.update({n: t[:4] for n, t in tensors.items()}), "shape"),
        (lambda tensors: tensors.update({n: t[..., :32] for n, t in tensors.items()}), "unset"),
        (lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()}), "size"),
        (lambda tensors: tensors.update({n: t[:, :, :8] for n, t in tensors.items()}), "shape"),
    ],
    ids=["layer-gone", "layer-more", "token-major", "uneven", "blocks", "cut", "dtype", "tokens"],
)
def test_what_is_laid_out_otherwise_is_refused(change: Any, what: str) -> None:
    """A tensor that is not understood to the last byte is not touched."""
    tensors = make_tensors(2)
    change(tensors)

    with pytest.raises(Unsupported, match=what):
        make_memory(tensors, make_layout())


@pytest.mark.parametrize(
    ("total", "tp_size", "local", "expected"),
    [
        (2, 1, 2, [(0, True)]),
        (4, 2, 2, [(0, True), (2, True)]),
        (2, 2, 1, [(0, True), (1, True)]),
        (2, 4, 1, [(0, True), (0, False), (1, True), (1, False)]),
        (1, 3, 1, [(0, True), (0, False), (0, False)]),
    ],
)
def test_every_head_has_one_rank_that_stores_it(
    total: int, tp_size: int, local: int, expected: list[tuple[int, bool]]
) -> None:
    """Ranks hold neighboring heads; where heads are replicated the first holder stores."""
    assert [rank_heads(total, local, rank, tp_size) for rank in range(tp_size)] == expected


@pytest.mark.parametrize(
    ("total", "local", "tp_size"), [(3, 1, 2), (4, 1, 2), (2, 1, 3), (2, 2, 4)]
)
def test_heads_that_do_not_divide_are_refused(total: int, local: int, tp_size: int) -> None:
    """Nobody guesses which rank holds which head."""
    with pytest.raises(Unsupported):
        rank_heads(total, local, 0, tp_size)
