"""Packages of other implementations that parity tests compare with; they are in the extra `parity`."""

import importlib
import warnings

import pytest


def reference(name: str):
    """Import a reference package, or skip the test where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they warn of themselves is not ours
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not installed ({error}); it is in the extra `parity`")
