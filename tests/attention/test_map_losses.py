"""Losses: values by hand and against the metrics, gradients in float64, degenerate input."""

import pytest
import torch
from torch.autograd import gradcheck

from attention import metrics
from attention.fixations import fixation_counts
from attention.losses import attention_loss, bce, cc, kld, mse, nss, nss_weights, weighted_loss
from attention.maps import log_density, to_density

ALL = {"kld": 1.0, "nss": 0.1, "cc": 0.2, "mse": 0.3, "bce": 0.4}


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target() -> torch.Tensor:
    maps = torch.rand(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    maps[0, :2] = 0
    return to_density(maps)


def test_kld_is_torchs_and_the_metrics(logits, target):
    log_pred = log_density(logits)
    expected = torch.nn.functional.kl_div(log_pred, target, reduction="none").sum(dim=(1, 2))
    torch.testing.assert_close(kld(log_pred, target), expected)
    torch.testing.assert_close(kld(log_pred, target), metrics.kld(log_pred.exp(), target), atol=1e-6, rtol=0)
    torch.testing.assert_close(kld(target.log(), target), torch.zeros(3, dtype=torch.float64))


def test_kld_ignores_an_impossible_position_that_the_target_does_not_ask_for():
    log_pred = torch.tensor([[[0.0, -torch.inf]]])
    assert kld(log_pred, torch.tensor([[[1.0, 0.0]]])) == 0
    assert kld(log_pred, torch.tensor([[[0.5, 0.5]]])) == torch.inf


def test_nss_and_cc_are_the_metrics(logits, target):
    pred = log_density(logits).exp()
    points = torch.tensor([[[0.0, 0.0], [3.5, 2.2]], [[5.9, 4.9], [5.0, 4.0]], [[2.0, 1.0], [1.0, 2.0]]])
    weights = fixation_counts(points, None, (5, 6)) / 2
    torch.testing.assert_close(nss(pred, weights), metrics.nss(pred, points), atol=1e-5, rtol=0)
    torch.testing.assert_close(cc(pred, target), metrics.cc(pred, target), atol=1e-5, rtol=0)


def test_mse_and_bce_by_hand():
    pred, target = torch.tensor([[[0.25, 0.75]]]), torch.tensor([[[0.5, 0.5]]])
    torch.testing.assert_close(mse(pred, target), torch.tensor([0.25]))
    torch.testing.assert_close(bce(torch.zeros(1, 1, 2), target), torch.tensor([2.0]).log())
    exact = bce(torch.tensor([[[60.0, -60.0]]]), torch.tensor([[[1.0, 0.0]]]))
    torch.testing.assert_close(exact, torch.zeros(1))


def test_nss_weights(target):
    torch.testing.assert_close(nss_weights(target), target)
    top = nss_weights(target, kind="top", top_share=0.1)
    assert ((top > 0).sum(dim=(1, 2)) == 3).all()
    assert (target[top > 0].view(3, 3).amin(dim=1) >= torch.where(top > 0, 0, target).amax(dim=(1, 2))).all()
    sampled = nss_weights(target, kind="sampled", num_points=20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled, target, atol=0.01, rtol=0)
    for weights in (top, sampled):
        torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(3, dtype=torch.float64))
    few = nss_weights(target, kind="sampled", num_points=50)
    torch.testing.assert_close(few * 50, (few * 50).round())


@pytest.mark.parametrize("options", [{"kind": "hard"}, {"num_points": 0}, {"top_share": 0.0}, {"top_share": 1.5}])
def test_nss_weights_refuse(target, options):
    with pytest.raises(ValueError, match=next(iter(options)) if "kind" not in options else "nss_target"):
        nss_weights(target, **options)


@pytest.mark.parametrize("name", ["kld", "nss", "cc", "mse", "bce"])
def test_gradient_of_each_term(logits, target, name):
    assert gradcheck(lambda x: weighted_loss(x, target, weights={name: 1.0})[0], logits.requires_grad_())


