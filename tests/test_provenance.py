"""What stands beside every reported number."""

import json

import pytest

from coconut.provenance import provenance


def test_what_a_user_sets_is_named_and_what_names_a_machine_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/home/somebody/cache")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = provenance()
    assert found["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert "OMP_NUM_THREADS" not in found["environment"]
    assert "somebody" not in json.dumps(found)
    assert found["versions"]["jax"].startswith("0.") and found["hardware"]["devices"] >= 1
