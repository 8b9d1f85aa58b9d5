"""Lists of CPUs, nodes from sysfs and from KT_SFT_NUMA, and how a setting narrows them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kt_sft import native, topology


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3", [0, 1, 2, 3]), ("0,2-3,8\n", [0, 2, 3, 8]), ("5", [5]), ("", []), (" \n", [])],
)
def test_lists_of_cpus(text: str, cpus: list[int]):
    assert topology.parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["3-1", "-2", "a", "1,,2", "1-", "1-2-3", "0x1"])
def test_malformed_lists_of_cpus(text: str):
    with pytest.raises(ValueError):
        topology.parse_cpus(text)


def machine(root: Path, *cpulists: str) -> Path:
    for number, cpulist in enumerate(cpulists):
        folder = root / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpulist + "\n")
    return root


@pytest.mark.parametrize(
    ("cpulists", "allowed", "nodes"),
    [
        (("0-1",), {0, 1}, [[]]),
        ((), {0, 1}, [[]]),
        (("0-3", "4-7"), set(range(8)), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (("0-1,4-5", "2-3,6-7"), {0, 2, 4, 7}, [[0, 4], [2, 7]]),
        (("0-3", "4-7"), {4, 5}, [[]]),  # bound to one node from outside
        (("0-3", "", "4-7"), set(range(8)), [[0, 1, 2, 3], [4, 5, 6, 7]]),  # memory only
        (tuple(map(str, range(32))), set(range(32)), [[2 * n, 2 * n + 1] for n in range(16)]),
    ],
)
def test_nodes_of_a_machine(tmp_path, cpulists, allowed, nodes):
    assert topology.detect(machine(tmp_path, *cpulists), allowed) == nodes


@pytest.mark.parametrize(
    ("text", "nodes"),
    [("0-1;2,4", [[0, 1], [2, 4]]), ("3", [[], [], []]), ("1", [[]]), ("0-2", [[0, 1, 2]])],
)
def test_given_nodes(text: str, nodes: topology.Topology):
    assert topology.parse(text) == nodes


@pytest.mark.parametrize("text", ["0", "17", "0-1;", ";", "zwei", "0-1;;2", "-1"])
def test_given_nodes_that_make_no_sense(text: str):
    with pytest.raises(ValueError, match=r"KT_SFT_NUMA: expected the CPUs of 1 to 16 nodes.*, got .*unset it"):
        topology.parse(text)


def test_neighbours_are_put_together():
    nodes = [[0], [1], [2], [3], [4]]
    assert topology.at_most(nodes, 8) == nodes
    assert topology.at_most(nodes, 2) == [[0, 1], [2, 3, 4]]
    assert topology.at_most(nodes, 1) == [[0, 1, 2, 3, 4]]
    assert topology.at_most([[], [], []], 2) == [[], []]


def test_descriptions():
    assert topology.describe([[]]) == "1"
    assert topology.describe([[], []]) == "2 (made up)"
    assert topology.describe([[0, 1, 4, 6, 7], [2]]) == "2 (CPUs 0-1,4,6-7; 2)"


def test_the_setting_is_an_upper_limit(monkeypatch, caplog):
    before = native.nodes()
    try:
        monkeypatch.setattr(native, "_ALL_NODES", [[], [], [], []])
        native.use_nodes(4)
        assert len(native.nodes()) == 4
        native.use_nodes(3)
        assert len(native.nodes()) == 3
        with caplog.at_level(logging.INFO, logger="kt_sft.native"):
            native.use_nodes(8)
        assert len(native.nodes()) == 4
        assert caplog.messages == ["numa_nodes: 8: this process can use 4; that many are used."]
    finally:
        native.set_nodes(before)


@pytest.mark.parametrize(("value", "expected"), [("3", "3"), ("nine", "KT_SFT_NUMA: expected the CPUs")])
def test_the_environment(value: str, expected: str):
    code = "from kt_sft import native; print(len(native.info()['numa_nodes']))"
    env = {**os.environ, "KT_SFT_NUMA": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert expected in (done.stdout if value == "3" else done.stderr)
