"""What is read from /proc and from Redis."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.serve.readings import Reading, cores_between, parse_info, parse_stat, read_processes

TICKS, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
# proc(5): pid, name, state, then the numbers; user 300, system 50, ended children 20 and 5, 7 threads, 1,000 pages.
STAT = "41 (a) name (R) S 1 41 41 0 -1 4194304 9 8 7 6 300 50 20 5 20 0 7 0 1234 99999 1000 18446744073709551615 1 1"


def test_a_name_with_brackets_and_blanks_moves_no_field() -> None:
    assert parse_stat(STAT, open_files=12) == Reading(375 / TICKS, 1000 * PAGE, 7, 12)


def test_a_process_is_read_as_it_is() -> None:
    # Busy for some ticks of the kernel's clock first: less than one is read as none.
    script = (
        "import threading, time\nwhile time.process_time() < 0.1: pass\n"
        "threads = [threading.Thread(target=input) for _ in range(2)]; threads[0].start(); print(1)"
    )
    command = [sys.executable, "-uc", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = read_processes({"it": process.pid})["it"]
        assert found.threads == 2
        assert found.open_files >= 3
        assert 1 << 20 < found.rss_bytes < 1 << 30
        assert 0.05 < found.cpu_s < 60
        process.communicate("\n", timeout=30)
    with pytest.raises(SystemExit, match="it has ended"):
        read_processes({"it": process.pid})


def test_cores_are_processor_time_over_time() -> None:
    before, after = Reading(1.0, 0, 1, 1), Reading(4.0, 0, 1, 1)
    assert cores_between({"worker": before}, {"worker": after}, 2.0) == {"worker": 1.5}


def test_a_number_of_info_is_found_by_its_whole_name() -> None:
    answer = b"# Memory\r\nused_memory_rss:9\r\nused_memory:1048576\r\nused_memory_human:1.00M\r\n"
    assert parse_info(answer, b"used_memory") == 1048576
    with pytest.raises(ValueError, match="no used"):
        parse_info(answer, b"used")
