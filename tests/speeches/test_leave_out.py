"""Leaving out what a library could use: for the block only, and not what is loaded already."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from psycho.speeches.leave_out import leave_out


def test_a_module_is_not_found_inside_the_block_and_is_after_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with leave_out("colorsys", "json"), pytest.raises(ImportError):
        importlib.import_module("json")
        importlib.import_module("colorsys")
    assert importlib.import_module("colorsys").rgb_to_hls and sys.modules["json"] is json


def test_it_is_undone_after_an_error(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(RuntimeError), leave_out("colorsys"):
        raise RuntimeError
    assert "colorsys" not in sys.modules


def test_a_worker_that_masks_does_not_load_torch():
    code = "import sys, psycho.speeches.personal; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
