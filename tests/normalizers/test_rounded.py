"""A queue's bf16 copy is never behind the queue."""

from __future__ import annotations

import copy

import torch

from neuclip_scale.normalizers import EmbeddingQueue
from neuclip_scale.normalizers.rounded import Rounded
from neuclip_scale.similarity import PairFeatures


def make_queue() -> EmbeddingQueue:
    queue = EmbeddingQueue(8, 20, rank=0, world_size=1)
    push(queue, 5)
    return queue


def push(queue: EmbeddingQueue, count: int) -> None:
    queue.push(PairFeatures.single(torch.randn(count, 8), torch.randn(count, 8)), torch.arange(count))


def is_current(queue: EmbeddingQueue) -> bool:
    sides = (queue._rounded_image.of(queue.image), queue.image), (queue._rounded_text.of(queue.text), queue.text)
    return all(torch.equal(rounded, whole.bfloat16()) for rounded, whole in sides)


def test_pushing_keeps_one_copy_current() -> None:
    queue = make_queue()
    assert queue._rounded_text._copy is None  # nobody asked for it
    first = queue._rounded_text.of(queue.text)
    for _ in range(4):
        push(queue, 7)
        assert torch.equal(first, queue.text.bfloat16())
        assert queue._rounded_text.of(queue.text) is first


def test_any_other_change_is_noticed() -> None:
    queue = make_queue()
    assert is_current(queue)
    queue.image[3] = 1.0
    push(queue, 2)  # on top of what the copy has not seen
    assert is_current(queue)
    other = make_queue()
    other.load_rank_states([queue.rank_state()])
    assert is_current(other)
    assert torch.equal(other.image, queue.image)
    assert is_current(queue.to(torch.float64))
    assert is_current(queue.to(torch.float32))


def test_a_module_s_copy_makes_its_own_and_a_checkpoint_has_none() -> None:
    queue = make_queue()
    assert is_current(queue)
    twin = copy.deepcopy(queue)
    push(twin, 3)
    assert twin._rounded_image._copy is None
    assert is_current(twin)
    assert is_current(queue)
    assert list(queue.state_dict()) == ["pushed"]
    assert {name for name, each in queue.rank_state().items() if each.dtype == torch.bfloat16} == set()
    assert isinstance(copy.copy(queue._rounded_image), Rounded)
