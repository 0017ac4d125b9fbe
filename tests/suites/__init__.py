"""Test suites that a paper's test subclasses."""

import pytest


pytest.register_assert_rewrite("suites.encoder_suite", "suites.trainer_suite")
