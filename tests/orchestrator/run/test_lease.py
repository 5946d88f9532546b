"""The lease under contention: many takers, killed holders, slow and late views of the folder."""

import errno
import json
import os
import random
import secrets
import threading
import time

import pytest

from orchestrator.errors import LeaseLost, RunFolderError, RunIsLocked
from orchestrator.run import lease as lease_module
from orchestrator.run.lease import Lease, hold_lease, read_holder, this_process
from orchestrator.run.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


class Contention:
    """Threads that acquire, hold and lose one lease; each has a process record of its own that may be 'killed'."""

    def __init__(self, run, monkeypatch, *, has_links: bool, view_delay_s: float):
        self.run, self.alive, self.holders, self.double, self.rounds = run, set(), set(), [], 0
        self.guard, self.local, self.views = threading.Lock(), threading.local(), {}
        self.view_delay_s = view_delay_s
        monkeypatch.setattr(lease_module, "this_process", lambda: self.local.process)
        monkeypatch.setattr(lease_module, "is_alive", self.is_alive)
        monkeypatch.setattr(lease_module, "_list_generations", self.list_late(lease_module._list_generations))
        link = os.link
        monkeypatch.setattr(os, "link", self.slow(link) if has_links else self.refuse_link)

    def is_alive(self, process, heartbeat_s):
        """Return whether a process was not killed; one that is still writing its file is unknown for a while."""
        return heartbeat_s < 0.5 if process["started"] is None else process["started"] in self.alive

    def slow(self, function):
        def delayed(*arguments, **options):
            time.sleep(random.choice((0.0, 0.0, 0.0005, 0.002)))
            try:
                return function(*arguments, **options)
            finally:
                time.sleep(random.choice((0.0, 0.0, 0.0005, 0.002)))

        return delayed

    @staticmethod
    def refuse_link(source, target):
        raise OSError(errno.ENOTSUP, "no hard links")

    def list_late(self, function):
        """Return a listing that may be as old as `view_delay_s`, as on a network file system."""
        slow = self.slow(function)

        def listing(folder):
            taken, entries = self.views.get(threading.get_ident(), (0.0, []))
            if not entries or time.monotonic() - taken > random.random() * self.view_delay_s:
                entries = slow(folder)
                self.views[threading.get_ident()] = (time.monotonic(), entries)
            return entries

        return listing

    def take(self, rounds: int):
        while self.rounds < rounds:
            started = secrets.token_hex(8)
            self.local.process = {"host": "h", "pids": "", "pid": 1, "started": started}
            self.alive.add(started)
            try:
                held = lease_module._acquire(self.run)
            except RunIsLocked:
                self.alive.discard(started)
                continue
            with self.guard:
                if self.holders:
                    self.double.append((held.generation, set(self.holders)))
                self.holders.add(started)
                self.rounds += 1
            time.sleep(random.random() * 0.001)
            with self.guard:
                self.holders.discard(started)
            if random.random() < 0.5:
                held.release()
            self.alive.discard(started)


def contend(run, monkeypatch, rounds, *, has_links=True, view_delay_s=0.0):
    contention = Contention(run, monkeypatch, has_links=has_links, view_delay_s=view_delay_s)
    takers = [threading.Thread(target=contention.take, args=(rounds,)) for _ in range(8)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    return contention


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("view_delay_s", [0.0, 0.02])
def test_lease_under_contention_has_one_holder(run, monkeypatch, has_links, view_delay_s):
    contention = contend(run, monkeypatch, 150, has_links=has_links, view_delay_s=view_delay_s)
    assert contention.rounds >= 150 and contention.double == []


@pytest.mark.integration
@pytest.mark.parametrize(("has_links", "view_delay_s"), [(True, 0.0), (False, 0.0), (True, 0.02), (False, 0.02)])
def test_lease_in_ten_thousand_rounds_has_one_holder(run, monkeypatch, has_links, view_delay_s):
    contention = contend(run, monkeypatch, 2500, has_links=has_links, view_delay_s=view_delay_s)
    assert contention.rounds >= 2500 and contention.double == []


def test_lease_without_hard_links_is_held_and_released(run, monkeypatch):
    monkeypatch.setattr(os, "link", Contention.refuse_link)
    with hold_lease(run):
        assert read_holder(run).process == this_process()
        with pytest.raises(RunIsLocked), hold_lease(run):
            pass
    assert read_holder(run) is None


def test_lease_that_was_taken_over_fails_its_check(run):
    with hold_lease(run) as lease:
        lease.check()
        (run.controllers / f"{lease.generation + 1}.json").write_text(json.dumps(this_process() | {"host": "another"}))
        with pytest.raises(LeaseLost, match="taken over"):
            lease.check()
    assert read_holder(run).process["host"] == "another", "a lost lease is not released"


def test_damaged_lease_file_is_unknown_until_it_is_old(run):
    run.controllers.mkdir(parents=True)
    (run.controllers / "7.json").write_text("{")
    with pytest.raises(RunIsLocked, match="unknown host"), hold_lease(run):
        pass
    os.utime(run.controllers / "7.json", (0, 0))
    with hold_lease(run) as lease:
        assert lease.generation == 8


def test_old_lease_files_are_removed_far_behind(run, monkeypatch):
    monkeypatch.setattr(lease_module, "KEPT_GENERATIONS", 3)
    for _ in range(6):
        with hold_lease(run):
            pass
    assert sorted(path.name for path in run.controllers.iterdir()) == ["4.json", "5.json", "6.json"]
    assert not Lease(run.controllers, 4, run.controllers / "release").is_held()


def test_deleted_run_folder_is_named(run):
    with hold_lease(run) as lease:
        run.root.rename(run.root.with_name("moved"))
        with pytest.raises(RunFolderError, match="deleted or moved"):
            lease.check()
