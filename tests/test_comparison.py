"""benchmark/studies/comparison.py: scores, differences and verdicts of runs whose numbers are known."""

import pathlib
import sys

import numpy as np
import pandas as pd
import pytest
from sweeps import write_run

pytest.importorskip("rliable")

from benchmark.studies import comparison  # noqa: E402


@pytest.fixture
def page(monkeypatch, request, tmp_path):
    """Calls the command; returns its page and its scores. Only one test has pictures, which take most of the time to draw."""
    if request.function is not test_the_figure_shows_iqms_over_both_axes:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: pathlib.Path(path).touch())
    monkeypatch.setattr("benchmark.statistics.REPETITIONS", 200)
    def call(*flags):
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["comparison", str(tmp_path / "runs"), "--out", str(out), *flags])
        comparison.main()
        return (out / "README.md").read_text(), pd.read_csv(out / "scores.csv")
    return call


def write(tmp_path, task, group, seed, values, hours):
    script = "reppo_mjx" if group == "reppo" else "trudi_mjx"
    return write_run(tmp_path / "runs", task, seed, values, script=script, exp_name=group, hours=hours)


def test_scores_are_means_of_last_thirds(page, tmp_path):
    # 900 steps in 3 h against 1,800 steps in 6 h, of which half are equal steps and equal time alike
    write(tmp_path, "CheetahRun", "trudi", 1, [0, 0, 0, 0, 0, 50, 70, 80, 90], hours=3.0)
    write(tmp_path, "CheetahRun", "reppo", 1, [0] * 5 + [9, 10, 20, 60] + [1000] * 9, hours=6.0)
    # three times as fast: equal time is all of its 2,700 steps
    write(tmp_path, "CheetahRun", "ppo", 1, [0] * 6 + [1, 2, 3] + [0] * 9 + [10] * 8 + [100], hours=3.0)
    _, scores = page("--steps", "900")
    own = scores.set_index("group")
    assert own.step.to_dict() == {"trudi": 80, "reppo": 30, "ppo": 2}
    assert own.hours.to_dict() == {"trudi": 80, "reppo": 30, "ppo": 20}


def test_runs_that_are_too_short_are_told_and_do_not_count(page, tmp_path):
    for seed in (1, 2):
        write(tmp_path, "CheetahRun", "trudi", seed, [1, 2, 3], hours=3.0)
        write(tmp_path, "CheetahRun", "reppo", seed, [1, 2, 3], hours=1.0)  # at equal steps only
    write(tmp_path, "CheetahRun", "reppo", 3, [1, 2], hours=3.0)  # at equal time only
    text, scores = page("--steps", "300")
    told = [line for line in text.splitlines() if line.startswith("- ")]
    assert told == [
        "- equal steps: reppo on CheetahRun, seed 3",
        "- equal training time: reppo on CheetahRun, seed 1, 2",
    ]
    assert scores.hours.notna().sum() == 3


def test_equal_time_is_that_of_our_fastest_run(page, tmp_path):
    write(tmp_path, "CheetahRun", "trudi", 1, [0, 0, 10], hours=3.0)
    write(tmp_path, "CheetahRun", "trudi", 2, [0, 0, 20], hours=6.0)
    write(tmp_path, "CheetahRun", "reppo", 1, [0, 0, 30, 0, 0, 60], hours=6.0)
    _, scores = page("--steps", "300")
    # until 3 h, where the other's evaluation of 60 at 6 h does not count
    assert scores.query("group == 'reppo'").hours.tolist() == [30]
    assert scores.query("group == 'trudi' and seed == 1").hours.tolist() == [10]


def test_a_clock_of_short_runs(page, tmp_path, capsys):
    """Other work held up the long run of ours, which took 3 h and would have taken 1 alone, as the clock's have."""
    write(tmp_path, "CheetahRun", "trudi", 1, [0, 0, 10], hours=3.0)
    write(tmp_path, "CheetahRun", "reppo", 1, [0, 20, 30, 40, 50, 60], hours=2.0)
    short = tmp_path / "short"
    for seed, hours in ((1, 1.0), (2, 1.0), (3, 2.0)):  # one of them was disturbed
        write_run(short, "CheetahRun", seed, [0, 0, 0], exp_name="trudi", hours=hours)
    flags = ("--steps", "300", "--clock", str(short))
    with pytest.raises(SystemExit):
        page(*flags)
    assert "no run of reppo on CheetahRun" in capsys.readouterr().err
    write_run(short, "CheetahRun", 1, [0], script="reppo_mjx", exp_name="reppo", hours=0.2)
    _, scores = page(*flags)
    # 5 iterations of 0.2 h in the hour, of which the fourth and the fifth are in its last third
    assert scores.set_index("group").hours.to_dict() == {"trudi": 10, "reppo": 45}


