"""Options and fixtures that all tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-dir",
        default=None,
        help="folder with one folder of official numbers per paper, in place of tests/fixtures",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        suite = item.getparent(pytest.Class)
        shared = item.get_closest_marker("shared_trainer") and not suite.cls.stands_for_all
        if shared or (item.get_closest_marker("processes") and suite.cls.splits_as_bert):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def parity_dir(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Gives the folder of a paper's official numbers, or skips the test if there is none."""

    def find(slug: str) -> Path:
        root = Path(request.config.getoption("--parity-dir") or Path(__file__).parent / "fixtures")
        if not root.is_dir():
            pytest.fail(f"--parity-dir {root} is no folder", pytrace=False)
        folder = root / slug
        if not folder.is_dir():
            pytest.skip(f"no official numbers in {folder}")
        return folder

    return find
