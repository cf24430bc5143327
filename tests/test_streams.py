import torch

from robustdyn.streams import generator, stream_seed


def test_is_a_function_of_its_arguments():
    draws = [torch.rand(4, generator=generator(0, "attack", 3)) for _ in range(2)]
    assert torch.equal(*draws)


def test_every_argument_matters():
    seeds = {
        stream_seed(seed, stream, *counters)
        for seed in (0, 1)
        for stream in ("a", "b")
        for counters in ((), (0,), (1,), (0, 1), (1, 0), (10,))
    }
    assert len(seeds) == 2 * 2 * 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_leaves_the_global_stream_alone():
    state = torch.get_rng_state()
    torch.rand(3, generator=generator(5, "x"))
    assert torch.equal(torch.get_rng_state(), state)
