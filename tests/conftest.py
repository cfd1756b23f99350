"""What holds for all tests: no network, no user's settings, and nothing skipped under --full."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

HOME = tempfile.mkdtemp(prefix="merge_kit_tests_")
os.environ.update(
    HF_HOME=HOME,  # no token and no cache of the user
    HF_ENDPOINT="http://127.0.0.1:9",  # nothing listens there; tests of the Hub start their own
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    TOKENIZERS_PARALLELISM="false",
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)

# Compared with another tool only where its environment is named: see there.
OF_PEERS = ["test_against_peer.py", "structures/test_moe_against_peer.py"]
collect_ignore = [] if os.environ.get("MERGE_KIT_PEER") else OF_PEERS

# Deadlines fail on a busy machine; the same examples every time keep a failure repeatable.
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("full", deadline=None, database=None, max_examples=500)


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="run slow tests too; a skipped test is a failed one"
    )


def pytest_configure(config):
    hypothesis.settings.load_profile("full" if config.getoption("full") else "quick")


def pytest_unconfigure():
    shutil.rmtree(HOME, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("full"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("full"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which --full does not allow: {report.longrepr}"


@pytest.fixture
def tool() -> Callable[[str], Path]:
    """Find a program by its name, or skip the test; under --full a skip is a failure."""

    def find(name: str) -> Path:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not installed")
        return Path(found)

    return find
