"""What the tests of families share."""

from __future__ import annotations

from pathlib import Path

import pytest

from family_contract import FamilyContract


@pytest.fixture
def contract(tmp_path: Path) -> FamilyContract:
    """Checks that hold for every family."""
    return FamilyContract(tmp_path)
