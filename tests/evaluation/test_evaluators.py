import pytest
import torch
from torch import nn

from robustdyn.data import ImageTensors
from robustdyn.evaluation import Ball
from robustdyn.evaluation.evaluators import summed_margin
from tests.evaluation.problems import (
    Linear,
    binomial_se,
    digits,
    grey_images,
    labelled_by,
    pgd,
    run,
    unbounded,
)
from tests.runs import rows
from tests.tolerances import EXACT32

LINF = Ball("linf", 0.15)


def flags(directory, evaluator):
    """Robustness by example."""
    found = [row for row in rows(directory, "outcomes") if row["evaluator"] == evaluator]
    assert sorted(row["index"] for row in found) == list(range(len(found)))
    return torch.tensor([row["robust"] for row in sorted(found, key=lambda row: row["index"])])


def test_the_margin_is_that_of_carlini_and_wagner():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, -1.0, -5.0]])
    # best other minus labelled: 2 - 3, then 0 - (-5)
    assert summed_margin(logits, torch.tensor([0, 2])).item() == -1 + 5


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.06)])
def test_a_linear_classifier_is_as_robust_as_its_margins_say(norm, eps, loss, tmp_path):
    ball, model = Ball(norm, eps), Linear(2, 16)
    data = labelled_by(model, grey_images(200, 2), wrong_every=10)
    # with two classes the gradient has one direction: 20 steps reach the optimum
    result = run(tmp_path, model, data, {"attack": pgd(loss=loss)}, ball=ball)
    expected = model.robust(data.images / 255, data.labels, ball)
    assert torch.equal(flags(tmp_path, "attack"), expected)
    assert 0.2 < result.accuracy("attack") < 0.8
    assert result.accuracy("attack") == expected.double().mean().item()
    assert result.accuracy("clean") == 0.9


def test_records_counts_settings_and_standard_errors(tmp_path):
    model = Linear(2, 16)
    data = labelled_by(model, grey_images(50, 2), wrong_every=10)
    evaluators = {"one": pgd(steps=3), "two": pgd(steps=6, restarts=2, loss="margin")}
    result = run(tmp_path, model, data, evaluators, ball=Ball("linf", 0.02), batch_size=20)
    table = {row["evaluator"]: row for row in rows(tmp_path, "evaluation")}
    assert list(table) == ["clean", "one", "two", "worst_case"]
    assert {row["examples"] for row in table.values()} == {50}
    accuracy = table["one"]["accuracy"]
    assert table["one"]["accuracy_se"] == pytest.approx(binomial_se(accuracy, 50), rel=1e-12)
    two = [table["two"][key] for key in ("norm", "eps", "loss", "step_size", "steps", "restarts")]
    assert two == ["linf", 0.02, "margin", 0.005, 6, 2]
    both = flags(tmp_path, "one") & flags(tmp_path, "two")
    assert result.accuracy("worst_case") == both.double().mean().item()
    attacked = [row["attacked"] for row in rows(tmp_path, "outcomes") if row["evaluator"] == "one"]
    assert sum(attacked) == 45  # nine in ten are right unattacked
    labels = {row["index"]: row["label"] for row in rows(tmp_path, "outcomes")}
    assert [labels[i] for i in range(50)] == data.labels.tolist()


def test_random_numbers_belong_to_the_example(robust_net, tmp_path):
    """They depend neither on the batch nor on other evaluators or other examples."""
    ball, data = LINF, digits(60)
    weak = pgd(steps=2, restarts=2)  # far from converged: the start decides
    run(tmp_path / "a", robust_net, data, {"x": weak}, ball=ball, batch_size=60)
    run(tmp_path / "b", robust_net, data, {"y": pgd(steps=1), "x": weak}, ball=ball, batch_size=7)
    run(tmp_path / "c", robust_net, data.take(torch.arange(30)), {"x": weak}, ball=ball)
    run(tmp_path / "d", robust_net, data, {"x": weak}, ball=ball, seed=1)
    a, b, c, d = (flags(tmp_path / name, "x") for name in "abcd")
    assert torch.equal(a, b)
    assert torch.equal(a[:30], c)
    assert not torch.equal(a, d)


def test_global_random_numbers_and_the_model_are_left_alone(robust_net, tmp_path):
    robust_net.train()
    gradients = [parameter.grad.clone() for parameter in robust_net.parameters()]  # left by its training
    state = torch.get_rng_state()
    try:
        run(tmp_path, robust_net, digits(10), {"x": pgd(steps=2)}, ball=LINF)
        assert robust_net.training
    finally:
        robust_net.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in robust_net.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(robust_net.parameters(), gradients, strict=True))


class Wavy(nn.Module):
    """Has one pixel x; class 1 wins only where x is within 0.02 of 0.53, class 0 elsewhere.

    From 0.5 on, the gradient of the cross-entropy of label 0 points upwards, even beyond the bump.
    """

    def forward(self, x):
        value = x.flatten(1)[:, :1]
        bump = 4 * torch.relu(0.02 - (value - 0.53).abs()) / 0.02 - 1 + 0.1 * value
        return torch.cat([torch.zeros_like(bump), bump], dim=1)


