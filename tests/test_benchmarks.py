"""Benchmarks that need a GPU, or long, at a size that any machine runs."""

import pytest

from benchmarks import gpu_train


@pytest.mark.timeout(120)
def test_the_whole_line_trains_in_all_three_modes(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"view-size": 32, "batch": 16, "photos": 40, "queue-size": 64, "threads": 1}
    lengths = {"steps": 6, "log-every": 2}
    flags = [f"--{name}={value}" for name, value in (sizes | lengths).items()]

    code = gpu_train.main(["--device=cpu", "--backbone=resnet18", *flags])

    shown = capsys.readouterr().out
    assert code == 0
    for mode in gpu_train.MODES:
        assert f"| {mode} | " in shown
    assert "not known" in shown
