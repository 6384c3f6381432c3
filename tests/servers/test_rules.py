from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wagontrain.errors import UsageError
from wagontrain.servers import rules
from wagontrain.servers.rules import RULES, rule_of_tables
from wagontrain.servers.tables import Rows, Table
from wagontrain.servers.updating import Updater

OPTIMIZERS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("Adam", {"lr": 0.01, "betas": [0.8, 0.99], "amsgrad": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.3, "lr_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True}),
    ("Adadelta", {"lr": 0.5}),
    ("Adamax", {"lr": 0.01}),
    ("NAdam", {"lr": 0.01}),
    ("RAdam", {"lr": 0.01}),
    ("ASGD", {"lr": 0.01}),
    ("Rprop", {"lr": 0.01}),
]


def gradients(count, *shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def torch_run(name, options, start, steps):
    """What torch makes of whole tensors."""
    value = torch.nn.Parameter(start.clone())
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    optimizer = getattr(torch.optim, name)([value], **options)
    for gradient in steps:
        value.grad = gradient.clone()
        optimizer.step()
    return value.detach()


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_the_tasks_optimizer_on_parts_is_that_on_whole_tensors(name, options):
    start, steps = torch.ones(4, 3), gradients(5, 4, 3)
    flat = start.clone().view(-1)
    updater = Updater("optimizer", name, [options], [flat[:7], flat[7:]], [0, 0])
    for gradient in steps:
        whole = gradient.clone().view(-1)
        updater.apply([whole[:7], whole[7:]])
    torch.testing.assert_close(flat.view(4, 3), torch_run(name, options, start, steps))


@pytest.mark.parametrize(
    ("rule", "name", "options"),
    [
        ("sgd", "SGD", {"lr": 0.1, "weight_decay": 0.01}),
        ("momentum", "SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        ("momentum", "SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
        ("adam", "Adam", {"lr": 0.01, "betas": [0.8, 0.99], "weight_decay": 0.1}),
    ],
)
def test_rules_that_torch_has_too(rule, name, options):
    start, steps = torch.ones(5), gradients(6, 5)
    value = start.clone()
    updater = Updater(rule, "SGD", [options], [value], [0])
    for gradient in steps:
        updater.apply([gradient.clone()])
    torch.testing.assert_close(value, torch_run(name, options, start, steps))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
        ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
        ("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    ],
)
def test_each_row_of_a_table_is_updated_as_a_tensor_of_its_own(name, options):
    """Row 2 is updated every time, row 6 only at times: it counts its own updates."""
    table = Table("t", 10, 3)
    rows = Rows(table, rule_of_tables("optimizer", name, options), 0, 2, seed=1)
    start = rows.read(torch.tensor([2, 6]))
    steps = gradients(6, 2, 3)
    for number, gradient in enumerate(steps):
        ids = torch.tensor([2, 6]) if number % 2 else torch.tensor([2])
        rows.update(ids, gradient[: len(ids)].clone(), options)
    wanted = dict(options)
    wanted.pop("decoupled_weight_decay", None)
    every = torch_run(name, wanted, start[0], [step[0] for step in steps])
    some = torch_run(name, wanted, start[1], [step[1] for step in steps[1::2]])
    torch.testing.assert_close(rows.read(torch.tensor([6, 2])), torch.stack([some, every]))


def test_adagrad_as_downpour_ran_it_by_hand():
    """Gradients 3, 4: sums 9, 25; rates 1/3, 1/5; so 10 - 3/3 - 4/5. A zero changes nothing."""
    value = torch.tensor([10.0, 10.0, 10.0])
    updater = Updater("adagrad", "SGD", [{"lr": 1.0}], [value], [0])
    updater.apply([torch.tensor([3.0, 0.0, -3.0])])
    assert value.tolist() == [9.0, 10.0, 11.0]
    updater.apply([torch.tensor([4.0, 0.0, 0.0])])
    torch.testing.assert_close(value, torch.tensor([8.2, 10.0, 11.0]))


@settings(deadline=None)
@given(st.lists(st.floats(1e-30, 1e3), min_size=1, max_size=20))
def test_adagrad_never_makes_a_number_that_is_none(steps):
    """Squares of small numbers vanish: there is no rate then, and no update."""
    value = torch.zeros(1)
    updater = Updater("adagrad", "SGD", [{"lr": 0.5}], [value], [0])
    places = [0.0]
    for step in steps:
        updater.apply([torch.tensor([step])])
        places.append(float(value))
        assert math.isfinite(places[-1])
    assert all(abs(a - b) <= 0.5 * 1.001 for a, b in pairwise(places))


def test_elastic_averaging_adds_what_is_pushed():
    value = torch.tensor([1.0, 2.0])
    Updater("easgd", "SGD", [{"lr": 99.0, "weight_decay": 1.0}], [value], [0]).apply(
        [torch.tensor([0.5, -0.5])]
    )
    assert value.tolist() == [1.5, 1.5]


def test_delay_compensation_by_hand():
    """g + λ g² (w − w_bak) = 2 + 0.5 · 4 · (3 − 1) = 6."""
    gradient = torch.tensor([2.0])
    rules.compensate(gradient, torch.tensor([3.0]), torch.tensor([1.0]), 0.5)
    assert gradient.tolist() == [6.0]


@pytest.mark.parametrize(("staleness", "rate"), [(0, 1.0), (1, 1.0), (4, 0.25)])
def test_the_rate_falls_with_staleness(staleness, rate):
    value = torch.tensor([1.0])
    updater = Updater("staleness-aware", "SGD", [{"lr": 1.0}], [value], [0])
    updater.apply([torch.tensor([1.0])], staleness)
    assert float(value) == 1.0 - rate
    updater.apply([torch.tensor([1.0])], 1)
    assert float(value) == -rate  # and is the whole one again afterwards


def test_parts_without_gradient_stay_as_they_are():
    for rule in ("optimizer", "momentum"):
        values = [torch.ones(2), torch.ones(2)]
        updater = Updater(rule, "Adam", [{"lr": 0.1, "weight_decay": 0.5}], values, [0, 0])
        updater.apply([torch.ones(2), None])
        assert values[0].tolist() != [1, 1]
        assert values[1].tolist() == [1, 1]


@pytest.mark.parametrize("rule", ["optimizer", "sgd"])
def test_groups_have_their_own_settings_and_get_new_ones(rule):
    values = [torch.zeros(1), torch.zeros(1)]
    updater = Updater(rule, "SGD", [{"lr": 1.0}, {"lr": 2.0}], values, [0, 1])
    updater.apply([torch.ones(1), torch.ones(1)])
    assert [float(value) for value in values] == [-1, -2]
    updater.refresh([{}, {"lr": 0.5}])
    updater.apply([torch.ones(1), torch.ones(1)])
    assert [float(value) for value in values] == [-2, -2.5]
    with pytest.raises(UsageError, match="3 groups of parameters, of which there are 2"):
        updater.refresh([{}, {}, {}])


@pytest.mark.parametrize(("rule", "name"), [("optimizer", "Adam"), ("adam", "SGD")])
def test_values_can_move_and_state_can_be_taken_up(rule, name):
    steps = gradients(4, 5)
    here = torch.ones(5)
    first = Updater(rule, name, [{"lr": 0.1}], [here], [0])
    straight = torch.ones(5)
    other = Updater(rule, name, [{"lr": 0.1}], [straight], [0])
    for step in steps[:2]:
        first.apply([step.clone()])
        other.apply([step.clone()])
    there = here.clone()
    first.move([there])
    first.apply([steps[2].clone()])
    second = Updater(rule, name, [{"lr": 0.1}], [there], [0])
    second.restore(first.states())
    second.apply([steps[3].clone()])
    for step in steps[2:]:
        other.apply([step.clone()])
    assert torch.equal(there, straight)
    assert not torch.equal(here, there)


def test_what_cannot_be_is_refused():
    value = [torch.zeros(1)]
    with pytest.raises(UsageError, match="no update rule 'adagard': did you mean 'adagrad'"):
        Updater("adagard", "SGD", [{"lr": 1.0}], value, [0])
    with pytest.raises(UsageError, match="LBFGS is not known to treat every number"):
        Updater("optimizer", "LBFGS", [{"lr": 1.0}], value, [0])
    with pytest.raises(UsageError, match="RMSprop cannot update single rows"):
        rule_of_tables("optimizer", "RMSprop", {"lr": 1.0})
    with pytest.raises(UsageError, match="SGD with dampening=0.5 cannot update single rows"):
        rule_of_tables("dc-asgd", "SGD", {"lr": 1.0, "dampening": 0.5})


def test_every_rule_says_its_equation():
    for rule in RULES.values():
        assert "←" in (rule.update.__doc__ or "")
