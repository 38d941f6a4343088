"""Options and fixtures that several test files share."""

from __future__ import annotations

import os

import pytest

# Threads that wait for work sleep, here and in processes that tests start: networks of tests are so
# small that spinning would cost more than all that is computed. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden/ anew instead of comparing with it",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
