"""All strategies of all networks of the zoo, for all targets; minutes: run before a release."""

from __future__ import annotations

import pytest

from sparsify.codegen.cuda.device import STATED, Limits
from tests.cuda.test_nvrtc_zoo import COMPILED, check_no_stack
from tests.cuda_wheels import needs_nvrtc
from tests.models.zoo import Entry


@needs_nvrtc
@pytest.mark.parametrize("limits", STATED, ids=lambda limits: limits.architecture)
@pytest.mark.parametrize("entry", COMPILED, ids=lambda entry: entry.name)
def test_every_strategy(entry: Entry, limits: Limits) -> None:
    check_no_stack(entry, limits, all_strategies=True)