def test_any_iterate_finds_what_the_last_one_passed(tmp_path):
    data = ImageTensors(torch.full((1, 1, 1, 1), 128, dtype=torch.uint8), torch.tensor([0]))  # 0.502
    settings = {"steps": 6, "relative_step": 0.25, "random_start": "none"}
    # steps of 0.03: 0.532 is broken; the slope there is +0.1 - 200 beyond the top, so it comes back, and at
    # an even number of steps it stands at 0.502 again
    evaluators = {"last": pgd(**settings), "any": pgd(**settings, iterates="any")}
    result = run(tmp_path, Wavy(), data, evaluators, ball=Ball("linf", 0.12))
    assert result.accuracy("clean") == 1
    assert result.accuracy("last") == 1
    assert result.accuracy("any") == 0


def test_restarts_only_ever_break_more(robust_net, tmp_path):
    data = digits(100)
    evaluators = {"x": pgd(steps=2, restarts=1)}
    run(tmp_path / "1", robust_net, data, evaluators, ball=LINF)
    run(tmp_path / "8", robust_net, data, {"x": pgd(steps=2, restarts=8)}, ball=LINF)
    one, eight = flags(tmp_path / "1", "x"), flags(tmp_path / "8", "x")
    assert not (eight & ~one).any()  # the first start is the same
    assert eight.sum() < one.sum()


def test_no_image_withstands_an_unbounded_attack(robust_net, tmp_path):
    result = run(tmp_path, robust_net, digits(60), {"x": pgd(), "all": unbounded()}, ball=LINF)
    assert result.accuracy("all") <= 0.02
    assert result.accuracy("worst_case") == result.accuracy("x")  # a check, not the threat model
    assert result.checks == {"all"}
    assert not result.warnings


def test_a_ball_knows_its_points():
    images = torch.full((3, 1, 2, 2), 0.5)
    moved = images.clone()
    moved[1, 0, 0, 0] = 0.61
    moved[2, 0, 0, 0] = torch.nan
    assert Ball("linf", 0.1).holds(images, moved).tolist() == [True, False, False]
    assert Ball("l2", 0.12).holds(images, moved).tolist() == [True, True, False]
    assert Ball("linf", 0.6).holds(images, images + 0.55).tolist() == [False] * 3  # beyond white
    torch.testing.assert_close(Ball("l2", 0.1).whole_box(images).eps, 2.0, **EXACT32)


class Leaves:
    """An attack that does not keep to the ball."""

    def settings(self):
        return {}

    def attacks(self, name, ball, num_classes, images, seed):
        (attack,) = pgd().attacks(name, Ball(ball.norm, 2 * ball.eps), num_classes, images, seed).values()
        described = pgd().attacks(name, ball, num_classes, images, seed)[name].description

        class Attack:
            description = described

            def __call__(self, model, batch, note):
                return attack(model, batch, note)

        return {name: Attack()}


def test_an_attack_that_leaves_the_ball_is_refused(robust_net, tmp_path):
    with pytest.raises(RuntimeError, match=r"^cheat left the linf ball of radius 0.15"):
        run(tmp_path, robust_net, digits(10), {"cheat": Leaves()}, ball=LINF)


def test_images_outside_the_pixel_range_are_refused_before_any_attack(robust_net, tmp_path):
    images = digits(40).images.float()
    images[-1] = 2.5 * 255  # in the last batch
    spoiled = ImageTensors(images, digits(40).labels)
    with pytest.raises(ValueError, match=r"inputs lie in \[0, 2.5\], outside valid_range=\(0, 1\)"):
        run(tmp_path, robust_net, spoiled, {"never": Leaves()}, ball=LINF)


@pytest.mark.parametrize("name", ["clean", "worst_case", "a/b"])
def test_refuses_names_that_mean_something_else(name, robust_net, tmp_path):
    with pytest.raises(ValueError, match=f"an evaluator cannot be called {name}"):
        run(tmp_path, robust_net, digits(10), {name: pgd()}, ball=LINF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"restarts": 1.5}, "restarts must be a whole number of at least 1, got 1.5"),
        ({"relative_step": 0}, "relative_step must be positive, got 0"),
        ({"loss": "dlr"}, "loss must be cross_entropy or margin, got dlr"),
        ({"iterates": "best"}, "iterates must be last or any, got best"),
        ({"random_start": "none", "restarts": 2}, "restarts=2 without a random start would all be the same"),
        ({"random_start": "somewhere"}, "random_start must be uniform, gaussian or none"),
    ],
)
def test_refuses_settings_outside_their_range(change, message):
    with pytest.raises(ValueError, match=message):
        pgd(**change)


@pytest.mark.parametrize(
    ("ball", "message"),
    [
        (("l1", 1), "norm must be linf or l2"),
        (("l2", -1), "eps must be at least 0"),
        (("linf", 8), "eps=8 exceeds the width 1.0 of the valid range"),
    ],
)
def test_refuses_a_ball_that_is_none(ball, message):
    with pytest.raises(ValueError, match=message):
        Ball(*ball)