def test_the_figure_shows_iqms_over_both_axes(page, tmp_path):
    for task, ours in (("CheetahRun", 10), ("WalkerRun", 30)):
        for seed in (1, 2):
            write(tmp_path, task, "trudi", seed, [ours, 2 * ours, 3 * ours], hours=3.0)
            write(tmp_path, task, "reppo", seed, [5, 6, 7], hours=1.5)
    write(tmp_path, "AcrobotSwingup", "trudi", 1, [900, 900, 900], hours=1.0)  # of which the other has none
    page("--steps", "300")
    drawn = pd.read_csv(tmp_path / "out" / "curves_dmc.csv")
    steps = drawn[drawn.environment_steps.notna()].set_index(["group", "environment_steps"]).iqm
    assert steps[("trudi", 300)] == pytest.approx((30 + 90) / 2) and steps[("trudi", 100)] == pytest.approx((10 + 30) / 2)
    assert steps[("reppo", 300)] == 7
    hours = drawn[drawn.hours.notna()].groupby("group").hours.max()
    assert hours["trudi"] == pytest.approx(3.0) and hours["reppo"] == pytest.approx(1.5)
    assert drawn.iqm.max() < 100
    assert (tmp_path / "out" / "curves_dmc.png").stat().st_size > 5000


def test_only_two_intervals_make_a_verdict():
    above = np.array([1.0, 0.2, 2.0])
    below = np.array([-1.0, -2.0, -0.2])
    likely = np.array([0.8, 0.6, 0.9])
    unlikely = np.array([0.2, 0.1, 0.4])
    even = np.array([0.6, 0.4, 0.8])
    assert comparison.verdict(above, likely) == "better"
    assert comparison.verdict(below, unlikely) == "worse"
    assert comparison.verdict(above, even) == comparison.verdict(below, even) == "open"
    assert comparison.verdict(np.array([1.0, -0.1, 2.0]), likely) == "open"


def test_groups_meet_on_the_tasks_that_both_have(page, tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(1, 5):
        for task, ours, theirs in (("CheetahRun", 500, 300), ("WalkerRun", 100, 20)):
            write(tmp_path, task, "trudi", seed, [0, 0, ours + rng.normal()], hours=1.0)
            write(tmp_path, task, "reppo", seed, [0, 0, theirs + rng.normal()], hours=1.0)
        write(tmp_path, "AcrobotSwingup", "trudi", seed, [0, 0, 900], hours=1.0)
    text, scores = page("--steps", "300")
    (steps, _) = comparison.comparisons(scores, "trudi")
    assert steps.tasks == ["CheetahRun", "WalkerRun"] and steps.runs == (4, 4)
    # the middle four of eight scores: two tasks of four runs each
    assert steps.apart[0] == pytest.approx((500 + 100) / 2 - (300 + 20) / 2, abs=2) and steps.apart[1] > 0
    assert steps.probability.tolist() == [1, 1, 1]
    assert "| better |" in " ".join(text.split()) and "AcrobotSwingup" in text


def test_runs_that_have_just_begun_or_were_begun_anew_change_nothing(page, tmp_path):
    """Ours that have not come to --steps would set the hours of all; a second start of a seed is no second seed."""
    for seed in (1, 2):
        write(tmp_path, "CheetahRun", "trudi", seed, [0, 0, 10], hours=3.0)
        write(tmp_path, "CheetahRun", "reppo", seed, [0, 0, 30], hours=3.0)
    text, scores = page("--steps", "300")
    write(tmp_path, "CheetahRun", "trudi", 3, [5], hours=0.1)
    write(tmp_path, "CheetahRun", "trudi", 1, [7, 7], hours=0.2)
    write(tmp_path, "WalkerRun", "trudi", 1, [7], hours=0.2)  # a task of which no run of ours has come so far
    write(tmp_path, "WalkerRun", "reppo", 1, [0, 0, 30], hours=3.0)
    later, more = page("--steps", "300")
    assert later.splitlines()[4:8] == text.splitlines()[4:8]
    pd.testing.assert_frame_equal(more.query("task == 'CheetahRun' and seed < 3"), scores, check_dtype=False)
    other = more.query("task == 'WalkerRun' and group == 'reppo'")
    assert other.step.tolist() == [30] and other.hours.isna().all()
    assert "- equal training time: trudi on CheetahRun, seed 3" in later


def test_suites_without_a_common_task_have_no_picture(page, tmp_path):
    write(tmp_path, "CheetahRun", "trudi", 1, [0, 0, 10], hours=3.0)
    write(tmp_path, "CheetahRun", "reppo", 1, [0, 0, 10], hours=3.0)
    write(tmp_path, "T1JoystickFlatTerrain", "ppo", 1, [0, 0, 10], hours=3.0)
    write(tmp_path, "G1JoystickFlatTerrain", "trudi", 1, [0, 0, 10], hours=3.0)
    text, _ = page("--steps", "300")
    assert "curves_dmc" in text and "curves_humanoid" not in text


def test_bad_input_is_refused(page, tmp_path, capsys):
    write(tmp_path, "CheetahRun", "trudi", 1, [1.0], hours=1.0)
    (tmp_path / "empty").mkdir()
    for flags in (["--ours", "sac"], ["--metric", "eval/none"], ["--clock", str(tmp_path / "empty")]):
        with pytest.raises(SystemExit) as end:
            page("--steps", "100", *flags)
        assert end.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
