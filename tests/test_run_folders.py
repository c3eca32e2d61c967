"""What a run of trudi_mjx.py writes, who may read it, and how it ends: folders, records, checkpoints, signals."""

import dataclasses
import json
import os
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from probes import saved_run, small_args

import trudi_mjx as trudi


@pytest.fixture
def run(tmp_path):
    return saved_run(tmp_path)


def test_what_was_saved_is_read(run):
    saved = trudi.read_checkpoint(str(run))
    assert saved["wall_time"] == 12.5
    assert set(saved["state"]) == {"a.b", "c"}
    np.testing.assert_array_equal(saved["state"]["a.b"], np.arange(1000.0))


def test_runs_of_the_same_second_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr("time.time", lambda: 1000.5)
    args = small_args(log_dir=str(tmp_path / "runs"))
    folders = [trudi.run_folder(args) for _ in range(3)]
    assert [folder.name.rpartition("__")[2] for folder in folders] == ["1000", "1001", "1002"]
    assert sorted(folders) == sorted((tmp_path / "runs").iterdir())


def test_every_start_of_a_run_is_on_record(tmp_path, monkeypatch):
    args = small_args()
    for command in (["a"], ["b", "--resume"], ["c", "--resume"]):
        monkeypatch.setattr(sys, "argv", command)
        trudi.open_run(tmp_path, dataclasses.replace(args, total_timesteps=1280 + len(command)))
    saved = json.loads((tmp_path / "args.json").read_text())
    starts = [*saved["earlier_starts"], saved]
    assert [start["command"] for start in starts] == [["a"], ["b", "--resume"], ["c", "--resume"]]
    assert [start["args"]["total_timesteps"] for start in starts] == [1281, 1282, 1282]
    assert all("git_commit" in start and "versions" in start for start in starts)
    assert [path.name for path in tmp_path.iterdir()] == ["args.json"]


def test_a_seeds_folder_that_cannot_be_written_to_names_its_runs_checkpoint(run, monkeypatch, capfd):
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("sys.__stderr__", sys.stderr)
    with pytest.raises(SystemExit) as stop:
        trudi.end_unwritten(run / "seed_1", OSError("no space"))
    line, = capfd.readouterr().err.splitlines()
    assert stop.value.code == 1 and "(OSError: no space); its last whole checkpoint is of step 128" in line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_cannot_write_ends_the_run(monkeypatch, tmp_path):
    """Not one that fails with something else, which Python tells as it does."""
    ended = []
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(trudi, "end_unwritten", lambda *told: ended.append(told))
    trudi.open_log(tmp_path, 0)
    for kind in (OSError, ValueError):
        def fail(kind=kind):
            raise kind("no")

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    (folder, error), = ended
    assert folder == tmp_path and isinstance(error, OSError)


def test_a_second_signal_kills_unless_it_is_an_echo(monkeypatch):
    handlers, killed = {}, []
    clock = iter([10.0, 12.9, 13.1])
    monkeypatch.setattr(trudi, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(trudi, "os", SimpleNamespace(kill=lambda pid, number: killed.append(number), getpid=os.getpid))
    spy = SimpleNamespace(SIGINT=signal.SIGINT, SIGTERM=signal.SIGTERM, SIG_DFL=signal.SIG_DFL, signal=handlers.__setitem__)
    monkeypatch.setattr(trudi, "signal", spy)
    received = trudi.catch_signals()
    for number, expected in ((signal.SIGINT, []), (signal.SIGTERM, []), (signal.SIGINT, [signal.SIGINT])):
        handlers[number](number, None)
        assert killed == expected
    assert received[0] == signal.SIGINT and handlers[signal.SIGINT] == signal.SIG_DFL


def test_a_checkpoint_of_the_same_step_is_written(tmp_path):
    """Also one of an earlier step than the last, as where a continued run diverges sooner."""
    for number, step in enumerate((128, 256, 256, 128)):
        trudi.save_checkpoint(tmp_path, {"x": np.full(3, number)}, step, {})
        kept = tmp_path / "checkpoints" / str(step)
        with trudi.ocp.CheckpointManager(kept.parent) as manager:
            restored = manager.restore(step, args=trudi.ocp.args.PyTreeRestore())
        np.testing.assert_array_equal(restored["state"]["x"], number)
