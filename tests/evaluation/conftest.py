import pytest

from tests.evaluation.problems import trained_net


@pytest.fixture(scope="session")
def robust_net():
    """A network that was adversarially trained on digits."""
    return trained_net(adversarially=True)
