"""Two hosts with their own addresses: they meet, one is cut off from the network, comes back and is started again."""

import time

import pytest

from tests.distributed.hosts import make_hosts
from tests.distributed.launch import metrics, train, wait_for_step

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def hosts(tmp_path):
    try:
        hosts = make_hosts(tmp_path)
    except OSError as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    yield hosts
    for host in hosts.values():
        host.remove()


def losses(folder):
    return [(step, line["loss"]) for step, line in sorted(metrics(folder).items())]


def wait_for(said, log, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while said not in log.read_text():
        assert time.monotonic() < deadline, f"{said!r} is not in {log}: {log.read_text()[-3000:]}"
        time.sleep(0.2)


def cut_off(hosts, folder):
    """Cut host b off in the middle of training and wait until both sides have said so and ended their ranks."""
    wait_for_step(folder, 3, timeout_s=120, log=folder / "log-a")
    hosts["b"].cut_off()
    wait_for("rank 1 (host-b", folder / "log-a")
    assert "rank 1 holds up the others" in (folder / "log-a").read_text()
    wait_for("does not answer: look there first", folder / "log-b")


OPTIONS = {"steps": 8, "packs": 4, "every": 1, "watchdog": {"stall_s": 20, "save_s": 20}}


@pytest.mark.parametrize("started_again", [False, True], ids=["brought back", "started again"])
def test_a_host_that_is_cut_off_costs_the_steps_since_the_last_checkpoint(tmp_path, hosts, started_again):
    """Host a, which stays, says which rank is lost, ends its own, and waits for the other host in the rendezvous."""
    folder = tmp_path / "run"
    launchers = {letter: host.start_training(folder, 3, step_s=0.5, **OPTIONS) for letter, host in hosts.items()}
    try:
        cut_off(hosts, folder)
        assert launchers["a"].poll() is None
        if started_again:
            launchers["b"].kill()
            launchers["b"].wait()
        hosts["b"].bring_back()
        if started_again:
            launchers["b"] = hosts["b"].start_training(folder, 3, **OPTIONS)
        assert [launchers[letter].wait(300) for letter in "ab"] == [0, 0]
    finally:
        for launcher in launchers.values():
            launcher.kill()
    assert "resumed from" in (folder / "log-a").read_text()
    assert train(2, tmp_path / "whole", **OPTIONS).returncode == 0
    assert losses(folder) == losses(tmp_path / "whole")