def test_gradient_of_nss_at_human_fixations(logits, target):
    points = torch.tensor([[0.0, 0.0], [3.5, 2.2], [3.5, 2.2]]).expand(3, 3, 2)
    counts = fixation_counts(points, None, (5, 6)).double()
    assert gradcheck(lambda x: weighted_loss(x, target, weights=ALL, nss_map=counts)[0], logits.requires_grad_())


@pytest.mark.parametrize("nss_target", ["soft", "sampled", "top"])
def test_gradient_of_the_attention_loss(logits, target, nss_target):
    def loss(x: torch.Tensor) -> torch.Tensor:
        return attention_loss(x, target, nss_target=nss_target, generator=torch.Generator().manual_seed(3))

    assert gradcheck(loss, logits.requires_grad_())


def test_gradient_of_to_density(logits):
    assert gradcheck(to_density, logits.exp().requires_grad_())


def test_attention_loss_is_kld_minus_nss(logits, target):
    log_pred = log_density(logits)
    expected = 2 * kld(log_pred, target).mean() - 0.5 * nss(log_pred.exp(), target).mean()
    torch.testing.assert_close(attention_loss(logits, target, kld_weight=2, nss_weight=0.5), expected)
    torch.testing.assert_close(attention_loss(logits, 7 * target), attention_loss(logits, target))


def test_weighted_loss_returns_its_terms(logits, target):
    total, terms = weighted_loss(logits, target, weights=ALL)
    signs = {"kld": 1, "nss": -1, "cc": -1, "mse": 1, "bce": 1}
    torch.testing.assert_close(total, sum(signs[name] * ALL[name] * terms[name] for name in ALL))
    assert weighted_loss(logits, target, weights={"kld": 1, "nss": 0})[1].keys() == {"kld"}


def test_human_fixations_take_the_place_of_the_nss_target(logits, target):
    counts = torch.zeros(3, 5, 6)
    counts[:, 2, 3], counts[:, 0, 1] = 3, 1
    _, terms = weighted_loss(logits, target, weights={"nss": 1}, nss_map=counts)
    points = torch.tensor([[3.0, 2.0]] * 3 + [[1.0, 0.0]]).expand(3, 4, 2)
    torch.testing.assert_close(terms["nss"], metrics.nss(log_density(logits).exp(), points).mean(), atol=1e-5, rtol=0)


def test_masked_samples_neither_count_nor_learn(logits, target):
    mask = torch.tensor([True, False, True])
    broken = target.clone()
    broken[1] = torch.nan
    logits.requires_grad_()
    loss = attention_loss(logits, broken, mask=mask)
    torch.testing.assert_close(loss, attention_loss(logits[mask], target[mask]))
    loss.backward()
    assert logits.grad is not None and not logits.grad[1].any() and torch.isfinite(logits.grad).all()


def test_no_sample_and_no_term_give_a_zero_that_can_be_differentiated(logits, target):
    for options in ({"mask": torch.zeros(3, dtype=torch.bool)}, {"kld_weight": 0, "nss_weight": 0}):
        x = logits.clone().requires_grad_()
        loss = attention_loss(x, target, **options)
        loss.backward()
        assert loss == 0 and x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 4, 4)])
def test_constant_maps_have_finite_losses_and_gradients(shape):
    logits = torch.zeros(shape, requires_grad=True)
    for target in (torch.zeros(shape), torch.ones(shape), torch.full(shape, torch.nan)):
        logits.grad = None
        total, terms = weighted_loss(logits, target, weights=ALL)
        total.backward()
        assert terms["nss"] == 0 and terms["cc"] == 0 and terms["kld"].abs() < 1e-6
        assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_half_precision_is_computed_in_float32(logits, target):
    half = attention_loss(logits.to(torch.bfloat16), target.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, attention_loss(logits, target).float(), atol=0.02, rtol=0)


def test_bad_arguments_are_refused(logits, target):
    with pytest.raises(ValueError, match="unknown attention losses \\['emd'\\]"):
        weighted_loss(logits, target, weights={"emd": 1.0})
    with pytest.raises(ValueError, match="one shape"):
        attention_loss(logits, target[:, :4])
