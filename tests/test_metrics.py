import pytest
import torch

from lightning_itk.metrics import ExactMatch, ResponsePerplexity, TeacherAgreement, TokenMean, WinRate


def test_means_weigh_elements_not_batches():
    mean, perplexity = TokenMean(), ResponsePerplexity()
    for metric in (mean, perplexity):
        metric.update(torch.tensor(10.0), 5)
        metric.update(torch.tensor(2.0), torch.tensor(1))
        metric.update(torch.tensor(0.0), 0)
    assert mean.compute() == 2.0
    assert perplexity.compute() == pytest.approx(torch.tensor(2.0).exp().item())
    assert TokenMean().compute() == 0


def test_agreement_match_and_wins():
    agreement = TeacherAgreement()
    agreement.update(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3]))
    assert agreement.compute() == pytest.approx(2 / 3)
    match = ExactMatch()
    match.update([" 12  EUR\n", "no"], ["12 EUR", "yes"])
    assert match.compute() == 0.5
    wins = WinRate()
    wins.update(torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([0.0, 2.0, 1.0, 1.0]))
    assert wins.compute() == 0.625
    with pytest.raises(ValueError, match="1 answers but 2 references"):
        match.update(["a"], ["a", "b"])
