import json

import pytest


@pytest.fixture
def data(tmp_path):
    """Rows to the name of a file that has them."""

    def write(*rows):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
