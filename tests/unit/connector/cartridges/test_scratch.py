"""Canonical keys and values become pages where the engine's own layers write them."""

from types import SimpleNamespace

import pytest
import torch

from kvkeep.connector.cartridges.scratch import Scratch
from kvkeep.model.errors import RefusedError
from tests.unit.connector.cartridges.benches import (
    NUM_LAYERS,
    document,
    expected_block,
    make_layers,
    rank_memory,
)


@pytest.mark.parametrize(("tp_rank", "tp_size"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_a_rank_gets_its_heads_of_each_layer(tp_rank: int, tp_size: int) -> None:
    """Any run of blocks, in the order of the cartridge."""
    kv, layers = document(), make_layers()
    memory = rank_memory(tp_rank, tp_size)
    scratch = Scratch(memory, layers, 3)

    scratch.fill(kv, 1, 2)

    heads = slice(memory.first_head, memory.first_head + memory.num_heads)
    for layer in range(NUM_LAYERS):
        for block in range(2):
            found = scratch.memory.tensors[layer][block].view(torch.int16)
            assert torch.equal(found, expected_block(kv, layer, 1 + block, heads))


def test_it_lies_like_the_engines_blocks() -> None:
    """A mover reads it by the same rules; the engine's own memory is not touched."""
    memory, kv = rank_memory(), document()
    scratch = Scratch(memory, make_layers(), 3)
    scratch.fill(kv, 0, 3)

    assert scratch.memory.head_stride == memory.head_stride
    assert (scratch.memory.first_head, scratch.memory.num_heads) == (0, 4)
    assert scratch.memory.layer_addresses[1] == scratch.memory.tensors[1].data_ptr()
    assert not any(tensor.any() for tensor in memory.tensors)


@pytest.mark.parametrize("num_layers", [0, 2])
def test_missing_layers_are_refused(num_layers: int) -> None:
    """Each tensor has to have the layer that writes it."""
    with pytest.raises(RefusedError, match="can't write"):
        Scratch(rank_memory(), make_layers(num_layers), 3)


def test_layers_that_can_not_write_are_refused() -> None:
    """Not every backend writes apart from computing."""
    layers = {name: SimpleNamespace(impl=object()) for name in make_layers()}

    with pytest.raises(RefusedError, match="can't write"):
        Scratch(rank_memory(), layers, 3)
