"""Schedules depend on the step alone; parameter groups hold every trained parameter once."""

import pytest
import torch

from ijepa.optimization import Schedules, parameter_groups


def test_learning_rate_rises_to_the_peak_then_falls_to_its_final_value():
    schedules = Schedules(total_steps=100, warmup_steps=10)
    rates = [schedules.learning_rate(step) for step in range(100)]
    assert rates[9] == max(rates) == schedules.peak_learning_rate
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[0] > schedules.start_learning_rate
    assert rates[-1] == pytest.approx(schedules.final_learning_rate)


def test_weight_decay_and_momentum_move_from_start_to_end():
    schedules = Schedules(total_steps=50)
    assert schedules.weight_decay(49) == pytest.approx(schedules.final_weight_decay)
    assert schedules.momentum(0) == schedules.start_momentum
    assert schedules.momentum(49) < schedules.momentum(50) == schedules.final_momentum


def test_schedules_hold_their_final_values_after_the_last_step():
    schedules = Schedules(total_steps=10, warmup_steps=2)
    for value in (schedules.learning_rate, schedules.weight_decay):
        assert value(30) == value(9)
    assert schedules.momentum(30) == schedules.final_momentum


def test_warmup_may_be_absent_or_the_whole_run():
    assert Schedules(total_steps=5).learning_rate(0) < 1e-3
    assert Schedules(total_steps=5, warmup_steps=5).learning_rate(4) == 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps 0"),
        ({"total_steps": 5, "warmup_steps": 6}, "warmup_steps 6"),
        ({"total_steps": 5, "start_momentum": 1.5}, "start_momentum.*1.5"),
        ({"total_steps": 5, "peak_learning_rate": float("nan")}, "peak_learning_rate.*nan"),
        ({"total_steps": 5, "start_weight_decay": -1.0}, "start_weight_decay.*-1.0"),
    ],
)
def test_impossible_schedules_are_refused_with_their_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedules(**settings)


def test_groups_hold_every_trained_parameter_once_and_none_of_the_target(tiny_model):
    grouped = [id(parameter) for group in parameter_groups(tiny_model) for parameter in group["params"]]
    trained = [id(parameter) for parameter in tiny_model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert not set(grouped) & {id(parameter) for parameter in tiny_model.ijepa.parameters()}


def test_biases_and_norms_are_not_decayed_and_the_mask_token_is(tiny_model):
    groups = {group["name"]: group for group in parameter_groups(tiny_model)}
    assert any(parameter is tiny_model.predictor.mask_token for parameter in groups["predictor_decayed"]["params"])
    assert all(parameter.ndim > 1 for name in groups if "_decayed" in name for parameter in groups[name]["params"])
    assert all(parameter.ndim == 1 for name in groups if "undecayed" in name for parameter in groups[name]["params"])


def test_apply_sets_both_rates_and_leaves_undecayed_groups_alone(tiny_model):
    optimizer = torch.optim.AdamW(parameter_groups(tiny_model))
    schedules = Schedules(total_steps=10, warmup_steps=2)
    schedules.apply(optimizer, 4)
    for group in optimizer.param_groups:
        assert group["lr"] == schedules.learning_rate(4)
        assert group["weight_decay"] == (schedules.weight_decay(4) if group["decayed"] else 0.0)
