"""The fingerprint of the code covers exactly the project files that a trial runs."""

import subprocess
import sys

from metagmvae.infra.tune.code_version import ENTRY_POINT, LIBRARIES, ROOT, changed_parts, code_fingerprint
from metagmvae.pipelines.files import sha256_file

LOADED = """
import sys
import metagmvae.infra.runs.train_in_process
names = (name for name in sys.modules if name.startswith("metagmvae."))
print(*(name.removeprefix("metagmvae.").replace(".", "/") + ".py" for name in names))
"""


def test_files_that_decide_a_result_are_in_the_fingerprint_with_their_hash():
    fingerprint = code_fingerprint()
    for name in (
        ENTRY_POINT,
        "configs/schema.py",
        "pipelines/sampling/indexed.py",
        "pipelines/shards/dataset.py",
        "training/methods/meta_gmvae.py",
        "training/objectives/elbo.py",
        "training/objectives/mixture.py",
        "training/trainer/stages.py",
        "evaluation/fewshot/predict.py",
        "evaluation/fewshot/encoding.py",
        "evaluation/fewshot/validation.py",
    ):
        assert fingerprint[name] == sha256_file(ROOT / name)
    assert set(LIBRARIES) <= fingerprint.keys()


def test_reports_tracking_commands_and_search_are_not_in_the_fingerprint():
    others = ("evaluation/sweeps", "evaluation/comparison", "evaluation/figures", "infra/tracking", "infra/registry")
    others += ("infra/commands", "infra/tune", "infra/cluster", "infra/workflows", "infra/fitting", "infra/tables")
    assert [name for name in code_fingerprint() if name.startswith(others)] == []
    sources = [name for name in code_fingerprint() if name.startswith("pipelines/sources")]
    assert sources == ["pipelines/sources/image_decoding.py"], "which decodes the images of encoded shards"


def test_every_project_module_that_training_loads_is_in_the_fingerprint():
    result = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    loaded = {name for name in result.stdout.split() if (ROOT / name).is_file()}
    assert len(loaded) > 30
    assert loaded <= code_fingerprint().keys()


def test_changed_parts_name_files_and_library_versions():
    old = {"training/trainer/loop.py": "a", "training/trainer/lars.py": "b", "torch": "2.0", "numpy": "2.0"}
    new = {"training/trainer/loop.py": "c", "training/trainer/steps.py": "d", "torch": "2.1", "numpy": "2.0"}
    assert changed_parts(old, old) == []
    assert changed_parts(new, old) == [
        "torch: 2.1, 2.0",
        "training/trainer/lars.py",
        "training/trainer/loop.py",
        "training/trainer/steps.py",
    ]
