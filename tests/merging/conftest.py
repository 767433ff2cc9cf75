import pytest

from merging.models import weights, write


@pytest.fixture
def pair(tmp_path):
    base, tuned = write(tmp_path / "base", weights(1)), write(tmp_path / "tuned", weights(2))
    (base / "config.json").write_text('{"who": "base"}')
    (tuned / "config.json").write_text('{"who": "tuned"}')
    return base, tuned
