"""The certificate: verdicts, files, and the command that makes one."""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gti_kernels.models.mlp import MLP
from gti_kernels.probes import certificate as certificate_module
from gti_kernels.probes import experiment
from gti_kernels.probes.certificate import PROBES, Certificate, Thresholds, certify
from gti_kernels.probes.certificate_text import short


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are so small that more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(norm: str = "group", **options) -> Certificate:
    torch.manual_seed(0)
    model = MLP(16, 3, norm, width=8)
    batches = [(torch.randn(8, 1, 4, 4), torch.randint(0, 3, (8,))) for _ in range(4)]
    arguments = {"dts": (0.01, 0.02), "steps": 3, "pairs": 1, "name": norm, **options}
    return certify(model, F.cross_entropy, batches, **arguments)


@pytest.fixture(scope="module")
def group() -> Certificate:
    return small("group", seeds=2)


@pytest.fixture(scope="module")
def batch() -> Certificate:
    return small("batch")


def test_group_normalisation_passes(group):
    assert group.passed
    assert [(row.name, row.dt, row.passing, row.seeds) for row in group.rows] == [
        ("group", 0.01, 2, 2),
        ("group", 0.02, 2, 2),
    ]
    assert {run.seed for run in group.runs} == {0, 1}
    for row in group.rows:
        assert all(row.value[probe] > 0 for probe in ("state", "energy", "epsilon", "drift"))
        assert all(row.floor[probe] > 0 for probe in ("state", "energy", "epsilon", "drift"))


def test_batch_normalisation_fails_where_it_should(batch):
    assert not batch.passed
    for row in batch.rows:
        assert not row.passed["energy"] and not row.passed["buffers"]
        assert row.passed["state"] and row.passed["epsilon"]


def test_rows_show_the_largest_error_of_the_seeds(group):
    for row in group.rows:
        for probe in PROBES:
            runs = [run for run in group.runs if run.dt == row.dt]
            assert row.value[probe] == max(run.value(probe) for run in runs)


def test_each_seed_starts_at_another_batch(monkeypatch):
    firsts = []

    class Recorded(certificate_module.HamiltonianSystem):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            firsts.append((self.seed, len(self.batches), float(self.batches[0][0].sum())))

    monkeypatch.setattr(certificate_module, "HamiltonianSystem", Recorded)
    small("none", seeds=2, dts=(0.01,))
    (_, _, zero), *rest = firsts
    windows = {(seed, count): first for seed, count, first in rest}
    assert windows.keys() == {(0, 4), (0, 1), (1, 4), (1, 1)}
    assert windows[0, 4] == windows[0, 1] == zero
    assert windows[1, 4] == windows[1, 1] != zero


@pytest.mark.parametrize("probe", ["state", "energy", "epsilon", "drift"])
def test_each_threshold_can_fail(group, probe):
    limits = Thresholds(**{probe: 0.0})
    assert not any(run.passes(probe, limits) for run in group.runs)
    assert not Certificate(group.runs, limits, {}, group.seconds).passed


def test_a_small_slope_fails_the_drift(group):
    run = group.runs[0]
    assert run.passes("drift", Thresholds(slope=run.drift.slope - 0.1))
    assert not run.passes("drift", Thresholds(slope=run.drift.slope + 0.1))


def test_the_table_names_everything(group, batch):
    both = group.join(batch)
    text = both.table()
    for word in (
        "state",
        "energy",
        "buffers",
        "ε_Ω",
        "D/|H₀|",
        "floor",
        "0.01",
        "0.02",
        "2/2",
        "0/1",
    ):
        assert word in text
    assert "group: passes at dt 0.01, 0.02" in text
    assert "batch: passes at no dt; fails energy, buffers" in text
    assert text.count(" ✗") == 1 + sum(not ok for row in both.rows for ok in row.passed.values())
    assert "gti kernels" in text
    assert both.names == ["group", "batch"]
    assert both.seconds["probes"] == group.seconds["probes"] + batch.seconds["probes"]
    assert group.seconds["probes"] > group.seconds["gradients"] > group.seconds["kernels"] > 0


def test_short_numbers():
    assert [short(x) for x in (1.5e-8, 0.0, 2e10, float("nan"))] == ["1.5e-8", "0", "2.0e10", "nan"]


