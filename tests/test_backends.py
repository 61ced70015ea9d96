"""Which backend runs, why the others do not, and an import that is light and works without a
compiled part."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import gti_kernels as gti
from gti_kernels import backends, testing
from gti_kernels.rows import BUILT, ROWS

HIDE_COMPILED = """
import sys, warnings
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "gti_kernels._compiled":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n == "gti_kernels._compiled" else find(n, p)
sys.meta_path.insert(0, Hide())
"""


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_available_names_every_backend():
    there = gti.available()
    assert set(there) == set(backends.NAMES) - {"auto"}
    assert there["reference"] is None and there["cpu"] is None
    assert all(reason is None or len(reason) > 10 for reason in there.values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_explain_says_what_auto_runs_and_why_nothing_else(row):
    args, kwargs = testing.samples(row.name)[0].make(torch.float32, "cpu")
    explanation = gti.explain(row.name, *args, **kwargs)
    assert explanation.op == row.name and explanation.backend == "cpu"
    assert set(explanation.passed_over) == set(row.backends) - {"cpu"}
    text = str(explanation)
    assert "'auto' runs 'cpu'" in text
    built = (row.stem, "cuda") in BUILT
    assert ("not 'cuda': this op has no cuda kernel yet" in text) == (not built)


def test_explain_knows_what_the_cpu_kernel_does_not_take():
    gaps = torch.ones(6)[::2]
    explanation = gti.explain("kinetic_energy", gaps)
    assert explanation.backend == "reference"
    assert "view with gaps" in explanation.passed_over["cpu"]
    explanation = gti.explain("power_iteration", torch.ones(20, 20), k=17)
    assert explanation.backend == "reference" and "16 triples" in explanation.passed_over["cpu"]
    explanation = gti.explain("drift_", torch.ones(2, device="meta"), torch.ones(2, device="meta"))
    assert explanation.backend == "reference" and "meta" in explanation.passed_over["cpu"]


def test_choose_takes_what_was_named():
    cpu = torch.device("cpu")
    assert backends.choose("kick_", cpu, "auto", {}) == "cpu"
    assert backends.choose("kick_", cpu, "auto", {"cpu": "tired"}) == "reference"
    assert backends.choose("kick_", cpu, "reference", {}) == "reference"
    with pytest.raises(RuntimeError, match="kick_: backend='cpu'.*tired.*'reference' here"):
        backends.choose("kick_", cpu, "cpu", {"cpu": "tired"})


def test_build_info_is_text():
    info = gti.build_info()
    assert info["gti_kernels"] == gti.__version__ and info["torch"] == torch.__version__
    assert info["compiled"] != "missing" and info["openmp"] == "yes"
    assert all(isinstance(value, str) for value in info.values())


def test_import_is_light():
    loaded = python(
        "import sys, torch; before = set(sys.modules); import gti_kernels; "
        "print(*(m.split('.')[0] for m in set(sys.modules) - before))"
    ).split()
    assert not {"triton", "sklearn", "matplotlib", "rich", "tqdm", "pytest"} & set(loaded)


def test_without_the_compiled_part_the_reference_runs_and_says_so_once():
    out = python(
        HIDE_COMPILED
        + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, gti_kernels as gti
    p = torch.ones(3)
    gti.kick_(p, torch.ones(3), 0.5)
    q = torch.ones(3)
    energy = gti.kick_drift_(q, p, torch.zeros(3), 1.0, 2.0)
    sigma = gti.power_iteration(torch.eye(3)).sigma
    omega = gti.two_form(torch.eye(2), torch.eye(2).flip(0)).omega
print(sum("without its CPU kernels" in str(w.message) for w in caught))
print(p.tolist() == [0.5] * 3, q.tolist() == [2.0] * 3, float(energy) == 0.375)
print(abs(float(sigma) - 1) < 1e-6, float(omega.abs().max()) == 0.0)
explanation = gti.explain("kick_", p, p.clone())
print(explanation.backend, "|", explanation.passed_over["cpu"])
print(gti.available()["cpu"] == explanation.passed_over["cpu"], gti.build_info()["compiled"])
try:
    gti.kick_(p, torch.ones(3), 0.5, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    ).splitlines()
    assert out[0] == "1"
    assert out[1] == "True True True" and out[2] == "True True"
    assert out[3].startswith("reference | the compiled part was not built: install")
    assert out[4] == "True missing"
    assert out[5].startswith("kick_: backend='cpu' cannot run this call: the compiled part was not")


def test_a_compiled_part_that_does_not_load_says_why():
    out = python(
        """
import sys, warnings
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "gti_kernels._compiled":
            import importlib.machinery
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError("libgomp.so.1: cannot open shared object file")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
warnings.simplefilter("ignore")
import gti_kernels as gti
print(gti.available()["cpu"])
"""
    )
    assert (
        out.strip()
        == "the compiled part does not load: libgomp.so.1: cannot open shared object file"
    )


def test_explain_takes_the_arguments_of_the_op():
    told = gti.explain("power_iteration", torch.ones(3, 4), backend="reference", seed=3, k=2)
    assert "0 of 1 matrices" in told.note or told.backend != "cpu"
