"""Rankings that need no training."""

import torch

from vitprune.baselines import RandomPredictor


def test_random_scores_are_a_stream_of_their_own():
    x = torch.zeros(2, 9, 4)
    torch.manual_seed(0)
    one = [RandomPredictor(3)(x) for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(one[0], one[1])
    assert torch.equal(RandomPredictor(3)(x), one[0])
    assert not torch.equal(RandomPredictor(4)(x), one[0])
    predictor = RandomPredictor(3)
    assert not torch.equal(predictor(x), predictor(x)), "another draw for every batch"


def test_random_scores_are_log_probabilities():
    log_pi = RandomPredictor()(torch.zeros(3, 50, 4))
    assert log_pi.shape == (3, 50, 2)
    torch.testing.assert_close(log_pi.exp().sum(-1), torch.ones(3, 50))