def test_save_writes_all_files(group, tmp_path):
    pytest.importorskip("matplotlib")
    paths = group.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in paths) == [
        "certificate.json",
        "certificate.md",
        "drift.png",
        "omega.png",
        "round_trip.png",
    ]
    content = json.loads(paths[0].read_text(encoding="utf-8"))
    assert content["passed"] is True
    assert content["rows"][0]["value"]["state"] == group.rows[0].value["state"]
    assert content["thresholds"]["epsilon"] == 1e-8
    text = paths[1].read_text(encoding="utf-8")
    assert "| group | 0.01 |" in text and "![round_trip.png](round_trip.png)" in text
    for figure in paths[2:]:
        assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 5000


def test_json_has_no_bare_nan():
    certificate = small("none", dts=(1e30,))  # far beyond stability: everything overflows
    assert not certificate.passed
    content = json.loads(certificate.to_json(), parse_constant=lambda x: pytest.fail(x))
    assert content["runs"][0]["round_trip"]["state"] is None


def test_step_sizes_may_be_an_array():
    assert [row.dt for row in small(dts=np.array([0.01, 0.02])).rows] == [0.01, 0.02]


def test_certify_checks_before_it_measures():
    with pytest.raises(ValueError, match="dts"):
        small(dts=())
    with pytest.raises(ValueError, match=r"dts\[0\]"):
        small(dts=(-1.0,))
    with pytest.raises(ValueError, match="seeds"):
        small(seeds=0)
    with pytest.raises(ValueError, match="regime"):
        small(regime="train")
    for argument, value in {"steps": 0, "pairs": 1000, "tangents": "x", "damping": 1e5}.items():
        with pytest.raises(ValueError, match=argument):
            small(on_measure=pytest.fail, **{argument: value})


# --- the command ----------------------------------------------------------------------------------


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    return experiment.run(parser.parse_args(words))


@pytest.fixture
def npz(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    np.savez(path, x=generator.normal(size=(40, 4, 4)), y=np.arange(40) % 3)
    return path


def test_the_command_measures_and_writes(npz, tmp_path, capsys, monkeypatch):
    for package in ("rich", "tqdm", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.setattr(experiment, "TRAINING_BATCHES", 4)
    out = tmp_path / "out"
    options = ["--model", "mlp", "--norm", "group", "running", "--dt", "0.02", "--steps", "2"]
    assert command(*options, "--pairs", "1", "--data", str(npz), "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar where there is no terminal
    for word in ("group", "running", "ε_Ω", "momentum", "gti kernels", "dose_response.png"):
        assert word in printed.out
    content = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in content["rows"]] == ["group", "running"]
    assert [dose["momentum"] for dose in content["doses"]] == [0.0, 0.001, 0.01, 0.03, 0.1]
    assert content["settings"]["model"] == "mlp" and content["seconds"]["training"] > 0
    assert (out / "dose_response.png").read_bytes().startswith(b"\x89PNG")


def test_bad_data_files_end_with_a_clear_message(tmp_path, capsys):
    for package in ("rich", "tqdm", "matplotlib"):
        pytest.importorskip(package)
    path = tmp_path / "bad.npz"
    np.savez(path, pictures=np.zeros((4, 8, 8)), y=np.zeros(4, dtype=int))
    assert command("--data", str(path), "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "bad.npz: x missing" in error and "pictures" in error and "Traceback" not in error
    assert command("--data", str(tmp_path / "absent.npz")) == 2
    assert "absent.npz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_device_and_bad_numbers(capsys):
    pytest.importorskip("sklearn")
    assert command("--device", "abacus") == 2
    assert "--device" in capsys.readouterr().err
    for words in (["--dt", "-1"], ["--steps", "0"], ["--pairs", "1.5"], ["--norm", "layer"]):
        with pytest.raises(SystemExit) as stop:
            command(*words)
        assert stop.value.code == 2
        assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "tqdm", "matplotlib", "sklearn"])
def test_a_missing_package_is_named_with_its_extra(package, capsys, monkeypatch):
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert command() == 2
    error = capsys.readouterr().err
    assert package.replace("sklearn", "scikit-learn") in error
    assert "gti_kernels[probes]" in error
