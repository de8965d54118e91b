"""What ranks tell each other arrives, whole and in the order of the ranks, between real gloo ranks."""

import pytest
import torch

from smes.errors import RankLost
from smes.world import World
from tests.worlds import on_ranks


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sums_are_those_of_all_ranks_and_the_same_bits_everywhere(size: int) -> None:
    values = torch.randn(size, 1000, generator=torch.Generator().manual_seed(3))

    def work(world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        floats, counts, more = values[world.rank].clone(), torch.tensor([world.rank, 1]), torch.ones(3, 2)
        world.sum([floats, counts, more])
        return floats, counts, more

    first, *others = on_ranks(size, work)
    torch.testing.assert_close(first[0], values.sum(dim=0))
    assert first[1].tolist() == [size * (size - 1) // 2, size]
    assert first[2].eq(size).all()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_any_length_reach_the_rank_that_they_are_for(size: int) -> None:
    def work(world: World) -> list[torch.Tensor]:
        parts = [torch.full((world.rank + 2 * to, 3), 10.0 * world.rank + to) for to in range(world.size)]
        return world.exchange(parts)

    for to, received in enumerate(on_ranks(size, work)):
        for origin, part in enumerate(received):
            assert part.shape == (origin + 2 * to, 3)
            assert part.eq(10.0 * origin + to).all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_messages_go_from_rank_0_and_to_it(size: int) -> None:
    def work(world: World) -> tuple[bytes, list[bytes], list[list[int]]]:
        world.wait_for_all()
        told = world.broadcast(f"from {world.rank}".encode())
        return told, world.collect(b"x" * world.rank), [t.tolist() for t in world.gather(torch.arange(world.rank))]

    answers = on_ranks(size, work)
    assert [told for told, _, _ in answers] == [b"from 0"] * size
    assert answers[0][1] == [b"x" * rank for rank in range(size)]
    assert all(collected == [] for _, collected, _ in answers[1:])
    assert all(gathered == [list(range(rank)) for rank in range(size)] for _, _, gathered in answers)


def test_a_rank_that_fails_is_the_error_that_one_sees() -> None:
    def work(world: World) -> None:
        if world.rank == 1:
            raise ValueError("rank 1 has a fault")
        world.wait_for_all()

    with pytest.raises(ValueError, match="rank 1 has a fault"):
        on_ranks(2, work, timeout_s=1.0)


def test_a_rank_that_is_gone_is_told_in_one_line_without_advice_to_developers() -> None:
    def work(world: World) -> None:
        if world.rank == 0:
            world.sum([torch.zeros(3)])

    with pytest.raises(RankLost) as lost:
        on_ranks(2, work, timeout_s=5.0)
    message = str(lost.value)
    assert message.startswith("rank 0 of 2: another rank ended, or did not answer in time: ")
    assert "Connection " in message
    assert "typically" not in message
