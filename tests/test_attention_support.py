"""The support matrix says of every level what is so there."""

import pytest
from attention_options import is_on_cuda

from fastattn.support import declared_on_cuda, rows, try_on

ROWS = {row[0]: row for row in rows()}


@pytest.mark.parametrize("feature", ROWS)
def test_a_feature_works_where_it_is_said_to(level, feature):
    row = ROWS[feature]
    said = declared_on_cuda(row) if is_on_cuda(level) else (True, True)
    assert try_on(level, row) == said
