"""LoRA in the base's precision is PEFT's LoRA, gradients included."""

import pytest
import torch
from tests.looper.ppo_helpers import make_model, make_nf4_model

from looper.lora import compute_in_base_precision


def logits_and_gradients(model):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    logits = model.eval()(ids).logits
    logits.float().square().mean().backward()
    return logits.detach().float(), {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_an_exact_base_the_results_are_pefts(dtype):
    logits, gradients = logits_and_gradients(make_model(dtype).to(dtype))
    model = make_model(dtype).to(dtype)
    compute_in_base_precision(model)
    found, found_gradients = logits_and_gradients(model)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, logits, rtol=0, atol=tolerance)
    assert found_gradients.keys() == gradients.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=tolerance)


def flat(gradients):
    return torch.cat([each.double().flatten() for each in gradients.values()])


def test_of_a_bfloat16_base_they_are_as_near_the_exact_ones_as_pefts():
    exact = flat(logits_and_gradients(make_model(torch.bfloat16).double())[1])
    errors = []
    for own in (False, True):
        model = make_model(torch.bfloat16)
        for parameter in model.parameters():
            if parameter.requires_grad:  # as looper.ppo_policy has them; these are the exact ones, rounded to bfloat16
                parameter.data = parameter.data.float()
        if own:
            compute_in_base_precision(model)
        gradients = logits_and_gradients(model)[1]
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        errors.append((flat(gradients) - exact).norm() / exact.norm())
    assert 1e-3 < errors[0] < 0.1 and errors[1] < 1.5 * errors[0], errors


def test_a_base_in_four_bits_gives_what_peft_gives(tmp_path):
    found = []
    for own in (False, True):
        model = make_nf4_model(tmp_path)
        if own:
            compute_in_base_precision(model)
        logits, gradients = logits_and_gradients(model)
        found.append(torch.cat([logits.double().flatten() / logits.norm(), flat(gradients) / flat(gradients).norm()]))
    assert (found[0] - found[1]).norm() < 0.1 and found[0].norm() > 1


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    model = make_model()  # half of the adapter's input is dropped
    compute_in_base_precision(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)
        assert not torch.allclose(model.train()(ids).logits, model(ids).logits, atol=1e-3)
