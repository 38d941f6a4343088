"""Which bodies run without a team, after theirs has lost time."""

from __future__ import annotations

import ctypes

import pytest

from sparsify.codegen.toolchain import (
    compile_shared_library,
    load_library,
    read_source,
    why_unavailable,
)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")

TEXT = """
#include "lateness.h"
using namespace sparsify;

static Lateness lateness;
static Body body(int64_t number) { return reinterpret_cast<Body>(4096 + 64 * number); }

extern "C" __attribute__((visibility("default")))
void note(int64_t number, int64_t took_ns, int64_t lost_ns) {
  lateness.note(body(number), 2, 1'000'000'000, took_ns, lost_ns);
}
extern "C" __attribute__((visibility("default")))
int allows(int64_t number) { return lateness.allows(body(number), 1'000'000'000); }
"""


@pytest.fixture
def library() -> ctypes.CDLL:
    headers = {file: read_source(file) for file in ("lateness.h", "runtime.h")}
    found = load_library(compile_shared_library(TEXT, "lateness", headers=headers))
    found["note"].argtypes = [ctypes.c_int64] * 3
    found["allows"].argtypes = [ctypes.c_int64]
    return found


def test_teams_of_a_body_that_lost_nothing_are_formed_whatever_others_lost(
    library: ctypes.CDLL,
) -> None:
    """Also where both share a record, as some of 200 do that share 64."""
    note, allows = library["note"], library["allows"]
    for number in range(200):
        note(number, 1000, 900)
        assert not allows(number)
    for number in range(200, 400):
        note(number, 1000, 0)
        assert allows(number), number
